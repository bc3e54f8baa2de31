"""Checks that the right bytes arrive, in the right places and nowhere else.

Every one compares the destination's whole memory, the guards around and between the blocks included.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Final

from kvtransport.testing.blocks import Blocks
from kvtransport.testing.check import check, same
from kvtransport.testing.harness import Harness, Rig
from kvtransport.testing.side import Side

KIB: Final = 1 << 10
MIB: Final = 1 << 20

SIZES: Final = (
    *(1, 2, 63, 64, 65, 4095, 4096, 4097),
    *(16 * KIB - 1, 16 * KIB, 16 * KIB + 1),
    *(256 * KIB - 1, 256 * KIB, 256 * KIB + 1),
    *(512 * KIB - 1, 512 * KIB, 512 * KIB + 1),
    *(MIB - 1, MIB, MIB + 1),
    *(4 * MIB - 1, 4 * MIB, 4 * MIB + 1),
)
"""Bytes of a transfer, around every boundary: inline or by chunks, chunks short or long, one chunk or several."""


def move(
    rig: Rig,
    source: Side,
    destination: Side,
    of: Blocks,
    to: Blocks,
    there: list[int],
    here: list[int],
    *,
    receive_first: bool = True,
) -> None:
    """Move blocks once; look at both results and all of the destination's memory."""
    source.pool("of", of)
    destination.pool("to", to)
    posts: list[Callable[[], None]] = [
        lambda: destination.recv("t", "to", here),
        lambda: source.send("t", "of", there),
    ]
    for post in posts if receive_first else posts[::-1]:
        post()
    got, sent = destination.result("t"), source.result("t")
    for result in (got, sent):
        same(result["nbytes"], of.nbytes * of.layers * len(there), "nbytes")
        same(result["blocks"], len(there), "blocks")
        same(result["backend"], rig.backend, "backend")
        same(result["resumed_nbytes"], 0, "resumed_nbytes")
        same(bool(result["chunks"]), bool(result["nbytes"]), "whether there were chunks")
        same(result["wire_s"] > 0, bool(result["nbytes"]), "whether bytes took time")
        same(
            round(result["queued_s"] + result["wire_s"] - result["seconds"], 6), 0.0, "time not accounted for"
        )
    same(sent["chunks"], got["chunks"], "chunks")
    same(destination.progress("t"), (got["nbytes"], got["nbytes"]), "progress at the destination")
    same((destination.state("t"), source.state("t")), ("done", "done"), "states")
    destination.holds("to", to.after(of, here, there))
    source.holds("of", of.memory())
    source.call("close_pool", name="of")
    destination.call("close_pool", name="to")


@check()
def every_size_in_one_block(harness: Harness) -> None:
    """One block of each size, both ways."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            for nbytes in SIZES:
                move(rig, source, destination, Blocks(1, nbytes), Blocks(1, nbytes, seed=2), [0], [0])


@check()
def every_size_in_odd_blocks(harness: Harness) -> None:
    """Transfers around each boundary, of scattered blocks that no boundary divides."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            for size in (16 * KIB, 256 * KIB, MIB, 4 * MIB):
                for count in (size // 4099, size // 4099 + 1):
                    ids = list(range(count))
                    random.Random(size + count).shuffle(ids)
                    of, to = Blocks(count, 4099, gap=1), Blocks(count, 4099, gap=13, seed=2)
                    move(rig, source, destination, of, to, ids, ids[::-1])


@check()
def no_blocks(harness: Harness) -> None:
    """No ids: both sides succeed with 0 bytes."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            move(rig, source, destination, Blocks(4, 100), Blocks(4, 100, seed=2), [], [])


@check()
def blocks_of_one_byte(harness: Harness) -> None:
    """The smallest pieces, adjacent and scattered, over several layers."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            of, to = Blocks(500, 1, layers=3), Blocks(700, 1, layers=3, gap=1, seed=2)
            move(rig, source, destination, of, to, list(range(500)), list(range(100, 600)))
            move(rig, source, destination, of, to, list(range(0, 500, 5)), list(range(699, 599, -1)))


@check()
def adjacent_scattered_and_repeated(harness: Harness) -> None:
    """Runs that merge on one side, on both and on neither; a source block that goes to several places."""
    with harness.rig() as rig:
        of, to = Blocks(64, 3000, layers=2), Blocks(64, 3000, layers=2, gap=7, seed=2)
        packed = replace(to, gap=0)
        shuffled = random.Random(1).sample(range(64), 64)
        for source, destination in rig.both_ways():
            for there, here in (
                (list(range(64)), list(range(64))),
                (list(range(64)), shuffled),
                (shuffled, list(range(64))),
                (shuffled, shuffled),
                (list(range(0, 64, 2)), list(range(32))),
                ([5] * 20, list(range(10, 30))),
                ([63], [0]),
            ):
                move(rig, source, destination, of, to, there, here)
                move(rig, source, destination, of, packed, there, here)


@check()
def strides_differ(harness: Harness) -> None:
    """Each side's blocks as far apart as it likes."""
    with harness.rig() as rig:
        ids = random.Random(2).sample(range(40), 40)
        for source, destination in rig.both_ways():
            for gaps in ((0, 1), (1, 0), (5000, 3), (64, 64)):
                of, to = (Blocks(40, 10_007, layers=3, gap=gap, seed=gap) for gap in gaps)
                move(rig, source, destination, of, replace(to, seed=9), list(range(40)), ids)


@check()
def either_side_first(harness: Harness) -> None:
    """The receive before the send, and the send before the receive."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            for receive_first in (True, False):
                for nbytes in (100, 16 * KIB, 700_000):
                    of, to = Blocks(3, nbytes), Blocks(5, nbytes, gap=8, seed=2)
                    ids = [4, 0, 2]
                    move(rig, source, destination, of, to, [0, 1, 2], ids, receive_first=receive_first)


@check()
def layers_are_chosen(harness: Harness) -> None:
    """Some layers, other ones on the two sides, in the order given."""
    of, to = Blocks(8, 5000, layers=6), Blocks(8, 5000, layers=4, gap=16, seed=2)
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            source.pool("of", of)
            destination.pool("to", to)
            destination.recv("t", "to", [1, 6], layers=[0, 3])
            source.send("t", "of", [3, 2], layers=[5, 1])
            same(destination.result("t")["nbytes"], 20_000)
            source.result("t")
            expected, sent = to.memory(), of.views(of.memory())
            views = to.views(expected)
            for layer, theirs in ((0, 5), (3, 1)):
                views[layer][[1, 6]] = sent[theirs][[3, 2]]
            destination.holds("to", expected)
            source.call("close_pool", name="of")
            destination.call("close_pool", name="to")


@check()
def hundreds_interleaved(harness: Harness) -> None:
    """300 transfers at once, of all lengths, both ways, posted in different orders."""
    with harness.rig() as rig:
        keys = [f"{n}" for n in range(300)]
        lengths = {key: random.Random(key).choice((0, 1, 1, 2, 3, 7, 40)) for key in keys}
        total = sum(lengths.values())
        of, to = Blocks(total, 9001, layers=2), Blocks(total, 9001, layers=2, gap=3, seed=2)
        sides = rig.both_ways()
        places = random.Random(3).sample(range(total), total)
        there: dict[str, list[int]] = {}
        here: dict[str, list[int]] = {}
        for key in keys:
            first = sum(map(len, there.values()))
            there[key] = list(range(first, first + lengths[key]))
            here[key] = places[first : first + lengths[key]]
        for source, destination in sides:
            source.pool("of", of)
            destination.pool("to", to)
        posts = [(kind, way, key) for kind in ("send", "recv") for way in (0, 1) for key in keys]
        random.Random(4).shuffle(posts)
        for kind, way, key in posts:
            source, destination = sides[way]
            if kind == "send":
                source.send(f"send {key}", "of", there[key], key=key)
            else:
                destination.recv(f"recv {key}", "to", here[key], key=key)
        expected = to.after(of, chain.from_iterable(here.values()), chain.from_iterable(there.values()))
        for source, destination in sides:
            destination.results(f"recv {key}" for key in keys)
            source.results(f"send {key}" for key in keys)
            destination.holds("to", expected)
            source.holds("of", of.memory())


@check()
def both_send_at_once(harness: Harness) -> None:
    """Long transfers in both directions at the same time, more than all buffers hold."""
    of, to = Blocks(64, MIB // 2), Blocks(64, MIB // 2, gap=64, seed=2)
    ids = random.Random(5).sample(range(64), 64)
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            source.pool("of", of)
            destination.pool("to", to)
        for source, destination in rig.both_ways():
            destination.recv("in", "to", ids, key="long")
            source.send("out", "of", range(64), key="long")
        for source, destination in rig.both_ways():
            destination.result("in")
            source.result("out")
            destination.holds("to", to.after(of, ids, range(64)))


@check()
def chunks_and_lanes(harness: Harness) -> None:
    """The same bytes with one lane and four, and chunks of 64 bytes to 1 MiB."""
    for lanes, chunk_nbytes in ((1, 64), (4, 1000), (3, 4096), (1, MIB), (4, 256 * KIB)):
        with harness.rig(lanes=lanes, chunk_nbytes=chunk_nbytes) as rig:
            nbytes = min(chunk_nbytes * 5 + 1, 400_000)
            of, to = Blocks(7, nbytes, layers=2), Blocks(7, nbytes, layers=2, gap=1, seed=2)
            for source, destination in rig.both_ways():
                move(rig, source, destination, of, to, [6, 2, 4, 0], [3, 1, 0, 6])
