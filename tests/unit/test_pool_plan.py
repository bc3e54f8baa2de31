"""From arrays and layouts to the native description: the bytes read through it are what the layout means."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransport.memory.layout import BlockLayout, LayerGroup
from kvtransport.memory.plan import PoolPlan, describe
from tests.unit.memory_reader import piece

DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "int8"]


def layout(**changes: Any) -> BlockLayout:
    fields: dict[str, Any] = {"tokens_per_block": 4, "num_kv_heads": 2, "head_dim": 3, "dtype": "uint16"}
    return BlockLayout(**(fields | changes))


def counted(*shape: int) -> Any:
    return np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)


@st.composite
def layouts(draw: st.DrawFn) -> BlockLayout:
    kv = draw(st.sampled_from(["packed", "split", "single"]))
    kv_axis = draw(st.sampled_from([None, 0, 1])) if kv == "split" else None
    wide = kv != "single" and kv_axis is None
    return BlockLayout(
        tokens_per_block=draw(st.integers(1, 4)),
        num_kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 4)),
        dtype=draw(st.sampled_from(DTYPES)),
        order=draw(st.sampled_from(["HND", "NHD"])),
        kv=kv,
        kv_axis=kv_axis,
        v_head_dim=draw(st.none() | st.integers(1, 4)) if wide else None,
    )


@st.composite
def strided(draw: st.DrawFn, shape: tuple[int, ...], dtype: str) -> Any:
    """A torch tensor of that shape and any physical order, with gaps, of random bytes."""
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.integers(1, 2)) for _ in shape]
    physical = [shape[axis] * gaps[axis] for axis in order]
    element = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    seed = draw(st.integers(0, 1 << 32))
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(physical)) * element, dtype=np.uint8)
    tensor = torch.from_numpy(raw).view(getattr(torch, dtype)).reshape(physical)
    tensor = tensor.permute([order.index(axis) for axis in range(len(shape))])
    return tensor[tuple(slice(0, None, gap) for gap in gaps)]


def raw(tensor: torch.Tensor) -> Any:
    """The tensor's bytes as a dense uint8 array."""
    dense = torch.empty(*tensor.shape, 1, dtype=tensor.dtype).copy_(tensor[..., None])
    return dense.view(torch.uint8).numpy()


def part_arrays(tensor: Any, of: BlockLayout) -> list[Any]:
    """Uint8 arrays [block, x, y, bytes] of a layer's tensor (or pair), made by torch and numpy alone."""
    tensors = list(tensor) if isinstance(tensor, tuple) else [tensor]
    if of.kv_axis is not None:
        tensors = list(tensors[0].unbind(of.kv_axis))
    return [raw(t) for t in tensors]


@given(data=st.data(), of=layouts(), blocks=st.integers(1, 3), layers=st.integers(1, 2))
def test_bytes_are_the_layout_s(data: st.DataObject, of: BlockLayout, blocks: int, layers: int) -> None:
    tensors: list[Any] = []
    for _ in range(layers):
        shapes = [(blocks, *of.block_shape(part)) for part in range(len(of.part_dims))]
        if of.kv_axis is not None:
            shapes = [(*shapes[0][: of.kv_axis], 2, *shapes[0][of.kv_axis :])]
        parts = tuple(data.draw(strided(shape, of.dtype)) for shape in shapes)
        tensors.append(parts if len(parts) == 2 else parts[0])
    first = data.draw(st.integers(0, of.num_kv_heads - 1))
    count = data.draw(st.integers(1, of.num_kv_heads - first))
    plan = describe(tensors, of)
    assert plan.groups[0].num_blocks == blocks
    for layer, tensor in enumerate(tensors):
        expected = part_arrays(tensor, of)
        assert plan.layers[layer].piece_nbytes == of.block_nbytes
        for block in range(blocks):
            assert piece(plan, layer, block) == b"".join(part[block].tobytes() for part in expected)
            sliced = [part[block].take(range(first, first + count), of.head_axis) for part in expected]
            assert piece(plan, layer, block, (first, count)) == b"".join(part.tobytes() for part in sliced)


@given(
    data=st.data(), shape=st.lists(st.integers(1, 3), min_size=1, max_size=4), dtype=st.sampled_from(DTYPES)
)
def test_opaque_bytes_are_the_block_s(data: st.DataObject, shape: list[int], dtype: str) -> None:
    tensor = data.draw(strided(tuple(shape), dtype))
    plan = describe(tensor)
    for block in range(shape[0]):
        assert piece(plan, 0, block) == raw(tensor)[block].tobytes()


def test_group_and_layer_tuples() -> None:
    array = counted(5, 2, 4, 6)
    plan = describe({"a": array}, layout())
    assert plan.named
    assert plan.groups[0].native() == ("group0", 5, 2, False, "uint16", "HND", "packed", 4)
    name, group, parts = plan.layers[0].native()
    assert (name, group) == ("a", 0)
    assert parts == [(array.ctypes.data, 96, [(2, 48), (4, 12), (6, 2)], 2, 0)]


def test_opaque_tuples() -> None:
    array = counted(5, 6)
    plan = describe(array)
    assert not plan.named
    assert plan.groups[0].native() == ("group0", 5, 0, True, "", "", "", 0)
    assert plan.layers[0].native() == ("layer0", 0, [(array.ctypes.data, 12, [(6, 2)], 2, -1)])
    assert describe(counted(5)).layers[0].native()[2][0][2] == []


def test_one_array_with_a_layer_axis() -> None:
    array = counted(3, 5, 2, 4, 6)
    plan = describe(array, layout())
    assert [layer.name for layer in plan.layers] == ["layer0", "layer1", "layer2"]
    assert piece(plan, 2, 4) == array[2, 4].tobytes()
    assert len(plan.sources()) == 1
    across = np.ascontiguousarray(array.swapaxes(0, 1))  # pages hold all layers of a block
    assert piece(describe(across.swapaxes(0, 1), layout()), 2, 4) == array[2, 4].tobytes()


def test_one_array_with_layer_and_kv_axes() -> None:
    array = counted(3, 2, 5, 2, 4, 3)
    plan = describe(array, layout(kv="split", kv_axis=0))
    assert piece(plan, 1, 3) == array[1, 0, 3].tobytes() + array[1, 1, 3].tobytes()


def test_token_rows() -> None:
    k, v = counted(20, 2, 3), counted(20, 2, 3) + 1000
    plan = describe([(k, v)], layout(order="NHD", kv="split"))
    assert plan.groups[0].num_blocks == 5
    assert piece(plan, 0, 3) == k[12:16].tobytes() + v[12:16].tobytes()
    both = np.stack([k, v])
    plan = describe([both], layout(order="NHD", kv="split", kv_axis=0))
    assert piece(plan, 0, 3) == k[12:16].tobytes() + v[12:16].tobytes()


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("shape", [(-1, 1, 3), (-1, 3), "block", "head"])
def test_mla_shapes(tokens: int, shape: Any) -> None:
    flat = counted(20, 3)
    shapes = {"block": (-1, tokens, 3), "head": (-1, tokens, 1, 3)}
    plan = describe(
        [flat.reshape(shapes.get(shape, shape))],
        layout(order="NHD", kv="single", num_kv_heads=1, tokens_per_block=tokens),
    )
    assert plan.groups[0].num_blocks == 20 // tokens
    assert piece(plan, 0, 2) == flat[2 * tokens : 3 * tokens].tobytes()
    assert [count for count, _ in plan.layers[0].native()[2][0][2]] == [tokens, 1, 3]


def test_mla_in_hnd_with_and_without_head_axis() -> None:
    array = counted(5, 4, 3)
    of = layout(kv="single", num_kv_heads=1)
    for tensor in (array, array[:, None]):
        plan = describe([tensor], of)
        assert piece(plan, 0, 2) == array[2].tobytes()
        assert plan.layers[0].head_axis == 0


def test_groups_that_alias_one_storage() -> None:
    storage = counted(64, 6)
    wide, narrow = storage.reshape(8, 2, 4, 6), storage.reshape(16, 2, 2, 6)
    plan = describe(
        {"full.0": wide, "window.0": narrow, "state": storage},
        groups=[
            LayerGroup(["full.0"], layout()),
            LayerGroup(["window.0"], layout(tokens_per_block=2), name="window"),
            LayerGroup(["state"]),
        ],
    )
    assert [(g.name, g.num_blocks, g.num_heads) for g in plan.groups] == [
        ("group0", 8, 2),
        ("window", 16, 2),
        ("group2", 64, 0),
    ]
    assert [layer.group for layer in plan.layers] == [0, 1, 2]
    assert piece(plan, 1, 3) == narrow[3].tobytes()


def test_layers_keep_the_dict_s_order() -> None:
    tensors = {name: counted(5, 6) for name in "cab"}
    plan = describe(tensors, groups=[LayerGroup(["a", "b"]), LayerGroup(["c"])])
    assert [(layer.name, layer.group) for layer in plan.layers] == [("c", 1), ("a", 0), ("b", 0)]


@pytest.mark.parametrize(
    ("dtype", "carrier"),
    [("bfloat16", np.uint16), ("fp8_e4m3", np.uint8), ("fp8_e5m2", np.int8), ("bfloat16", "V2")],
)
def test_bits_stand_for_what_numpy_has_not(dtype: str, carrier: Any) -> None:
    assert describe([np.zeros((5, 2, 4, 6), carrier)], layout(dtype=dtype)).groups[0].native()[4] != carrier


def test_read_only_makes_a_source() -> None:
    array = counted(5, 2, 4, 6)
    assert describe([array], layout()).writable
    array.flags.writeable = False
    assert not describe([array], layout()).writable


REFUSALS: list[tuple[Any, dict[str, Any], str]] = [
    (
        [counted(5, 4, 2, 6)],
        {},
        r"expected \[block, head=2, token=4, dim=6\] \(HND, packed\), got \[5, 4, 2, 6\]",
    ),
    (
        [counted(5, 4, 2, 6)],
        {},
        r'axis 1 \(head\) is 4, not 2; axis 2 \(token\) is 2, not 4; it fits order="NHD"',
    ),
    ([counted(5, 2, 4, 3)], {}, r"axis 3 \(dim\) is 3, not 6$"),
    ([counted(5, 6)], {}, "it has 2 axes"),
    (counted(5, 2, 4, 6), {}, r"expected \[layers, block, .* put the array into a list"),
    ([counted(21, 2, 6)], {"order": "NHD"}, "21 rows are no multiple of 4 tokens"),
    ([counted(5, 2, 4, 3)], {"kv": "split"}, r"needs a pair \(K, V\)"),
    (counted(2, 5, 2, 4, 3), {"kv": "split"}, "split needs kv_axis"),
    ([(counted(5, 2, 4, 3), counted(4, 2, 4, 3))], {"kv": "split"}, "K has 5 blocks, V has 4"),
    (
        [(counted(5, 2, 4, 3), counted(5, 2, 4, 2))],
        {"kv": "split"},
        r"\(V\): expected .* axis 3 \(dim\) is 2, not 3",
    ),
    ([counted(5, 2, 2, 4, 3)], {"kv": "split", "kv_axis": 0}, r"axis 0 \(kv\) is 5, not 2"),
    ([(counted(5, 2, 4, 6),) * 2], {}, "expected one tensor, got a list of 2"),
    (
        [counted(5, 2, 4, 6), counted(4, 2, 4, 6)],
        {},
        "differ in their number of blocks: {'layer0': 5, 'layer1': 4}",
    ),
    ([counted(5, 2, 4, 6).astype("float32")], {}, "expected dtype uint16, got float32"),
    ([counted(5, 2, 4, 6)], {"dtype": "float16"}, "expected dtype float16, got uint16"),
    (
        [counted(5, 2, 4, 6).astype(">u2")],
        {},
        r"expected dtype uint16, got uint16 in the other byte order \(>u2\)",
    ),
    ([memoryview(counted(5, 2, 4, 6).astype(">u2"))], {}, r"in the other byte order \(>u2\)"),
    (
        [counted(5, 2, 4, 6).astype(">u2")],
        {"dtype": "bfloat16"},
        "expected dtype bfloat16, got uint16 in the other",
    ),
    ([], {}, "no tensors"),
    ({}, {}, "no tensors"),
]


@pytest.mark.parametrize(("tensors", "fields", "words"), REFUSALS)
def test_refusals(tensors: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        describe(tensors, layout(**fields))


def test_opaque_blocks_are_bytes_in_whatever_order() -> None:
    for array in (counted(5, 6).astype(">u2"), memoryview(counted(5, 6).astype(">u2"))):
        assert describe([array]).layers[0].piece_nbytes == 12


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([], "groups is empty"),
        ([LayerGroup(["a"])], "layers in no group: b"),
        ([LayerGroup(["a", "b"]), LayerGroup(["a"])], "layer 'a' is in two groups"),
        ([LayerGroup(["a", "b", "c"])], "no tensor is named 'c'"),
        ([LayerGroup(["a"], name="x"), LayerGroup(["b"], name="x")], "two have the same name"),
    ],
)
def test_group_refusals(groups: list[LayerGroup], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        describe({"a": counted(5, 6), "b": counted(5, 6)}, groups=groups)


def test_misuse() -> None:
    with pytest.raises(TypeError, match="not a BlockLayout"):
        describe([counted(5, 6)], "HND")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layer name 1 is not a str"):
        describe({1: counted(5, 6)})
    with pytest.raises(ValueError, match="exclude each other"):
        describe({"a": counted(5, 6)}, layout(), [LayerGroup(["a"])])
    with pytest.raises(ValueError, match="groups name their layers"):
        describe([counted(5, 6)], groups=[LayerGroup(["a"])])
    with pytest.raises(TypeError, match="layer 'layer1': int is no array"):
        describe([counted(5, 6), 7])
    with pytest.raises(ValueError, match="without axes"):
        describe(np.zeros(()))


def hybrid() -> PoolPlan:
    return describe(
        {
            "a": counted(5, 2, 4, 6),
            "b": counted(5, 2, 4, 6),
            "c": counted(5, 3, 4, 6),
            "state": counted(5, 6),
        },
        groups=[
            LayerGroup(["a", "b"], layout()),
            LayerGroup(["c"], layout(num_kv_heads=3)),
            LayerGroup(["state"]),
        ],
    )


def test_layer_indices() -> None:
    plan = hybrid()
    assert plan.layer_indices(None) is None
    assert plan.layer_indices(["c", 0, np.int64(1)]) == [2, 0, 1]  # type: ignore[list-item]
    for layers in (["d"], [4], [-1], ["a", 0], []):
        with pytest.raises(ValueError, match="layer"):
            plan.layer_indices(layers)  # type: ignore[arg-type]
    for wrong in ("ab", [True], [1.0]):
        with pytest.raises(TypeError, match="layer"):
            plan.layer_indices(wrong)  # type: ignore[arg-type]


def test_head_slice() -> None:
    plan = hybrid()
    assert plan.head_slice(None) is None
    assert plan.head_slice(slice(1, 2), [0, 1]) == (1, 1)
    assert plan.head_slice(slice(None), [2]) == (0, 3)
    assert plan.head_slice(slice(1, None, 1), [2]) == (1, 2)
    assert plan.head_slice(range(2), [0]) == (0, 2)
    for heads, layers, words in [
        (slice(0, 1), None, "opaque"),
        (slice(0, 1), [0, 2], r"\[2, 3\] heads"),
        (slice(0, 4), [0], "heads 0 to 1"),
        (slice(1, 1), [0], "heads 0 to 1"),
        (slice(-1, None), [0], "heads 0 to 1"),
        (range(0, 2, 2), [0], "step 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            plan.head_slice(heads, layers)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="neither a slice nor a range"):
        plan.head_slice([0, 1], [0])  # type: ignore[arg-type]
