"""MappedBlocks: a peer's blocks, read where they lie, in memory of the peer's that this process has mapped.

Here: asking for the map, arrays over it, and the verdict at its end. Not here: who may (the owner's grant), when
a grant ends (native).

Invariant: an array is memory for as long as it is referenced, whatever becomes of the grant, its owner or the
connection; but what it holds is the grant's only until `close`, and that only if `close` raises nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from kvtransport.errors import BackendUnavailable, KVTransportError, PeerLost, StaleGrant, WaitTimeout
from kvtransport.memory.layout import DTYPES, NO_NUMPY_DTYPE
from kvtransport.seconds import to_wait

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvtransport import _native
    from kvtransport.grant import Lease
    from kvtransport.types import LayerName

    Array: TypeAlias = npt.NDArray[np.generic]
    Arrays: TypeAlias = Array | tuple[Array, Array]

ANSWER_S: Final = 10.0


class MappedBlocks:
    """A grant's blocks as read-only arrays over its owner's memory. A context manager; made by `map_blocks`.

    layer_names: of the owner's pool; without names "layer0", "layer1" and so on.
    block_ids: the owner's ids in the order of the grant; {group: ids} where the pool has several groups.

    An array has the axes of the owner's layout ([head, token, dim] or [token, head, dim]) and its dtype: unsigned
    integers where numpy hasn't it (bfloat16, fp8). K and V are a pair (K, V) where the layout is split. Blocks
    without a layout are bytes.

    **Results computed inside are valid only if the `with` is left without an error.** Until then the owner may have
    rewritten the blocks (`reuse`, `revoke(force=True)`), and nothing stops a reader who is under way.
    """

    layer_names: tuple[str, ...]

    def __init__(self, lease: Lease, shown: _native.ShownGrant) -> None:
        """For `map_grant`."""
        self._lease = lease
        self._shown = shown
        self._groups = shown.groups()
        self._layers = shown.layers()
        self._ids = _block_ids(shown)
        self._ended = False
        self._error: KVTransportError | None = None
        self._whole: dict[int, Arrays] = {}
        self.layer_names = tuple(
            layer[0] if shown.named else f"layer{at}" for at, layer in enumerate(self._layers)
        )

    @property
    def block_ids(self) -> Sequence[int] | Mapping[str, Sequence[int]]:
        """The owner's ids, in the order of the grant."""
        if len(self._groups) == 1:
            return self._ids[0]
        return {group[0]: ids for group, ids in zip(self._groups, self._ids, strict=True)}

    def array(self, layer: LayerName) -> Arrays:
        """Return the layer's whole array, [block, ...], to be indexed by block ids. Those of others aren't granted."""
        at = self._index(layer)
        if at not in self._whole:
            self._whole[at] = self._array(at)
        return self._whole[at]

    def block(self, layer: LayerName, position: int) -> Arrays:
        """Return one block of a layer, by its place in the grant. IndexError where there is none."""
        whole = self.array(layer)
        ids = self._ids[self._layers[self._index(layer)][1]]
        if not 0 <= position < len(ids):
            raise IndexError(f"position {position}: the grant has {len(ids)} blocks of this layer's group")
        return _block(whole, ids[position])

    def blocks(self, layer: LayerName) -> list[Arrays]:
        """Return the layer's granted blocks, in the order of the grant."""
        whole = self.array(layer)
        return [_block(whole, block) for block in self._ids[self._layers[self._index(layer)][1]]]

    def close(self) -> None:
        """End it: StaleGrant or PeerLost where what was read may be anything. What leaving the `with` does.

        ConnectionClosed where this side has closed the connection meanwhile. Called again it says the same.
        """
        if not self._ended:
            self._error = self._verdict()
            self._ended = True
            self._release()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> MappedBlocks:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it. An error that is under way goes on, and nothing is checked."""
        if kind is None:
            self.close()
        elif not self._ended:
            self._ended = True
            self._error = StaleGrant(
                "the `with` of these mapped blocks was left by an error, and nothing checked"
            )
            self._release()

    def __repr__(self) -> str:
        """Whether it has ended, and the start of the token."""
        return f"<MappedBlocks {self._lease.token[:6]}... {'ended' if self._ended else 'mapped'}>"

    def _verdict(self) -> KVTransportError | None:
        """Look whether all that was read until now was the grant's; return the error where it may not have been."""
        standing = self._shown.standing()
        ended = self._lease.exception() if self._lease.done() else None
        if isinstance(ended, KVTransportError):
            return ended
        token = self._lease.token
        if standing == "owner gone":
            return PeerLost("mapped: the owner's process has ended", cause="reset", key=token)
        if standing == "ended" or self._lease.done():
            return StaleGrant(
                "mapped: the grant has ended meanwhile: what was computed of its blocks may be of others; "
                "compute it again, or ask for a new grant",
                key=token,
            )
        return None

    def _release(self) -> None:
        with contextlib.suppress(KVTransportError):  # in a forked child, who holds nothing
            self._lease.release()

    def _index(self, layer: LayerName) -> int:
        if isinstance(layer, str):
            if layer not in self.layer_names:
                raise ValueError(f"layer {layer!r}: the pool has {', '.join(self.layer_names)}")
            return self.layer_names.index(layer)
        if not 0 <= layer < len(self.layer_names):
            raise ValueError(f"layer {layer}: the pool has layers 0 to {len(self.layer_names) - 1}")
        return int(layer)

    def _array(self, at: int) -> Arrays:
        _, group, parts = self._layers[at]
        arrays = tuple(_of_part(part, self._groups[group], self._shown) for part in parts)
        return arrays[0] if len(arrays) == 1 else (arrays[0], arrays[1])


def map_grant(
    hold: Callable[[], Lease], wait_s: float | None, channel: Callable[[], tuple[str, str]]
) -> MappedBlocks:
    """Wait until the grant is held, and find it in the owner's memory; for Connection.map_blocks.

    hold: asks for a lease that says that the blocks are mapped. channel: waits for memory to be shared, and says
    where that stands.
    """
    leases: list[Lease] = []
    try:
        leases.append(_held(hold(), wait_s))
        shown, standing = leases[-1].native.shown(), ("up", "")
        if (
            shown is None and (standing := channel())[0] == "up"
        ):  # only now, maybe: the owner shows it who asks
            leases.append(_held(hold(), wait_s))
            leases.pop(0).release()
            shown = leases[-1].native.shown()
        if shown is None or not shown.mapped:
            raise _not_mapped(leases[-1], shown is not None, *standing)
        return MappedBlocks(leases.pop(), shown)
    finally:
        for lease in leases:
            lease.release()


def _held(lease: Lease, wait_s: float | None) -> Lease:
    """Wait for the owner's answer. Its error where that is no; nothing is held then."""
    try:
        if not lease.native.wait_answer(to_wait(wait_s)):
            raise WaitTimeout(f"no answer from the owner after {wait_s} s; nothing is held", quiesced=True)
        if not lease.held:
            lease.result()
    except BaseException:
        lease.release()
        raise
    return lease


def _not_mapped(lease: Lease, shown: bool, state: str, why: str) -> KVTransportError:
    if lease.done() and (ended := lease.exception()) is not None and isinstance(ended, KVTransportError):
        return ended  # it has ended since
    if state != "up":
        reason = f"no memory is shared with the owner{f' ({why})' if why else ''}"
        remedy = (
            "map blocks of a peer on this host (connection.explain() says what is shared); or read_blocks"
        )
    elif shown:
        reason = "the owner's pool lies in memory that others can't map"
        remedy = "allocate the pool with Endpoint.allocate, at the owner; or read_blocks"
    else:
        reason = "the owner shows no such grant: it has too many, or this one has too many blocks or groups"
        remedy = "grant fewer blocks at a time (None: all of a pool), or read_blocks"
    return BackendUnavailable(
        f"the blocks can't be mapped: {reason}; {remedy}", reason=reason, remedy=remedy, key=lease.token
    )


def _block_ids(shown: _native.ShownGrant) -> list[Sequence[int]]:
    """Return each group's ids; of a grant on all blocks there may be more than a list should have."""
    ids = shown.blocks()
    if ids is None:
        return [range(group[1]) for group in shown.groups()]
    return list(ids)


def _block(whole: Arrays, block: int) -> Arrays:
    return (whole[0][block], whole[1][block]) if isinstance(whole, tuple) else whole[block]


class _Memory:
    """What numpy lays an array over: it keeps the map, and has no buffer that anybody could make writable."""

    def __init__(self, shown: _native.ShownGrant, interface: dict[str, Any]) -> None:
        self.shown = shown
        self.__array_interface__ = interface


def _of_part(
    part: tuple[int, int, list[tuple[int, int]], int, int],
    group: tuple[str, int, int, bool, str, str, str, int],
    shown: _native.ShownGrant,
) -> Array:
    """Lay an array [block, *axes of a block] over one part of a layer."""
    import numpy

    address, block_stride, axes, itemsize, _ = part
    dtype = group[4]
    shape = [group[1], *(count for count, _ in axes)]
    strides = [block_stride, *(stride for _, stride in axes)]
    if dtype in DTYPES and DTYPES[dtype][0] == itemsize:
        carrier = f"uint{itemsize * 8}" if dtype in NO_NUMPY_DTYPE else dtype
    else:
        carrier = "uint8"
        shape, strides = _as_bytes(shape, strides, itemsize)
    interface = {
        "version": 3,
        "data": (address, True),
        "typestr": numpy.dtype(carrier).str,
        "shape": tuple(shape),
        "strides": tuple(strides),
    }
    return numpy.asarray(_Memory(shown, interface))


def _as_bytes(shape: list[int], strides: list[int], itemsize: int) -> tuple[list[int], list[int]]:
    """Add an axis for an item's bytes, in one with those before it as far as they lie side by side."""
    shape, strides = [*shape, itemsize], [*strides, 1]
    while len(shape) > 2 and (shape[-2] == 1 or strides[-2] == shape[-1]):
        shape[-2:] = [shape[-2] * shape[-1]]
        strides[-2:] = [1]
    return shape, strides
