"""What one block of one layer looks like: BlockLayout, and LayerGroup for layers that share block ids.

Here: the numbers that describe a block, their checks, dtype names and sizes, the shapes that a layer's
tensors must have. Not here: where any block lies (`region`, `plan`).

Invariant: a layout that exists is complete: the bytes of a block and their order in a transfer follow from it
alone, and nothing about a tensor is guessed from sizes that could mean two things.

**The order of a piece's bytes** (a piece is one block of one layer): the axes of `order`, outermost first,
so HND is [head, token, dim] and NHD is [token, head, dim]. With kv="split", all of K comes first, then all
of V. With kv="packed" the last axis holds K's elements of a token and head, then V's. How the tensor's
memory is strided has no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from kvtransport.errors import ConfigError

Order: TypeAlias = Literal["HND", "NHD"]
KVForm: TypeAlias = Literal["packed", "split", "single"]

DTYPES: Final[dict[str, tuple[int, int]]] = {
    # name: (bytes, DLPack type code), https://dmlc.github.io/dlpack/latest/c_api.html
    "float64": (8, 2),
    "float32": (4, 2),
    "float16": (2, 2),
    "bfloat16": (2, 4),
    "float8_e4m3fn": (1, 10),
    "float8_e4m3fnuz": (1, 11),
    "float8_e5m2": (1, 12),
    "float8_e5m2fnuz": (1, 13),
    "int64": (8, 0),
    "int32": (4, 0),
    "int16": (2, 0),
    "int8": (1, 0),
    "uint64": (8, 1),
    "uint32": (4, 1),
    "uint16": (2, 1),
    "uint8": (1, 1),
}
DTYPE_ALIASES: Final[dict[str, str]] = {
    "bf16": "bfloat16",
    "half": "float16",
    "fp16": "float16",
    "float": "float32",
    "fp32": "float32",
    "fp64": "float64",
    "double": "float64",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e4m3fn": "float8_e4m3fn",
    "float8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
NO_NUMPY_DTYPE: Final = frozenset(name for name in DTYPES if name.startswith(("bfloat", "float8")))
"""Names that numpy hasn't: such arrays come as unsigned integers of the same size."""


def dtype_name(dtype: Any) -> str:
    """Return the canonical name of a dtype: a name, an alias, or a dtype object of torch or numpy.

    ConfigError where it is none that a block can have.
    """
    text = dtype if isinstance(dtype, str) else getattr(dtype, "name", getattr(dtype, "__name__", dtype))
    name = str(text).removeprefix("torch.").lower()
    name = DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        known = "fp8_e4m3 or fp8_e5m2" if name in ("fp8", "float8") else ", ".join(DTYPES)
        hint = f"; choose of {known}"
        raise ConfigError(f"dtype: {text!r} is unknown{hint}")
    return name


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """One layer's block of KV cache.

    tokens_per_block: tokens (N) of a block.
    num_kv_heads: KV heads (H) that this side holds: of its own tensor-parallel rank.
    head_dim: elements of K for a token and head (D). For kv="single" (MLA): all elements of a token, e.g.
    576.
    dtype: of an element: a name ("bfloat16", "fp8_e4m3", ...) or a dtype object; kept as the canonical name.
    order: the order of a tensor's axes after the block: "HND" is [head, token, dim], "NHD" is [token, head,
    dim].
    kv: "packed": K and V of a token side by side in the last axis. "split": each layer is a pair of tensors
        (K, V), or one tensor with a K/V axis, see kv_axis. "single": there is no V (MLA).
    kv_axis: for "split": the axis of size 2 in a layer's tensor, 0 or 1; None: each layer is a pair.
    v_head_dim: elements of V for a token and head, where they aren't head_dim.

    Shapes of a layer's tensor, blocks B, in NHD (HND has token and head the other way round):
        packed                [B, N, H, D + Dv]
        split, a pair         [B, N, H, D] and [B, N, H, Dv]
        split, kv_axis=0      [2, B, N, H, D]
        split, kv_axis=1      [B, 2, N, H, D]
        single                [B, N, H, D]; with one head also [B, N, D]
        NHD by tokens         [B * N, H, dim] in place of [B, N, H, dim]; not with kv_axis=1

    ConfigError (also ValueError) names what is wrong.
    """

    tokens_per_block: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    order: Order = "HND"
    kv: KVForm = "packed"
    kv_axis: int | None = None
    v_head_dim: int | None = None

    def __post_init__(self) -> None:
        """Check every field; keep the dtype's canonical name."""
        for name in ("tokens_per_block", "num_kv_heads", "head_dim", "v_head_dim"):
            _check_count(name, getattr(self, name), optional=name == "v_head_dim")
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.order not in ("HND", "NHD"):
            raise ConfigError(f"order: {self.order!r} is unknown; choose HND ([head, token, dim]) or NHD")
        if self.kv not in ("packed", "split", "single"):
            raise ConfigError(f"kv: {self.kv!r} is unknown; choose packed, split or single")
        if self.kv_axis is not None:
            self._check_kv_axis()
        if self.kv == "single" and self.v_head_dim is not None:
            raise ConfigError("v_head_dim: a single layout has no V; head_dim counts all elements of a token")

    def _check_kv_axis(self) -> None:
        if self.kv != "split":
            raise ConfigError(f'kv_axis: {self.kv} has no K/V axis; say kv="split", or leave kv_axis out')
        if isinstance(self.kv_axis, bool) or self.kv_axis not in (0, 1):
            raise ConfigError(
                f"kv_axis: {self.kv_axis!r} is neither 0, [2, blocks, ...], nor 1, [blocks, 2, ...]"
            )
        if self.v_head_dim not in (None, self.head_dim):
            raise ConfigError("v_head_dim: with a K/V axis K and V have one width; use a pair (K, V)")

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype][0]

    @property
    def part_dims(self) -> tuple[int, ...]:
        """Elements of the last axis, for each tensor of a layer: (D + Dv,), (D, Dv) or (D,)."""
        v_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        if self.kv == "packed":
            return (self.head_dim + v_dim,)
        return (self.head_dim, v_dim) if self.kv == "split" else (self.head_dim,)

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block of one layer (a piece): K and V of all its tokens and heads."""
        return self.tokens_per_block * self.token_nbytes

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token of one layer."""
        return self.num_kv_heads * sum(self.part_dims) * self.itemsize

    def block_shape(self, part: int = 0) -> tuple[int, int, int]:
        """Return the shape of a block in tensor `part` of a layer, in the layout's order."""
        heads, tokens, dim = self.num_kv_heads, self.tokens_per_block, self.part_dims[part]
        return (heads, tokens, dim) if self.order == "HND" else (tokens, heads, dim)

    @property
    def head_axis(self) -> int:
        """The place of the heads in `block_shape`."""
        return self.order.index("H")


@dataclass(frozen=True)
class LayerGroup:
    """Layers of a hybrid model that have their block ids in common.

    names: of the layers, each a key of the dict that is registered. layout: of one block of each of them;
    None: axis 0 is the block id, and a block is opaque bytes. name: of the group, as in block_ids={name:
    ids}; None: "group0", "group1" and so on, by its place in the list.
    """

    names: Sequence[str]
    layout: BlockLayout | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        """Check the names, and make them a tuple."""
        if isinstance(self.names, str) or not all(isinstance(n, str) for n in self.names):
            raise ConfigError(f"names: {self.names!r} is not a list of layer names")
        if not self.names:
            raise ConfigError("names: a group needs a layer; leave an empty group out")
        object.__setattr__(self, "names", tuple(self.names))
        if self.name is not None and (not isinstance(self.name, str) or not self.name):
            raise ConfigError(f"name: {self.name!r} is not a group's name; leave it out, or give a str")
        if self.layout is not None and not isinstance(self.layout, BlockLayout):
            raise ConfigError(f"layout: {type(self.layout).__name__} is not a BlockLayout")


def _check_count(name: str, value: Any, *, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 31:
        raise ConfigError(f"{name}: {value!r} is not a positive integer")
