"""Handles: what a post returns, and the ways to wait for it.

Here: Transfer and SentMessage (wait, await, poll, cancel), LayerGate, `wait`. Not here: posting
(`kvtransport.connection`), completion queues and event loops (`kvtransport.completion`), what moves bytes (native).

Invariant: a handle ends exactly once, and `done()` is true only when no byte of it moves any more. No method
but `result`, `wait_layer` and `wait` blocks.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

from kvtransport import _native
from kvtransport.completion import LoopBridge, LoopBridges
from kvtransport.errors import BackendUnavailable, ForkedProcessError, LocalProtocolError, WaitTimeout
from kvtransport.memory.pool import BlockPool
from kvtransport.seconds import to_wait
from kvtransport.types import LayerName, TransferResult, TransferState

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Outcome = TypeVar("Outcome")
_tuple_of = tuple.__new__  # what TransferResult._make does, without its frame


class Handle(abc.ABC, Generic[Outcome]):
    """Something that was posted and will end. Can be waited on, awaited, polled; see Transfer."""

    __slots__ = ("__weakref__", "_bridges", "native", "tag")

    def __init__(self, native: _native.Transfer, bridges: LoopBridges, tag: object = None) -> None:
        """For Connection. `native`: the extension's handle, for completion queues and `wait`."""
        self.native = native
        self.tag = tag
        self._bridges = bridges

    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.native.done()

    def exception(self) -> BaseException | None:
        """Return the error that it ended with; None if it succeeded or hasn't ended."""
        return self.native.exception()

    def result(self, timeout: float | None = None) -> Outcome:
        """Wait until it has ended; return its result or raise its error.

        timeout: seconds; None: as long as it takes (its own limits bound that). WaitTimeout if it hasn't ended
        by then: it goes on, and may be asked again.
        """
        if not self.native.wait(to_wait(timeout)):
            raise WaitTimeout(f"not done after {timeout} s; it goes on")
        return self._finished()

    def __await__(self) -> Generator[Any, None, Outcome]:
        """Like `result`, on an event loop. Cancelling the awaiting task cancels a transfer; a message goes on."""
        return self._wait_async().__await__()

    async def _wait_async(self) -> Outcome:
        from asyncio import CancelledError

        if not self.native.done():
            bridge = self._bridges.here()
            try:
                await bridge.ended(self.native)
            except CancelledError:
                await self._left(bridge)
                raise
        return self._finished()

    async def _left(self, bridge: LoopBridge) -> None:
        """What the cancellation of an awaiting task does before it goes on."""

    @abc.abstractmethod
    def _finished(self) -> Outcome:
        """Return the outcome of what has ended, or raise its error."""


class Transfer(Handle[TransferResult]):
    """One side of a transfer of blocks.

    tag: what was given to the post as `tag`.
    state: "posted", "matched", "moving", "done", "failed" or "cancelled".

    Errors that `result` raises: TransferTimeout, TransferCancelled, PeerAborted, IntegrityError, LayoutMismatch,
    PeerLost, ConnectionClosed, RemoteProtocolError, ResourceLimit; each says what became of the blocks.
    """

    __slots__ = ("_by_token", "_pool", "key")

    def __init__(
        self,
        native: _native.Transfer,
        bridges: LoopBridges,
        pool: BlockPool,
        key: str | bytes,
        tag: object,
        by_token: bool = False,
    ) -> None:
        """For Connection. One per post, so that it is worth sparing the base class's call."""
        self.native = native
        self.tag = tag
        self._bridges = bridges
        self.key = key
        self._by_token = by_token
        self._pool = pool

    def result(self, timeout: float | None = None) -> TransferResult:
        """Wait until it has ended; return its result or raise its error. See Handle."""
        native = self.native
        if not (native.done() or native.wait(to_wait(timeout))):
            raise WaitTimeout(f"not done after {timeout} s; it goes on")
        outcome = native.result()
        assert outcome is not None  # for the type checker: transfers have one, messages haven't
        return _tuple_of(TransferResult, outcome)

    @property
    def state(self) -> TransferState:
        """Where it stands."""
        return self.native.state()

    def progress(self) -> tuple[int, int]:
        """Return (bytes that have landed and verified, bytes in all); of a source, bytes that have left."""
        return self.native.progress()

    def cancel(self) -> None:
        """Ask for its end and return. `done()` turns true, very soon, when no byte of it moves any more.

        A transfer that has already succeeded at the destination stays a success.
        """
        self.native.cancel()

    def wait_layer(self, layer: LayerName, stream: object = None, timeout: float | None = None) -> None:
        """Receiver: wait until all pieces of this layer have landed and verified. That is final.

        layer: name or place in the pool. Raises the transfer's error if it ended without the layer, WaitTimeout
        after `timeout` seconds.
        """
        if stream is not None:
            raise no_streams()
        index = self._pool.layer_index(layer)
        if not self.native.wait_layer(index, to_wait(timeout)):
            raise WaitTimeout(f"layer {layer!r} hasn't landed after {timeout} s; the transfer goes on")

    async def _left(self, bridge: LoopBridge) -> None:
        """Cancel. The caller may touch the blocks once the await is left: not before no byte of it can land."""
        from asyncio import CancelledError

        self.native.cancel()
        while not self.native.done():
            with contextlib.suppress(CancelledError):
                await bridge.ended(self.native)

    def _finished(self) -> TransferResult:
        return self.result(0)

    def __repr__(self) -> str:
        """Key, state and progress."""
        # Whoever has the whole of a token may use it.
        shown = f"{str(self.key)[:6]}..." if self._by_token else repr(self.key)
        try:
            landed, total = self.progress()
        except ForkedProcessError:
            return f"<Transfer {shown} of another process>"
        return f"<Transfer {shown} {self.state} {landed}/{total} B>"


class SentMessage(Handle[None]):
    """A message on its way: done when the peer's endpoint has queued it for its user."""

    __slots__ = ()

    def _finished(self) -> None:
        self.native.result()


class LayerGate:
    """Which layers may be sent. One gate serves any number of transfers (`send_blocks(..., after=gate)`).

    num_layers: of the pools that it is used with; layers are named by their place in the pool.
    word: a uint64 array of one element. Whoever stores n there (a captured CUDA graph, a C extension) has released
        the first n layers; no call is needed. Marks and the word count together.
    """

    def __init__(self, num_layers: int) -> None:
        """A gate with every layer held back."""
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}, not a positive number")
        self.native = _native.Gate(num_layers)
        self.num_layers = num_layers
        import numpy  # here, so that `import kvtransport` alone doesn't pay for it

        self.word: npt.NDArray[np.uint64] = numpy.asarray(_Word(self.native))

    def mark_ready(self, layer: int, stream: object = None) -> None:
        """Release one layer: its blocks hold what shall be sent. Any order; again is harmless."""
        if stream is not None:
            raise no_streams()
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer {layer} isn't one of the gate's {self.num_layers}")
        self.native.mark_ready(layer)

    def fail(self, reason: str) -> None:
        """End every send that waits here with TransferCancelled; the receives they have met get PeerAborted(reason).

        A peer that posts its receive later isn't told: `Connection.refuse` does that.
        """
        self.native.fail(reason)


class _Word:
    """The gate's word as numpy sees it; keeps the native gate alive."""

    def __init__(self, gate: _native.Gate) -> None:
        self._gate = gate
        self._cell = ctypes.c_uint64.from_address(gate.word_address())

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (1,),
            "typestr": "<u8",
            "data": (self._gate.word_address(), False),
            "version": 3,
        }


class Waited(NamedTuple):
    """What `wait` returns: the handles that have ended and those that haven't, each in the order given."""

    done: list[Handle[Any]]
    pending: list[Handle[Any]]


def wait(
    handles: Iterable[Handle[Any]],
    timeout: float | None = None,
    return_when: Literal["ALL_COMPLETED", "FIRST_COMPLETED"] = "ALL_COMPLETED",
) -> Waited:
    """Wait for several handles with one sleep. Doesn't raise their errors, nor at the timeout (seconds)."""
    if return_when not in ("ALL_COMPLETED", "FIRST_COMPLETED"):
        raise ValueError(f"return_when is {return_when!r}, not 'ALL_COMPLETED' or 'FIRST_COMPLETED'")
    asked = list(handles)
    _native.wait_many([handle.native for handle in asked], to_wait(timeout), return_when == "ALL_COMPLETED")
    done = [handle for handle in asked if handle.done()]
    ended = set(map(id, done))
    return Waited(done, [handle for handle in asked if id(handle) not in ended])


def no_streams() -> BackendUnavailable:
    """Return the error for `stream=`: device memory isn't supported by this version."""
    return BackendUnavailable(
        "stream= orders device memory, and no backend for device memory is in this version; leave it out",
        reason="no backend for device memory",
        remedy="copy to host memory first, and leave stream= out",
    )


def require_gate(gate: object, pool: BlockPool) -> LayerGate:
    """Check what was given as `after=`."""
    if not isinstance(gate, LayerGate):
        raise TypeError(f"after= takes a LayerGate (ep.layer_gate(num_layers)), not {type(gate).__name__}")
    if gate.num_layers != pool.num_layers:
        raise LocalProtocolError(f"the gate has {gate.num_layers} layers and the pool {pool.num_layers}")
    return gate
