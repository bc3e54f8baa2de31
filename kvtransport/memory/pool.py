"""BlockPool: a user's KV memory, registered with an Endpoint, so that blocks can be named by id.

Here: making a pool of tensors or of fresh memory, checking it before a post, ending it. The only file of
    `memory`
that knows the extension. Not here: what the arrays mean (`plan`), block ids (native), transfers
    (`connection`).

Invariant: while the native pool is open, this object keeps every array alive; whoever posts transfers must
keep this object (the Endpoint does, until `on_close`). A pool describes memory; which block is free or in
use is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from kvtransport.errors import LocalProtocolError, WaitTimeout
from kvtransport.memory.allocation import HostMemory, LayerArray, layer_arrays, shared_with
from kvtransport.memory.layout import BlockLayout, LayerGroup
from kvtransport.memory.plan import MAX_LAYERS, MAX_NAME_NBYTES, Group, PoolPlan, describe
from kvtransport.memory.region import Watch
from kvtransport.seconds import to_wait
from kvtransport.types import BlockIds, GrantMode, Heads, LayerName

if TYPE_CHECKING:
    from kvtransport import _native
    from kvtransport.completion import CompletionQueue
    from kvtransport.grant import Grant
    from kvtransport.types import Peer


class GrantMaker(Protocol):
    """How an endpoint makes the grants of its pools: the layer above makes their handles."""

    def __call__(
        self,
        pool: BlockPool,
        block_ids: BlockIds | None,
        token: str | None,
        *,
        to: Peer | bytes | str | None,
        mode: GrantMode,
        readers: int | None,
        ttl_s: float | None,
        queue: CompletionQueue | None,
        tag: object,
    ) -> Grant:
        """Return a new one."""


class BlockPool:
    """Blocks of KV cache by id. Made by `Endpoint.register` and `Endpoint.allocate`; a context manager.

    name: as given; peers see it. None: the pool has none.
    arrays: of an allocated pool: {layer name: its PoolArray, or pair (K, V)}, with DLPack of the true dtype.
        Layers without names are called "layer0", "layer1", ... Of a registered pool: empty.
    native: the extension's twin, for a Connection.
    """

    def __init__(
        self,
        plan: PoolPlan,
        native: _native.Pool,
        *,
        name: str | None,
        arrays: Mapping[str, LayerArray],
        make_grant: GrantMaker | None = None,
        on_close: Callable[[BlockPool], None] | None = None,
    ) -> None:
        """For `register` and `allocate`. `on_close` is called once, when the pool has ended."""
        self._make_grant = make_grant
        self.name = name
        self.arrays: Mapping[str, LayerArray] = MappingProxyType(dict(arrays))
        self.native = native
        self._plan = plan
        self._watch = Watch(plan.sources())
        self._on_close = on_close
        self._closed = False

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers' names, by place."""
        return tuple(layer.name for layer in self._plan.layers)

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self._plan.layers)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups, each with `.name`, `.num_blocks`, `.layout` (None: opaque) and `.num_heads`."""
        return self._plan.groups

    @property
    def num_blocks(self) -> int:
        """Blocks of the only group: ids are 0 to num_blocks - 1. ValueError where there are several."""
        if len(self._plan.groups) > 1:
            raise ValueError(f"the pool has {len(self._plan.groups)} groups; see pool.groups")
        return self._plan.groups[0].num_blocks

    @property
    def writable(self) -> bool:
        """Whether blocks can be received: False where an array is read-only."""
        return self._plan.writable

    @property
    def closed(self) -> bool:
        """Whether `close` has ended the pool."""
        return self._closed

    def piece_nbytes(self, layer: LayerName) -> int:
        """Return the bytes of one block of a layer, all heads."""
        return self._plan.layers[self._plan.layer_index(layer)].piece_nbytes

    def layer_index(self, layer: LayerName) -> int:
        """Return the place of a layer, given by name or place. ValueError where there is none."""
        return self._plan.layer_index(layer)

    def layer_indices(self, layers: Iterable[LayerName] | None) -> list[int] | None:
        """Return the places of `layers` in their order, each once; None (all) for None."""
        return self._plan.layer_indices(layers)

    def head_slice(self, heads: Heads, layers: list[int] | None = None) -> tuple[int, int] | None:
        """Return (first, count) of heads that all of `layers` (indices) have; None (all) for None."""
        return self._plan.head_slice(heads, layers)

    def check(self) -> None:
        """Raise LocalProtocolError where the pool is closed, or an array was resized. For every post."""
        if self._closed:
            raise LocalProtocolError(f"{self!r} is closed; register its arrays again to use them")
        for ask, answer in self._watch.questions:
            if ask() != answer:
                raise LocalProtocolError(
                    f"layer {self._watch.moved()!r} of {self!r}: its array was resized or re-seated since it "
                    "was registered, its blocks are not where the pool says; close the pool and register the "
                    "array again"
                )

    def grant(
        self,
        block_ids: BlockIds | None,
        *,
        token: str | None = None,
        to: Peer | bytes | str | None = None,
        mode: GrantMode = "read",
        readers: int | None = 1,
        ttl_s: float | None = 30,
        queue: CompletionQueue | None = None,
        tag: object = None,
    ) -> Grant:
        """Let peers read these blocks (`Connection.read_blocks`), or write to them, without this side's Python.

        block_ids: in the order that readers see; None: all blocks of the pool. token: minted before
            (`kvtransport.new_token`), perhaps by the reader; None: a new one, see `grant.token`.
        to: a Peer or its incarnation (or the identity of its key): nobody else is let in. None: the first
            `readers` peers to show the token.
        readers: how many peers finish with it before it ends by itself; each by one read, or by its last lease.
            None: a standing grant, that only ends by the three below.
        ttl_s: it expires so many seconds after it was made, or after its last lease was lost; None: never.

        It ends besides by `grant.revoke()`, by `reuse` of one of its blocks, and with its pool. From then on none
        of it is delivered. The blocks must hold what shall be read, and not be rewritten before it has ended.

        ValueError: no such block, no token; mode="write" of a read-only pool. LocalProtocolError: the token names
        another open grant of this endpoint; the pool is closed.
        """
        self.check()
        if self._make_grant is None:
            raise LocalProtocolError(f"{self!r} belongs to no endpoint: it can't be granted")
        return self._make_grant(
            self, block_ids, token, to=to, mode=mode, readers=readers, ttl_s=ttl_s, queue=queue, tag=tag
        )

    def reuse(self, block_ids: BlockIds) -> None:
        """End every grant on these blocks, at once: they are about to be rewritten. For whoever frees blocks.

        When this returns they may be rewritten: nothing that is read of them from now on is delivered. Blocks
        without a grant cost next to nothing. Transfers by key aren't touched.
        """
        self.native.reuse(block_ids)

    def close(self, timeout: float | None = 5) -> None:
        """End the pool: end its grants, wait until no transfer uses it, then let its arrays go. Idempotent.

        WaitTimeout (with `quiesced` False: don't free the memory) where transfers still use it after
        `timeout` seconds (None: wait as long as they take); they go on, and the pool stays open.
        """
        if self._closed:
            return
        if not self.native.close(to_wait(timeout)):
            raise WaitTimeout(
                f"{self!r} is still used by {self.native.in_use()} transfers after {timeout} s, and so is "
                "its memory; cancel them, or wait for them and close again",
                quiesced=False,
            )
        self._closed = True
        self.arrays = MappingProxyType({})
        self._plan = self._plan.released()
        self._watch = Watch(())
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close(self)

    def __enter__(self) -> BlockPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        blocks = ", ".join(str(group.num_blocks) for group in self._plan.groups)
        label = repr(self.name) if self.name else "unnamed"
        return f"<BlockPool {label}: {self.num_layers} layers, {blocks} blocks>"


def register(
    engine: _native.Engine,
    tensors: Any,
    layout: BlockLayout | None = None,
    *,
    name: str | None = None,
    groups: Sequence[LayerGroup] | None = None,
    make_grant: GrantMaker | None = None,
    on_close: Callable[[BlockPool], None] | None = None,
) -> BlockPool:
    """Make a pool of a user's tensors; for Endpoint.register.

    tensors, layout, groups: see `plan.describe`. Read-only arrays make a pool that is a source only. At most
    1,024 layers, and 255 bytes of UTF-8 in the name of the pool, of each group and of each layer.

    TypeError, ValueError: the tensors don't fit the layout, or aren't arrays. BackendUnavailable: GPU memory.
    """
    plan = describe(tensors, layout, groups)
    return _pool(engine, plan, name, {}, make_grant, on_close)


def allocate(
    engine: _native.Engine,
    layout: BlockLayout | None = None,
    num_layers: int | None = None,
    num_blocks: int | None = None,
    *,
    nbytes: int | None = None,
    name: str | None = None,
    layer_names: Sequence[str] | None = None,
    make_grant: GrantMaker | None = None,
    on_close: Callable[[BlockPool], None] | None = None,
) -> BlockPool | HostMemory:
    """Make a pool of fresh, zeroed memory, or with `nbytes` that many bare bytes; for Endpoint.allocate.

    layer_names: as in a dict given to `register`; None: layers are paired by place.

    TypeError: neither nbytes nor layout, num_layers and num_blocks. ValueError: no positive count.
    """
    if nbytes is not None:
        if layout is not None or num_layers is not None or num_blocks is not None or name or layer_names:
            raise TypeError("allocate takes nbytes alone, or layout, num_layers and num_blocks")
        return HostMemory(nbytes)
    if (
        not isinstance(layout, BlockLayout)
        or num_blocks is None
        or (num_layers is None and layer_names is None)
    ):
        raise TypeError("allocate needs layout, num_layers and num_blocks, or nbytes alone")
    if num_layers is not None and num_layers > MAX_LAYERS:  # before there is memory for each
        raise ValueError(f"num_layers is {num_layers}, the most is {MAX_LAYERS}: allocate several pools")
    names = list(layer_names) if layer_names is not None else [f"layer{i}" for i in range(num_layers or 0)]
    if num_layers is not None and num_layers != len(names):
        raise ValueError(
            f"num_layers is {num_layers}, not a positive number of layers with {len(names)} names"
        )
    if not names or num_blocks < 1:
        raise ValueError(f"a pool needs a layer and a block, not {len(names)} and {num_blocks}")
    arrays = layer_arrays(layout, names, num_blocks)
    plan = describe(arrays if layer_names is not None else list(arrays.values()), layout)
    return _pool(engine, plan, name, arrays, make_grant, on_close)


def _pool(
    engine: _native.Engine,
    plan: PoolPlan,
    name: str | None,
    arrays: Mapping[str, LayerArray],
    make_grant: GrantMaker | None,
    on_close: Callable[[BlockPool], None] | None,
) -> BlockPool:
    """Make the native pool and its Python twin."""
    from kvtransport import _native

    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"name is {name!r}, not a pool's name; leave it out, or give a str")
    if name is not None and len(name.encode()) > MAX_NAME_NBYTES:
        raise ValueError(f"name has {len(name.encode())} bytes in UTF-8, the most is {MAX_NAME_NBYTES}")
    native = _native.Pool(
        engine,
        name,
        [group.native() for group in plan.groups],
        [layer.native() for layer in plan.layers],
        named=plan.named,
        writable=plan.writable,
        segments=shared_with(plan.extents()),
    )
    return BlockPool(plan, native, name=name, arrays=arrays, make_grant=make_grant, on_close=on_close)
