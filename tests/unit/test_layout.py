"""BlockLayout, LayerGroup and dtype names."""

from typing import Any

import numpy as np
import pytest
import torch

from kvtransport.errors import ConfigError
from kvtransport.memory.layout import DTYPE_ALIASES, DTYPES, BlockLayout, LayerGroup, dtype_name


def layout(**changes: Any) -> BlockLayout:
    fields: dict[str, Any] = {"tokens_per_block": 16, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    return BlockLayout(**(fields | changes))


@pytest.mark.parametrize("name", DTYPES)
def test_sizes_are_torch_s(name: str) -> None:
    dtype = getattr(torch, name)
    assert DTYPES[name][0] == torch.empty(1, dtype=dtype).element_size()
    assert dtype_name(dtype) == name


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(np.float16, "float16"), (np.dtype("uint8"), "uint8"), ("BF16", "bfloat16"), ("torch.half", "float16")],
)
def test_dtype_objects_and_aliases(dtype: Any, name: str) -> None:
    assert dtype_name(dtype) == name


def test_aliases_lead_to_names() -> None:
    assert set(DTYPE_ALIASES.values()) <= set(DTYPES)
    assert not set(DTYPE_ALIASES) & set(DTYPES)


def test_ambiguous_and_unknown_dtypes() -> None:
    with pytest.raises(ConfigError, match="choose of fp8_e4m3 or fp8_e5m2"):
        layout(dtype="fp8")
    with pytest.raises(ConfigError, match="'complex64' is unknown"):
        layout(dtype="complex64")


@pytest.mark.parametrize(
    ("fields", "nbytes"),
    [  # bytes of a block of a layer, from published model shapes
        ({}, 64 * 1024),
        ({"kv": "split"}, 64 * 1024),
        ({"num_kv_heads": 4}, 32 * 1024),
        ({"num_kv_heads": 1, "head_dim": 576, "tokens_per_block": 64, "kv": "single"}, 73_728),
        ({"num_kv_heads": 1, "head_dim": 656, "dtype": "uint8", "kv": "single"}, 16 * 656),
        ({"kv": "split", "head_dim": 192, "v_head_dim": 128}, 16 * 8 * 320 * 2),
        ({"dtype": "fp8_e4m3", "v_head_dim": 64}, 16 * 8 * 192),
    ],
)
def test_block_nbytes(fields: dict[str, Any], nbytes: int) -> None:
    assert layout(**fields).block_nbytes == nbytes


def test_block_shape() -> None:
    assert layout().block_shape() == (8, 16, 256)
    assert layout(order="NHD").block_shape() == (16, 8, 256)
    assert layout(kv="split", v_head_dim=64).block_shape(1) == (8, 16, 64)
    assert (layout().head_axis, layout(order="NHD").head_axis) == (0, 1)


def test_dtype_is_kept_by_its_canonical_name() -> None:
    assert layout(dtype=torch.float8_e5m2).dtype == "float8_e5m2"
    assert layout(dtype="bf16") == layout(dtype="bfloat16")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens_per_block": 0}, "tokens_per_block"),
        ({"num_kv_heads": True}, "num_kv_heads"),
        ({"head_dim": 1.5}, "head_dim"),
        ({"v_head_dim": 0}, "v_head_dim"),
        ({"order": "DHN"}, "order"),
        ({"kv": "both"}, "kv"),
        ({"kv_axis": 0}, 'say kv="split"'),
        ({"kv": "split", "kv_axis": 2}, "kv_axis"),
        ({"kv": "split", "kv_axis": True}, "kv_axis"),
        ({"kv": "split", "kv_axis": 0, "v_head_dim": 64}, "pair"),
        ({"kv": "single", "v_head_dim": 64}, "no V"),
    ],
)
def test_refusals(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        layout(**fields)


def test_layer_group() -> None:
    assert LayerGroup(["a", "b"], layout()).names == ("a", "b")
    for names in ("ab", [], [1]):
        with pytest.raises(ConfigError, match="names"):
            LayerGroup(names)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="layout"):
        LayerGroup(["a"], "HND")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="name"):
        LayerGroup(["a"], name="")
