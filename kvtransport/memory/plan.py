"""PoolPlan: from a user's arrays and layouts to the description that the native core works from.

Here: which array is which layer, matching a tensor's axes with the layout's, and the tuples that the
    extension
takes. Not here: the extension itself and what a pool does (`pool`); block ids and runs (native).

Invariant: pure. A plan is complete and consistent: every layer belongs to one group, all layers of a group
have the same number of blocks, and each part's axes multiply to the bytes that the layout says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from kvtransport.memory import axes
from kvtransport.memory.layout import NO_NUMPY_DTYPE, BlockLayout, LayerGroup
from kvtransport.memory.region import Region, Source
from kvtransport.types import Heads, LayerName

PartTuple: TypeAlias = tuple[int, int, list[tuple[int, int]], int, int]
LayerTuple: TypeAlias = tuple[str, int, list[PartTuple]]
GroupTuple: TypeAlias = tuple[str, int, int, bool, str, str, str, int]

MAX_BLOCKS = 1 << 32
"""Block ids have 32 bits on the wire."""
MAX_LAYERS = 1024
"""Of one pool, on the wire; the native shape checks it for every pool."""
MAX_NAME_NBYTES = 255
"""Of a pool's, group's or layer's name in UTF-8, on the wire; as the one before."""

_BIT_CARRIERS = frozenset(("uint8", "int8", "void8", "uint16", "int16", "void16"))


@dataclass(frozen=True)
class Group:
    """Layers with block ids in common. `layout` None: blocks are opaque bytes."""

    name: str
    num_blocks: int
    layout: BlockLayout | None

    @property
    def num_heads(self) -> int:
        """KV heads that can be sliced; 0 for opaque blocks."""
        return self.layout.num_kv_heads if self.layout else 0

    def native(self) -> GroupTuple:
        """Return (name, blocks, heads, opaque, dtype, order, kv, tokens per block)."""
        if self.layout is None:
            return (self.name, self.num_blocks, 0, True, "", "", "", 0)
        of = self.layout
        return (
            self.name,
            self.num_blocks,
            of.num_kv_heads,
            False,
            of.dtype,
            of.order,
            of.kv,
            of.tokens_per_block,
        )


@dataclass(frozen=True)
class Layer:
    """One layer: its name, the place of its group, and its parts as regions [block, *axes of a block]."""

    name: str
    group: int
    parts: tuple[Region, ...]
    head_axis: int
    """The place of the heads among a block's axes; -1: none."""

    def native(self) -> LayerTuple:
        """Return (name, group, [(address, block stride, [(count, stride)...], itemsize, head axis)...])."""
        return (self.name, self.group, [self._native_part(part) for part in self.parts])

    def _native_part(self, part: Region) -> PartTuple:
        axes = list(zip(part.shape[1:], part.strides[1:], strict=True))
        return (part.address, part.strides[0], axes, part.itemsize, self.head_axis)

    @property
    def piece_nbytes(self) -> int:
        """Bytes of one block of this layer."""
        total = 0
        for part in self.parts:
            nbytes = part.itemsize
            for count in part.shape[1:]:
                nbytes *= count
            total += nbytes
        return total


@dataclass(frozen=True)
class PoolPlan:
    """All of a pool. `named`: the user gave the layers' names, so that peers may pair them by name."""

    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    named: bool

    @property
    def writable(self) -> bool:
        """Whether every array may be written: else the pool is a source only."""
        return all(part.writable for layer in self.layers for part in layer.parts)

    def layer_index(self, layer: LayerName) -> int:
        """Return the place of a layer that is given by name or place. ValueError where there is none."""
        if isinstance(layer, str):
            for i, known in enumerate(self.layers):
                if known.name == layer:
                    return i
            raise ValueError(
                f"layer {layer!r}: the pool has {', '.join(known.name for known in self.layers)}"
            )
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise TypeError(f"layer {layer!r} is neither a name nor an index")
        index = layer.__index__()
        if not 0 <= index < len(self.layers):
            raise ValueError(f"layer {index}: the pool has layers 0 to {len(self.layers) - 1}")
        return index

    def layer_indices(self, layers: Iterable[LayerName] | None) -> list[int] | None:
        """Return the places of `layers`, in their order; None for None, which means all.

        ValueError where one is named twice, isn't there, or there are none.
        """
        if layers is None:
            return None
        if isinstance(layers, str):
            raise TypeError(f"layers={layers!r}: give a list of names or indices")
        indices = [self.layer_index(layer) for layer in layers]
        if not indices:
            raise ValueError("layers is empty; leave it out for all layers")
        if len(set(indices)) < len(indices):
            raise ValueError(f"layers: one is named twice: {indices}")
        return indices

    def head_slice(self, heads: Heads, layers: list[int] | None = None) -> tuple[int, int] | None:
        """Return (first head, number of heads) for a slice or range of step 1; None (all) for None.

        Unlike Python's slices it isn't cut to size: ValueError where a head isn't there, or where the layers
        (indices; None: all) have no heads or not equally many.
        """
        if heads is None:
            return None
        if not isinstance(heads, (slice, range)):
            raise TypeError(f"heads={heads!r} is neither a slice nor a range")
        groups = {self.layers[i].group for i in (range(len(self.layers)) if layers is None else layers)}
        counts = {self.groups[group].num_heads for group in groups}
        if 0 in counts:
            raise ValueError("heads: opaque blocks have no heads; register the pool with a BlockLayout")
        if len(counts) > 1:
            raise ValueError(
                f"heads: the layers have {sorted(counts)} heads; name layers of one kind in layers="
            )
        count = counts.pop()
        start = 0 if heads.start is None else heads.start
        stop = count if heads.stop is None else heads.stop
        if heads.step not in (None, 1):
            raise ValueError(f"heads={heads!r}: only neighbouring heads, step 1, can be moved together")
        if not 0 <= start < stop <= count:
            raise ValueError(f"heads={heads!r}: choose at least one of the heads 0 to {count - 1}")
        return start, stop - start

    def extents(self) -> list[tuple[int, int]]:
        """Return [begin, end) of the addresses of each layer's parts, by their strides."""
        found = []
        for layer in self.layers:
            for part in layer.parts:
                reach = [(count - 1) * stride for count, stride in zip(part.shape, part.strides, strict=True)]
                begin = part.address + sum(step for step in reach if step < 0)
                end = part.address + sum(step for step in reach if step > 0) + part.itemsize
                found.append((begin, end))
        return found

    def released(self) -> PoolPlan:
        """Return the same plan without the user's arrays, which it no longer keeps alive."""
        nobody = Source(None)
        layers = [
            replace(layer, parts=tuple(replace(part, source=nobody) for part in layer.parts))
            for layer in self.layers
        ]
        return replace(self, layers=tuple(layers))

    def sources(self) -> list[tuple[str, Source]]:
        """Return each of the user's arrays once, with the name of the first layer that lies in it."""
        found: dict[int, tuple[str, Source]] = {}
        for layer in self.layers:
            for part in layer.parts:
                found.setdefault(id(part.source), (layer.name, part.source))
        return list(found.values())


def describe(
    tensors: Any, layout: BlockLayout | None = None, groups: Sequence[LayerGroup] | None = None
) -> PoolPlan:
    """Return the plan of a pool over `tensors`.

    tensors: {name: layer}, a list of layers, or one array: with a layout it has a layer axis in front of the
    axes of BlockLayout's table; without one it is one layer. A layer is an array, or with kv="split" and no
    kv_axis a pair (K, V). groups: for {name: layer}: every layer is in exactly one of them; the order of
    layers stays the dict's.

    TypeError for what is no array; ValueError names the layer and what was expected, axis by axis.
    """
    if layout is not None and not isinstance(layout, BlockLayout):
        raise TypeError(f"layout is a {type(layout).__name__}, not a BlockLayout")
    if groups is not None and layout is not None:
        raise ValueError("layout and groups exclude each other: each LayerGroup has its own layout")
    if groups is not None and not isinstance(tensors, Mapping):
        raise ValueError("groups name their layers: register a dict {name: tensor}")
    named = isinstance(tensors, Mapping)
    entries = _entries(tensors, layout)
    members = [LayerGroup(tuple(entries), layout)] if groups is None else list(groups)
    group_of = _group_of(members, entries)
    layers = tuple(_layer(name, entry, group_of[name], members) for name, entry in entries.items())
    return PoolPlan(tuple(_group(i, member, layers) for i, member in enumerate(members)), layers, named)


def _entries(tensors: Any, layout: BlockLayout | None) -> dict[str, tuple[Region, ...]]:
    """Return {layer name: the regions of its tensors}, in the order of the layers."""
    if isinstance(tensors, Mapping):
        for name in tensors:
            if not isinstance(name, str):
                raise TypeError(f"layer name {name!r} is not a str")
        given = dict(tensors)
    elif isinstance(tensors, (list, tuple)):
        given = {f"layer{i}": entry for i, entry in enumerate(tensors)}
    elif layout is None:
        given = {"layer0": tensors}
    else:
        return _layers_of_one_array(tensors, layout)
    if not given:
        raise ValueError("no tensors: a pool needs a layer")
    return {name: _regions(name, entry) for name, entry in given.items()}


def _regions(name: str, entry: Any) -> tuple[Region, ...]:
    """Return the region of a layer's tensor, or of its pair of tensors; an error names the layer."""
    try:
        if isinstance(entry, (list, tuple)):
            return tuple(Region.of(tensor) for tensor in entry)
        return (Region.of(entry),)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r}: {error}") from None


def _layers_of_one_array(array: Any, layout: BlockLayout) -> dict[str, tuple[Region, ...]]:
    """Cut one array [layers, *axes of a layer's tensor] into its layers."""
    (region,) = _regions("layer0", array)
    if layout.kv == "split" and layout.kv_axis is None:
        raise ValueError("one array for all layers: split needs kv_axis; or register a list of pairs (K, V)")
    if len(region.shape) - 1 not in axes.ndims(layout):
        raise ValueError(
            f"one array for all layers: expected [layers, {axes.shown(layout, 0)[1:]}, "
            f"got {list(region.shape)}; put the array into a list if it is one layer"
        )
    return {f"layer{i}": (region.take(0, i),) for i in range(region.shape[0])}


def _group_of(members: Sequence[LayerGroup], entries: Mapping[str, object]) -> dict[str, int]:
    """Return {layer name: place of its group}. ValueError where a layer is in none or in two."""
    if not members:
        raise ValueError("groups is empty; leave it out, or name every layer in a group")
    names = [_group_name(i, member) for i, member in enumerate(members)]
    if len(set(names)) < len(names):
        raise ValueError(f"groups: two have the same name: {names}")
    place: dict[str, int] = {}
    for i, member in enumerate(members):
        for name in member.names:
            if name not in entries:
                raise ValueError(f"group {names[i]!r}: no tensor is named {name!r}")
            if name in place:
                raise ValueError(f"layer {name!r} is in two groups, {names[place[name]]!r} and {names[i]!r}")
            place[name] = i
    missing = [name for name in entries if name not in place]
    if missing:
        raise ValueError(f"layers in no group: {', '.join(missing)}")
    return place


def _group_name(place: int, member: LayerGroup) -> str:
    return member.name or f"group{place}"


def _group(place: int, member: LayerGroup, layers: Sequence[Layer]) -> Group:
    """Return the group, with the number of blocks that all of its layers have."""
    counts = {layer.name: layer.parts[0].shape[0] for layer in layers if layer.group == place}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"group {_group_name(place, member)!r}: layers differ in their number of blocks: {counts}"
        )
    num_blocks = next(iter(counts.values()))
    if num_blocks > MAX_BLOCKS:
        raise ValueError(
            f"group {_group_name(place, member)!r}: {num_blocks} blocks are more than {MAX_BLOCKS}"
        )
    return Group(_group_name(place, member), num_blocks, member.layout)


def _layer(name: str, regions: tuple[Region, ...], group: int, members: Sequence[LayerGroup]) -> Layer:
    """Return the layer with its parts as [block, *axes of a block]."""
    layout = members[group].layout
    pair = layout is not None and layout.kv == "split" and layout.kv_axis is None
    if pair and len(regions) != 2:
        raise ValueError(
            f"layer {name!r}: a split layout needs a pair (K, V); for one tensor say kv_axis=0 or 1"
        )
    if not pair and len(regions) != 1:
        raise ValueError(f"layer {name!r}: expected one tensor, got a list of {len(regions)}")
    if layout is None:
        if not regions[0].shape:
            raise ValueError(f"layer {name!r}: an array without axes has no blocks; axis 0 is the block id")
        return Layer(name, group, regions, -1)
    parts: list[Region] = []
    for i, region in enumerate(regions):
        _check_dtype(name, region, layout)
        parts += axes.match(name, region, layout, i)
    if len({part.shape[0] for part in parts}) > 1:
        raise ValueError(f"layer {name!r}: K has {parts[0].shape[0]} blocks, V has {parts[1].shape[0]}")
    return Layer(name, group, tuple(parts), layout.head_axis)


def _check_dtype(name: str, region: Region, layout: BlockLayout) -> None:
    """Raise ValueError where the tensor's elements aren't the layout's, or unsigned bits in their place."""
    same_size = region.itemsize == layout.itemsize
    carried = layout.dtype in NO_NUMPY_DTYPE and same_size and region.dtype in _BIT_CARRIERS
    if region.dtype != layout.dtype and not carried:
        raise ValueError(f"layer {name!r}: expected dtype {layout.dtype}, got {region.dtype}")
