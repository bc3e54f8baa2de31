"""Arrays over mapped blocks: shape, dtype and bytes for every layout, beside what the owner itself sees."""

import numpy as np
import pytest

from kvtransport import BlockLayout, Config, Endpoint, LayerGroup
from kvtransport.memory.layout import NO_NUMPY_DTYPE

CONFIG = Config(backends=("shm", "tcp"))
BLOCKS, SOME = 6, [4, 0, 5]


@pytest.fixture(scope="module")
def ends():
    with Endpoint(CONFIG) as owner, Endpoint(CONFIG) as reader:
        connection = reader.connect(owner.listen("127.0.0.1:0"))
        yield owner, connection


def filled(array, seed: int):
    """Random bytes in all of it; the array."""
    flat = np.random.default_rng(seed).integers(0, 256, array.nbytes, dtype=np.uint8)
    array[...] = flat.view(array.dtype).reshape(array.shape)
    return array


def same(mine, theirs) -> bool:
    """Bit for bit, of one shape and dtype: NaN is no excuse."""
    assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    return mine.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize(
    ("kv", "dtype", "more"),
    [
        ("packed", "float32", {}),
        ("packed", "bfloat16", {"v_head_dim": 2}),
        ("split", "float16", {"v_head_dim": 2}),
        ("split", "fp8_e4m3", {"kv_axis": 0}),
        ("split", "int8", {"kv_axis": 1}),
        ("single", "float64", {}),
    ],
)
def test_every_layout(ends, heads, order, kv, dtype, more):
    owner, connection = ends
    layout = BlockLayout(
        tokens_per_block=5, num_kv_heads=heads, head_dim=4, dtype=dtype, order=order, kv=kv, **more
    )
    with owner.allocate(layout, num_layers=2, num_blocks=BLOCKS) as pool:
        for at, arrays in enumerate(pool.arrays.values()):
            for array in arrays if isinstance(arrays, tuple) else (arrays,):
                filled(array.bits, at)
        grant = pool.grant(SOME)
        with connection.map_blocks(grant.token) as m:
            assert m.block_ids == SOME
            for name, arrays in pool.arrays.items():
                for position, block in enumerate(SOME):
                    mine = m.block(name, position)
                    if kv == "split":
                        key, value = mine
                        axis = more.get("kv_axis")
                        keys, values = arrays if axis is None else np.moveaxis(arrays.bits, axis, 0)
                        if axis is None:
                            keys, values = keys.bits, values.bits
                        assert same(key, keys[block])
                        assert same(value, values[block])
                    else:
                        assert same(mine, arrays.bits[block])
                        assert mine.shape == layout.block_shape()
                        assert (mine.dtype.kind == "u") == (layout.dtype in NO_NUMPY_DTYPE)
        grant.result(timeout=10)


def test_strides_are_the_owners(ends):
    """A registered view of allocated memory, its axes in another order, its blocks apart."""
    owner, connection = ends
    memory = np.frombuffer(owner.allocate(nbytes=BLOCKS * 2 * 1024), np.uint16).reshape(BLOCKS, 2, 512)
    view = filled(memory, 1)[:, 0, :480].reshape(BLOCKS, 5, 3, 32).transpose(0, 2, 1, 3)
    layout = BlockLayout(
        tokens_per_block=5, num_kv_heads=3, head_dim=32, dtype="uint16", order="HND", kv="single"
    )
    with owner.register([view], layout) as pool, connection.map_blocks(pool.grant(None).token) as m:
        assert list(m.block_ids) == list(range(BLOCKS))
        assert same(m.array(0), view)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("step", [1, 2], ids=["in one piece", "with gaps"])
def test_blocks_without_a_layout_are_bytes(ends, dtype, step):
    owner, connection = ends
    whole = np.frombuffer(owner.allocate(nbytes=BLOCKS * 4 * 64), dtype).reshape(BLOCKS, 4, -1)
    view = filled(whole, 2)[:, :, ::step]
    with owner.register(view) as pool, connection.map_blocks(pool.grant([5, 1]).token) as m:
        for position, block in enumerate([5, 1]):
            mine = m.block(0, position)
            assert mine.dtype == np.uint8
            assert mine.tobytes() == view[block].tobytes()
            assert mine.ndim == 1 or step == 2


def test_groups_have_ids_of_their_own(ends):
    owner, connection = ends
    a = filled(np.frombuffer(owner.allocate(nbytes=4 * 64), np.uint8).reshape(4, 64), 3)
    b = filled(np.frombuffer(owner.allocate(nbytes=8 * 32), np.uint8).reshape(8, 32), 4)
    groups = [LayerGroup(["full"], name="one"), LayerGroup(["window"], name="two")]
    with owner.register({"full": a, "window": b}, groups=groups) as pool:
        grant = pool.grant({"one": [3], "two": [7, 0]})
        with connection.map_blocks(grant.token) as m:
            assert m.layer_names == ("full", "window")
            assert m.block_ids == {"one": [3], "two": [7, 0]}
            assert same(m.block("full", 0), a[3])
            assert [same(x, b[i]) for x, i in zip(m.blocks("window"), [7, 0], strict=True)] == [True, True]
            with pytest.raises(IndexError):
                m.block("full", 1)
