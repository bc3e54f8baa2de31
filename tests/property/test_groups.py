"""Pools of several groups and pools of our own memory, over every way: against numpy's own indexing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvtransport as kvt
from tests.property.loopback import LIMIT_S, LINKS

WORDS = 40  # of a block: not a power of two


def layers_of(rng, blocks_of, *, zeroed):
    """Return {layer: [block, word]} and the pool's groups; group g has layers g0 and g1."""
    arrays, groups = {}, []
    for g, blocks in enumerate(blocks_of):
        names = [f"{g}-{i}" for i in range(2)]
        for name in names:
            filled = rng.integers(1, 1 << 30, (blocks, WORDS), np.int64)
            arrays[name] = np.zeros_like(filled) if zeroed else filled
        groups.append(kvt.LayerGroup(names, name=f"g{g}"))
    return arrays, groups


@given(st.data(), st.sampled_from(LINKS))
def test_each_group_has_ids_of_its_own(pair, data, link):
    made = pair(link)
    count = data.draw(st.integers(1, 3), "groups")
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30), "seed"))
    source, groups = layers_of(rng, [int(n) for n in rng.integers(3, 9, count)], zeroed=False)
    target, _ = layers_of(rng, [int(n) for n in rng.integers(3, 9, count)], zeroed=True)
    if count > 1 and data.draw(st.booleans(), "alias"):  # the second group lies where the first does
        source["1-0"], source["1-1"] = source["0-0"], source["0-1"]
    here, there = (made.ours.register(source, groups=groups), made.theirs.register(target, groups=groups))
    ids, landed = {}, {}
    for group in groups:
        first = group.names[0]
        moved = int(rng.integers(1, 1 + min(len(source[first]), len(target[first]))))
        ids[group.name] = rng.permutation(len(source[first]))[:moved]
        landed[group.name] = rng.permutation(len(target[first]))[:moved]
    receive = made.back.recv_blocks(there, landed if count > 1 else landed["g0"], key="groups")
    made.out.send_blocks(here, ids if count > 1 else ids["g0"], key="groups").result(LIMIT_S)
    receive.result(LIMIT_S)
    for group in groups:
        for name in group.names:
            expected = np.zeros_like(target[name])
            expected[landed[group.name]] = source[name][ids[group.name]]
            assert (target[name] == expected).all(), name
    here.close()
    there.close()


@pytest.mark.parametrize(
    ("ready", "expected"),
    [([0], {"g0": [3], "g1": [0, 5]}), ([0, 1], {"g0": [], "g1": [0, 5]}), ([2, 3], {"g0": [3], "g1": []})],
    ids=["a layer of a group", "the first group", "the second group"],
)
@pytest.mark.parametrize("link", LINKS, ids=str)
def test_an_error_names_blocks_by_group(pair, link, ready, expected):
    made = pair(link)
    rng = np.random.default_rng(1)
    source, groups = layers_of(rng, [4, 6], zeroed=False)
    target, _ = layers_of(rng, [4, 6], zeroed=True)
    here, there = (made.ours.register(source, groups=groups), made.theirs.register(target, groups=groups))
    gate = made.ours.layer_gate(4)
    receive = made.back.recv_blocks(there, {"g0": [3], "g1": [5, 0]}, key="cut")
    send = made.out.send_blocks(here, {"g0": [0], "g1": [1, 2]}, key="cut", after=gate)
    for layer in ready:
        gate.mark_ready(layer)
    for layer in ready:
        receive.wait_layer(layer, timeout=LIMIT_S)
    gate.fail("the producer has gone")
    with pytest.raises(kvt.TransferError):
        send.result(LIMIT_S)
    with pytest.raises(kvt.PeerAborted) as caught:
        receive.result(LIMIT_S)
    failed = caught.value.failed_block_ids
    assert {group: sorted(ids) for group, ids in failed.items()} == expected
    states = {group: set(ids.values()) for group, ids in caught.value.blocks.items()}
    assert states == {group: {"poisoned" if ids else "sealed"} for group, ids in expected.items()}
    if 0 in ready:
        assert (target["0-0"][3] == source["0-0"][0]).all()
    here.close()
    there.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_pools_of_our_own_memory_move(pair, dtype):
    made = pair()
    layout = kvt.BlockLayout(
        tokens_per_block=4, num_kv_heads=2, head_dim=8, dtype=dtype, order="NHD", kv="split"
    )
    here, there = made.ours.allocate(layout, 2, 6), made.theirs.allocate(layout, 2, 6)
    ours, theirs = (
        [torch.from_dlpack(part).view(torch.uint8) for parts in pool.arrays.values() for part in parts]
        for pool in (here, there)
    )
    for array in ours:
        array.copy_(torch.randint(0, 256, array.shape, dtype=torch.uint8))
    receive = made.back.recv_blocks(there, [5, 0, 2], key="own")
    made.out.send_blocks(here, [1, 3, 4], key="own").result(LIMIT_S)
    receive.result(LIMIT_S)
    for source, target in zip(ours, theirs, strict=True):
        assert torch.equal(target[[5, 0, 2]], source[[1, 3, 4]])
        assert not target[[1, 3, 4]].any()
    here.close()
    there.close()
