"""What can't be told to a peer is no pool: ValueError when it is made, never a connection that is lost later."""

import numpy as np
import pytest

from kvtransport import BlockLayout, Config, Endpoint, LayerGroup

LIMIT_S = 20
LAYOUT = BlockLayout(tokens_per_block=2, num_kv_heads=1, head_dim=8, dtype="float16")


@pytest.fixture
def endpoint():
    with Endpoint(Config(backends=("tcp",))) as made:
        yield made


def layer():
    return np.zeros((4, 64), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "fault"),
    [("x" * 256, "256 bytes"), ("\u20ac" * 100, "300 bytes"), ("x" * 70_000, "70000 bytes")],
    ids=["ascii", "utf8", "beyond a text"],
)
def test_names_that_are_too_long(endpoint, name, fault):
    tensors = {name: layer(), "y": layer()}
    with pytest.raises(ValueError, match=f"layer '.*{fault}"):
        endpoint.register(tensors)
    with pytest.raises(ValueError, match=f"layer '.*{fault}"):
        endpoint.allocate(LAYOUT, 1, 4, layer_names=[name])
    with pytest.raises(ValueError, match=f"name has {fault}"):
        endpoint.register([layer()], name=name)
    with pytest.raises(ValueError, match=f"name has {fault}"):
        endpoint.allocate(LAYOUT, 1, 4, name=name)
    with pytest.raises(ValueError, match=f"group '.*{fault}"):
        endpoint.register({"y": layer()}, groups=[LayerGroup(["y"], name=name)])


def test_too_many_layers_or_groups(endpoint):
    names = [f"layer.{i}" for i in range(1025)]
    with pytest.raises(ValueError, match="1025"):
        endpoint.register({name: layer() for name in names})
    with pytest.raises(ValueError, match="1025 groups"):
        endpoint.register({name: layer() for name in names}, groups=[LayerGroup([name]) for name in names])
    with pytest.raises(ValueError, match="num_layers is 1000000000, the most is 1024"):
        endpoint.allocate(LAYOUT, 1_000_000_000, 4)
    with pytest.raises(ValueError, match="1025"):
        endpoint.allocate(LAYOUT, None, 4, layer_names=names)


def test_the_largest_pool_there_is():
    """1,024 layers, each a group of its own, all names as long as they may be: it is told, and moves."""
    names = [f"{i:04}{'n' * 251}" for i in range(1024)]
    groups = [LayerGroup([name], LAYOUT, name=name) for name in names]
    shape = (2, 1, 2, 16)  # blocks, heads, tokens, K and V
    with Endpoint(Config(backends=("tcp",))) as ours, Endpoint(Config(backends=("tcp",))) as theirs:
        there = ours.connect(theirs.listen("127.0.0.1:0"), timeout=LIMIT_S)
        here = theirs.accept(LIMIT_S)
        own = ours.register(
            {name: np.full(shape, 3, np.float16) for name in names}, groups=groups, name="p" * 255
        )
        arrays = {name: np.zeros(shape, np.float16) for name in names}
        other = theirs.register(arrays, groups=groups, name="p" * 255)
        ids = {name: [1] for name in names}
        received = here.recv_blocks(other, ids, key="k")
        there.send_blocks(own, ids, key="k", meta=b"m" * 4096).result(LIMIT_S)
        assert received.result(LIMIT_S).nbytes == 1024 * 64
        assert all((array[1] == 3).all() and not array[0].any() for array in arrays.values())
        assert there.state == here.state == "open"


def test_errors_about_arrays_name_layers_as_the_pool_does(endpoint):
    """Also where the user gave no names."""
    overlaps = np.lib.stride_tricks.as_strided(layer().reshape(-1), (4, 4, 4), (16, 2, 1), writeable=False)
    assert endpoint.register([layer(), layer()]).layer_names == ("layer0", "layer1")
    for wrong in (overlaps, np.zeros((4,) + (1,) * 20, np.uint8)):
        with pytest.raises(ValueError, match=r"^layer 'layer1': "):
            endpoint.register([layer(), wrong])
