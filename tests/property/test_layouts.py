"""Any layout, permutation, subset, way, protection, chunk size and number of lanes: exactly the right bytes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.property.loopback import LIMIT_S, LINKS, Form, sized

keys = itertools.count()
quick = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)


@st.composite
def two_sides(draw: st.DrawFn) -> tuple[Form, Form]:
    kv = draw(st.sampled_from(["packed", "single", "pair", "axis0", "axis1"]))
    ours = Form(
        kv=kv,
        order=draw(st.sampled_from(["HND", "NHD"])),
        tokens=draw(st.sampled_from([1, 2, 5, 16])),
        heads=draw(st.integers(1, 6)),
        dim=draw(st.sampled_from([1, 3, 8, 64])),
        v_dim=0,
        dtype=draw(st.sampled_from(["uint8", "float16", "int32", "int64"])),
        blocks=draw(st.integers(1, 20)),
        pad=draw(st.sampled_from([0, 0, 1, 7])),
    )
    ours = replace(ours, v_dim=draw(st.sampled_from([ours.dim, 5])) if kv in ("packed", "pair") else ours.dim)
    theirs = replace(
        ours,
        kv=draw(st.sampled_from(["pair", "axis0", "axis1"])) if "axis" in kv else kv,
        heads=draw(st.integers(1, 6)),
        blocks=draw(st.integers(1, 20)),
        pad=draw(st.sampled_from([0, 0, 1, 7])),
    )
    return ours, theirs


@pytest.mark.parametrize("link", LINKS, ids=str)
@quick
@given(data=st.data(), sides=two_sides())
def test_every_layout_and_subset(pair, link, data, sides) -> None:
    ends = pair(data.draw(sized(link, lanes=[1, 2, 3], chunks=[64, 1000, 65536]), "link"))
    source, destination = sides
    counts = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)), "layers of the pools")
    n = data.draw(st.integers(1, min(counts)), "layers moved")
    named = [data.draw(st.permutations(range(c)), "layers")[:n] for c in counts]
    heads = data.draw(st.integers(1, min(source.heads, destination.heads)), "heads moved")
    first = [data.draw(st.integers(0, s.heads - heads), "first head") for s in sides]
    here = data.draw(st.lists(st.integers(0, destination.blocks - 1), unique=True), "destination's blocks")
    ids = st.integers(0, source.blocks - 1)
    there = data.draw(st.lists(ids, min_size=len(here), max_size=len(here)), "source's blocks")
    event(f"{source.kv} to {destination.kv}")

    of, of_parts, _ = source.tensors(counts[0], 1)
    to, _, bare = destination.tensors(counts[1], 2)
    _, got_parts, expected = destination.tensors(counts[1], 2)  # a twin, for what must come out
    for i, j in zip(*named, strict=True):
        for mine, yours in zip(of_parts[i], got_parts[j], strict=True):
            yours[here, first[1] : first[1] + heads] = mine[there, first[0] : first[0] + heads]

    with (
        ends.ours.register(of, source.layout()) as ours,
        ends.theirs.register(to, destination.layout()) as theirs,
    ):
        key = f"layout {next(keys)}"
        slices = [slice(f, f + heads) for f in first]
        posts = [
            lambda: ends.out.send_blocks(
                ours, there, key=key, layers=named[0], heads=slices[0], timeout_s=LIMIT_S
            ),
            lambda: ends.back.recv_blocks(
                theirs, here, key=key, layers=named[1], heads=slices[1], timeout_s=LIMIT_S
            ),
        ]
        order = data.draw(st.permutations((0, 1)), "order")
        handles = {i: posts[i]() for i in order}
        handles[1].result(LIMIT_S)
        handles[0].result(LIMIT_S)
    for is_, must in zip(bare, expected, strict=True):
        assert np.array_equal(is_.view(np.uint8), must.view(np.uint8))
