"""Checks of one-sided transfers: the right bytes, in the right places and nowhere else, by a token alone.

Every one compares the destination's whole memory, the guards around and between the blocks included.
"""

from __future__ import annotations

import random
import time
from itertools import product
from typing import Any, Final

from kvtransport.grant import new_token
from kvtransport.testing.actor import axes
from kvtransport.testing.blocks import Blocks, Bytes
from kvtransport.testing.check import check, same, true
from kvtransport.testing.checks_bytes import SIZES
from kvtransport.testing.checks_gates import HERE, LAYERS, OF, THERE, TO, let_go
from kvtransport.testing.harness import Harness, Rig
from kvtransport.testing.side import ProcessSide, Side

WAYS: Final = ("read", "write")
WAIT_S: Final = 20


def move(
    source: Side, destination: Side, of: Blocks, to: Blocks, there: list[int], here: list[int], *, way: str
) -> None:
    """Move blocks once, by a read or by a write; look at both handles and all of the destination's memory."""
    source.pool("of", of)
    destination.pool("to", to)
    owner, user = (source, destination) if way == "read" else (destination, source)
    if way == "read":
        user.read("t", owner.grant("g", "of", there), "to", here)
    else:
        user.write("t", owner.grant("g", "to", here, mode="write"), "of", there)
    result, granted = user.result("t"), owner.result("g")
    nbytes = of.nbytes * of.layers * len(there)
    same((result["nbytes"], result["blocks"]), (nbytes, len(there)), "nbytes, blocks")
    same((user.state("t"), user.progress("t")), ("done", (nbytes, nbytes)), "state, progress")
    if way == "read":
        same((owner.state("g"), granted), ("read", {}), "the grant")
    else:
        same((owner.state("g"), granted["nbytes"]), ("written", nbytes), "the grant")
    destination.holds("to", to.after(of, here, there))
    source.holds("of", of.memory())
    let_go(source, destination)


@check()
def every_size_by_token(harness: Harness) -> None:
    """One block of each size, both ways, by read and by write."""
    with harness.rig() as rig:
        for (source, destination), way in product(rig.both_ways(), WAYS):
            for nbytes in SIZES:
                move(source, destination, Blocks(1, nbytes), Blocks(1, nbytes, seed=2), [0], [0], way=way)


@check()
def scattered_and_repeated_by_token(harness: Harness) -> None:
    """Runs that merge on one side, on both, on neither; a source block that goes to several places; no block."""
    of, to = Blocks(64, 3001, layers=2), Blocks(64, 3001, layers=2, gap=7, seed=2)
    shuffled = random.Random(1).sample(range(64), 64)
    with harness.rig() as rig:
        for (source, destination), way in product(rig.both_ways(), WAYS):
            for there, here in (
                (list(range(64)), list(range(64))),
                (shuffled, list(range(64))),
                (list(range(64)), shuffled),
                ([5] * 20, list(range(10, 30))),
                ([], []),
            ):
                move(source, destination, of, to, there, here, way=way)


@check()
def chunks_and_lanes_by_token(harness: Harness) -> None:
    """With one lane and four, chunks of 64 bytes to 256 KiB."""
    for lanes, chunk_nbytes in ((1, 64), (4, 1000), (4, 256 << 10)):
        with harness.rig(lanes=lanes, chunk_nbytes=chunk_nbytes) as rig:
            nbytes = min(chunk_nbytes * 5 + 1, 400_000)
            of, to = Blocks(7, nbytes, layers=2), Blocks(7, nbytes, layers=2, gap=1, seed=2)
            for (source, destination), way in product(rig.both_ways(), WAYS):
                move(source, destination, of, to, [6, 2, 4, 0], [3, 1, 0, 6], way=way)


def _pools(source: Side, destination: Side) -> None:
    source.pool("of", OF)
    destination.pool("to", TO)


@check()
def a_subset_of_the_grant(harness: Harness) -> None:
    """Positions in the grant's ids, in any order, repeated; the rest of the destination is untouched."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            for subset in ([2, 0], [3], [1, 1, 1], []):
                _pools(source, destination)
                token, here = source.grant("g", "of", THERE), list(HERE[: len(subset)])
                destination.read("t", token, "to", here, subset=subset)
                destination.result("t")
                same(source.result("g"), {}, "the grant's result")
                destination.holds("to", TO.after(OF, here, [THERE[at] for at in subset]))
                let_go(source, destination)
            _pools(source, destination)
            token = destination.grant("g", "to", HERE, mode="write")
            source.write("t", token, "of", THERE[:2], subset=[3, 1], meta=b"two")
            source.result("t")
            same(destination.result("g")["meta"], b"two".hex(), "meta")
            destination.holds("to", TO.after(OF, [HERE[3], HERE[1]], THERE[:2]))
            let_go(source, destination)


@check()
def layers_by_token(harness: Harness) -> None:
    """Some layers of both pools, that pair by place."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            _pools(source, destination)
            destination.read("t", source.grant("g", "of", THERE), "to", HERE, layers=[4, 1])
            same(destination.result("t")["nbytes"], 2 * len(HERE) * OF.nbytes, "nbytes")
            landed = TO.after(OF, HERE, THERE, [1, 4])
            destination.holds("to", landed)
            token = destination.grant("g", "to", HERE, mode="write")
            source.write("t", token, "of", THERE[::-1], layers=[5, 0])
            source.result("t")
            destination.holds("to", TO.after(OF, HERE, THERE[::-1], [0, 5], landed))
            let_go(source, destination)


@check()
def groups_by_token(harness: Harness) -> None:
    """Ids, subsets and numbers of blocks for each group; layers pair by name."""
    of, to = Blocks(9, 5000, layers=4), Blocks(7, 5000, layers=4, gap=3, seed=2)
    groups = {"full": [0, 2], "window": [1, 3]}
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            source.pool("of", of, groups=groups)
            destination.pool("to", to, groups=groups)
            token = source.grant("g", "of", {"full": [8, 1, 3], "window": [0]}, readers=None)
            destination.read("all", token, "to", {"full": [0, 1, 2], "window": [6]})
            destination.result("all")
            landed = to.after(of, [0, 1, 2], [8, 1, 3], [0, 2])
            destination.holds("to", to.after(of, [6], [0], [1, 3], landed))
            subset = {"full": [2], "window": [0]}
            destination.read("some", token, "to", {"full": [5], "window": [2]}, subset=subset)
            destination.result("some")
            to.after(of, [5], [3], [0, 2], landed)
            destination.holds("to", to.after(of, [2], [0], [1, 3], landed))
            destination.read("one", token, "to", {"full": [6, 4, 3]}, layers=["2"])
            destination.result("one")
            destination.holds("to", to.after(of, [6, 4, 3], [8, 1, 3], [2], landed))
            source.revoke("g")
            let_go(source, destination)


def _heads(blocks: Blocks, memory: list[Bytes], form: dict[str, Any], layer: int) -> Any:
    """Return one layer as [block, head, token, byte]."""
    view = blocks.views(memory)[layer].reshape(blocks.count, *axes(blocks, form))
    return view if form["order"] == "HND" else view.swapaxes(1, 2)


def _form(order: str, heads: int) -> dict[str, Any]:
    return {"order": order, "num_kv_heads": heads, "tokens_per_block": 4}


@check()
def one_rank_is_read_by_two(harness: Harness) -> None:
    """Tensor parallelism 1 to 2: each rank reads its heads of the same grant."""
    of, to = Blocks(6, 4 * 4 * 96, layers=2), Blocks(6, 2 * 4 * 96, layers=2, gap=16, seed=2)
    there, here = [5, 0, 3], [1, 2, 4]
    with harness.rig() as rig:
        for (source, destination), order in product(rig.both_ways(), ("HND", "NHD")):
            source.pool("of", of, form=_form(order, 4))
            token = source.grant("g", "of", there, readers=None)
            for rank in (0, 1):
                destination.pool(f"to{rank}", to, form=_form(order, 2))
                heads = [2 * rank, 2 * rank + 2]
                destination.read(f"t{rank}", token, f"to{rank}", here, src_heads=heads)
            for rank in (0, 1):
                destination.result(f"t{rank}")
                expected, sent = to.memory(), of.memory()
                for layer in range(2):
                    mine = _heads(of, sent, _form(order, 4), layer)[there, 2 * rank : 2 * rank + 2]
                    _heads(to, expected, _form(order, 2), layer)[here] = mine
                destination.holds(f"to{rank}", expected)
                destination.call("close_pool", name=f"to{rank}")
            source.call("close_pool", name="of")


@check()
def two_ranks_fill_one_block(harness: Harness) -> None:
    """Tensor parallelism 2 to 1: by two reads at once, and by two writers at once."""
    with harness.rig() as rig:
        for pair, order, way in product(rig.both_ways(), ("HND", "NHD"), WAYS):
            _fill(*pair, order, way)


def _fill(source: Side, destination: Side, order: str, way: str) -> None:
    ranks = [Blocks(6, 2 * 4 * 4096, layers=2, seed=seed) for seed in (1, 3)]
    to = Blocks(6, 4 * 4 * 4096, layers=2, gap=16, seed=2)
    there, here = [5, 0, 3], [1, 2, 4]
    destination.pool("to", to, form=_form(order, 4))
    token = destination.grant("g", "to", here, mode="write", readers=None) if way == "write" else ""
    for rank, of in enumerate(ranks):
        source.pool(f"of{rank}", of, form=_form(order, 2))
        heads = [2 * rank, 2 * rank + 2]
        if way == "write":
            source.write(f"t{rank}", token, f"of{rank}", there, dst_heads=heads)
        else:
            mine = source.grant(f"g{rank}", f"of{rank}", there)
            destination.read(f"t{rank}", mine, "to", here, heads=heads)
    expected = to.memory()
    for rank, of in enumerate(ranks):
        (source if way == "write" else destination).result(f"t{rank}")
        for layer in range(2):
            sent = _heads(of, of.memory(), _form(order, 2), layer)[there]
            _heads(to, expected, _form(order, 4), layer)[here, 2 * rank : 2 * rank + 2] = sent
    destination.holds("to", expected)
    for rank in range(2):
        source.call("close_pool", name=f"of{rank}")
    destination.call("close_pool", name="to")


@check()
def gated_writes(harness: Harness) -> None:
    """Each layer lands as it is released; the owner's handle ends when the last one has."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            _pools(source, destination)
            source.gate("g", LAYERS)
            token = destination.grant("grant", "to", HERE, mode="write")
            source.write("t", token, "of", THERE, gate="g")
            for layer in random.Random(1).sample(range(LAYERS - 1), LAYERS - 1):
                source.mark("g", layer)
            source.matched("t")
            true(not source.done("t") and not destination.done("grant"), "it is over with a layer held back")
            same(destination.state("grant"), "open", "the grant")
            source.mark("g", LAYERS - 1)
            source.result("t")
            destination.result("grant")
            destination.holds("to", TO.after(OF, HERE, THERE))
            let_go(source, destination)


@check()
def the_grant_comes_later(harness: Harness) -> None:
    """A read, a write and a lease wait for the grant that their token will name."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            _pools(source, destination)
            read, written, held = new_token(), new_token(), new_token()
            destination.read("r", read, "to", HERE[:2], wait_grant_s=WAIT_S)
            source.write("w", written, "of", THERE[2:], wait_grant_s=WAIT_S)
            destination.hold("h", held, wait_grant_s=WAIT_S)
            true(not (destination.done("r") or source.done("w") or destination.done("h")), "nobody waits")
            source.grant("gh", "of", THERE, token=held)
            destination.held("h")
            same(source.grant("gr", "of", THERE[:2], token=read), read, "token")
            destination.result("r")
            destination.grant("gw", "to", HERE[2:], token=written, mode="write")
            source.result("w")
            destination.holds("to", TO.after(OF, HERE, THERE))
            destination.release("h")
            destination.result("h")
            same([source.result(g) for g in ("gr", "gh")], [{}, {}], "the grants' results")
            let_go(source, destination)


@check()
def the_grant_comes_at_once(harness: Harness) -> None:
    """The read and its grant, made at the same moment: none is missed, whichever is first."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            _pools(source, destination)
            names = [f"{n}" for n in range(200)]
            for name in names:
                token = new_token()
                destination.read(f"r{name}", token, "to", [0], wait_grant_s=WAIT_S, layers=[0])
                source.grant(f"g{name}", "of", [1], token=token)
                destination.result(f"r{name}")
            destination.holds("to", TO.after(OF, [0], [1], [0]))
            let_go(source, destination)


@check()
def the_owner_keeps_the_interpreter(harness: Harness) -> None:
    """Reads go on while the owner's Python does nothing else for a second and lets nobody in."""
    with harness.rig() as rig:
        _pools(rig.peer, rig.here)
        token = rig.peer.grant("g", "of", THERE, readers=None)
        seconds = 0.5
        while not _read_meanwhile(rig, token, seconds):
            seconds *= 2
            true(seconds < WAIT_S, "no read was over before the owner gave the interpreter back")
        rig.here.holds("to", TO.after(OF, HERE, THERE))


def _read_meanwhile(rig: Rig, token: str, seconds: float) -> bool:
    """Return whether reads were over in that time: a busy machine may need more of it."""
    if not isinstance(rig.peer, ProcessSide):
        rig.here.read("t", token, "to", HERE)
        rig.peer.call("keep_the_interpreter", seconds=seconds)  # of both sides
        return rig.here.done("t")
    rig.peer.ask("keep_the_interpreter", seconds=seconds)
    began = time.monotonic()
    while time.monotonic() < began + seconds / 2:  # in the beginning it may not have heard of it
        rig.here.read("t", token, "to", HERE)
        rig.here.result("t")
    over = not rig.peer.answered()
    rig.peer.answer("keep_the_interpreter")
    return over
