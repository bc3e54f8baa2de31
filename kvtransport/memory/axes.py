"""Matching a tensor's axes with a layout: which axis is the block, the head, the token.

Here: the forms that a layer's tensor may have, and the tensor brought to the one form [block, *axes of a
    block].
Not here: which tensor is which layer (`plan`).

Invariant: nothing is guessed: a tensor fits one form, or two that mean the same bytes, or it is refused.
"""

from __future__ import annotations

from dataclasses import replace

from kvtransport.memory.layout import BlockLayout
from kvtransport.memory.region import Region


def match(name: str, region: Region, layout: BlockLayout, part: int) -> list[Region]:
    """Return tensor `part` of a layer as one or (with a K/V axis) two regions [block, *axes of a block].

    ValueError says what was expected and what was found, axis by axis.
    """
    form, faults = _form(region, layout, part)
    if form is None:
        which = f" ({'KV'[part]})" if layout.kv == "split" and layout.kv_axis is None else ""
        swapped = replace(layout, order="NHD" if layout.order == "HND" else "HND")
        hint = f'; it fits order="{swapped.order}"' if _form(region, swapped, part)[0] else ""
        raise ValueError(
            f"layer {name!r}{which}: expected {shown(layout, part)} ({layout.order}, {layout.kv}), "
            f"got {list(region.shape)}: {'; '.join(faults)}{hint}"
        )
    regions = [region]
    if "kv" in form:
        regions = [region.take(form.index("kv"), i) for i in (0, 1)]
    if "row" in form:
        regions = [r.split(0, layout.tokens_per_block) for r in regions]
    if "head" not in form:
        regions = [r.insert(1 + layout.head_axis) for r in regions]
    return regions


def ndims(layout: BlockLayout) -> set[int]:
    """Return how many axes a layer's tensor may have."""
    return {len(form) for form in _forms(layout)}


def _forms(layout: BlockLayout) -> list[tuple[str, ...]]:
    """Return the axes that a layer's tensor may have, by name; the usual form first.

    A shape that fits two means the same bytes in both. "row" is a token of any block, so rows = blocks *
    tokens.
    """
    inner = ("head", "token", "dim") if layout.order == "HND" else ("token", "head", "dim")
    forms: list[tuple[str, ...]] = [("block", *inner)]
    by_row = layout.order == "NHD" and layout.kv_axis != 1
    if by_row:
        forms.append(("row", "head", "dim"))
    if layout.kv == "single" and layout.num_kv_heads == 1:
        forms.append(("block", "token", "dim"))
        forms += [("row", "dim")] if by_row else []
    if layout.kv_axis is not None:
        forms = [(*form[: layout.kv_axis], "kv", *form[layout.kv_axis :]) for form in forms]
    return forms


def _sizes(layout: BlockLayout, part: int) -> dict[str, int]:
    """Return the size of each axis that the layout fixes."""
    return {
        "head": layout.num_kv_heads,
        "token": layout.tokens_per_block,
        "dim": layout.part_dims[part],
        "kv": 2,
    }


def shown(layout: BlockLayout, part: int) -> str:
    """Return the expected shape in words, e.g. "[block, head=8, token=16, dim=128]"."""
    sizes = _sizes(layout, part)
    return (
        "["
        + ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in _forms(layout)[0])
        + "]"
    )


def _faults(form: tuple[str, ...], region: Region, layout: BlockLayout, part: int) -> list[str]:
    """Return what keeps a tensor of as many axes from having this form."""
    sizes = _sizes(layout, part)
    faults = []
    for i, (axis, count) in enumerate(zip(form, region.shape, strict=True)):
        if axis == "row" and count % layout.tokens_per_block:
            faults.append(f"axis {i}: {count} rows are no multiple of {layout.tokens_per_block} tokens")
        elif axis in sizes and count != sizes[axis]:
            faults.append(f"axis {i} ({axis}) is {count}, not {sizes[axis]}")
    return faults


def _form(region: Region, layout: BlockLayout, part: int) -> tuple[tuple[str, ...] | None, list[str]]:
    """Return the form that fits the tensor, or None and the faults of the first that has as many axes."""
    faults: list[str] = []
    for form in _forms(layout):
        if len(form) == len(region.shape):
            found = _faults(form, region, layout, part)
            if not found:
                return form, []
            faults = faults or found
    return None, faults or [f"it has {len(region.shape)} axes"]
