"""Checks of layers that are sent as they are released, and of the layers' arrival."""

from __future__ import annotations

import random
from functools import partial
from typing import Final

from kvtransport.errors import (
    LocalProtocolError,
    PeerAborted,
    TransferCancelled,
    TransferTimeout,
    WaitTimeout,
)
from kvtransport.testing.blocks import Blocks
from kvtransport.testing.check import check, raises, same, true
from kvtransport.testing.harness import Harness, Rig
from kvtransport.testing.side import Side

LAYERS: Final = 6
OF: Final = Blocks(10, 20_000, layers=LAYERS)
TO: Final = Blocks(12, 20_000, layers=LAYERS, gap=32, seed=2)
THERE: Final = (9, 3, 4, 0)
HERE: Final = (0, 11, 5, 6)


def gated(source: Side, destination: Side, key: str = "t") -> None:
    """Post both sides, all layers held back."""
    source.pool("of", OF)
    destination.pool("to", TO)
    source.gate("g", LAYERS)
    destination.recv(key, "to", HERE)
    source.send(key, "of", THERE, gate="g")


def let_go(source: Side, destination: Side) -> None:
    """Close the pools."""
    source.call("close_pool", name="of")
    destination.call("close_pool", name="to")


@check()
def gates_open_in_any_order(harness: Harness) -> None:
    """Each layer lands as it is released, before the next one is; no other byte does."""
    orders = [list(range(LAYERS)), list(range(LAYERS))[::-1], random.Random(1).sample(range(LAYERS), LAYERS)]
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            for order in orders:
                gated(source, destination)
                for at, layer in enumerate(order):
                    source.mark("g", layer)
                    source.mark("g", layer)
                    destination.wait_layer("t", layer)
                    destination.holds("to", TO.after(OF, HERE, THERE, order[: at + 1]))
                same(destination.result("t")["nbytes"], source.result("t")["nbytes"])
                let_go(source, destination)


@check()
def the_word_releases_layers(harness: Harness) -> None:
    """The progress word counts, alone and together with marks."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            gated(source, destination)
            source.mark("g", 4)
            destination.wait_layer("t", 4)
            for released in (1, 3):
                source.call("word", name="g", value=released)
                destination.wait_layer("t", released - 1)
                landed = {4, *range(released)}
                destination.wait_layer("t", min(landed))
                for layer in landed:
                    destination.wait_layer("t", layer)
                destination.holds("to", TO.after(OF, HERE, THERE, landed))
            true(not destination.done("t") and not source.done("t"), "it is over with layers held back")
            source.call("word", name="g", value=LAYERS)
            destination.result("t")
            source.result("t")
            destination.holds("to", TO.after(OF, HERE, THERE))
            let_go(source, destination)


@check()
def a_gate_that_is_open_already(harness: Harness) -> None:
    """Layers that were released before the post; some layers of the pool only."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            source.pool("of", OF)
            destination.pool("to", TO)
            source.gate("g", LAYERS)
            for layer in (5, 1):
                source.mark("g", layer)
            source.send("t", "of", THERE, gate="g", layers=[1, 5])
            destination.recv("t", "to", HERE, layers=[1, 5])
            destination.result("t")
            source.result("t")
            destination.holds("to", TO.after(OF, HERE, THERE, [1, 5]))
            let_go(source, destination)


@check()
def one_gate_for_many(harness: Harness) -> None:
    """Fifty transfers behind one gate."""
    of, to = Blocks(50, 3000, layers=3), Blocks(50, 3000, layers=3, gap=5, seed=2)
    names = [str(n) for n in range(50)]
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            source.pool("of", of)
            destination.pool("to", to)
            source.gate("g", 3)
            for n, name in enumerate(names):
                source.send(name, "of", [n], gate="g")
                destination.recv(name, "to", [49 - n])
            for at, layer in enumerate((2, 0, 1)):
                source.mark("g", layer)
                for name in names:
                    destination.wait_layer(name, layer)
                destination.holds("to", to.after(of, range(49, -1, -1), range(50), (2, 0, 1)[: at + 1]))
            destination.results(names)
            source.results(names)
            let_go(source, destination)


@check()
def a_gate_that_fails(harness: Harness) -> None:
    """The source gets TransferCancelled, the destination PeerAborted with the reason; what had landed is sealed."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            gated(source, destination)
            source.mark("g", 2)
            destination.wait_layer("t", 2)
            source.call("fail_gate", name="g", reason="the model fell over")
            ours, theirs = source.error("t"), destination.error("t")
            same((type(ours), type(theirs)), (TransferCancelled, PeerAborted), "errors")
            true("the model fell over" in theirs.reason, f"the reason is {theirs.reason!r}")
            true(theirs.quiesced, "the destination isn't quiescent")
            same(sorted(theirs.failed_block_ids), sorted(HERE), "failed blocks")
            destination.wait_layer("t", 2)
            raises(PeerAborted, partial(destination.wait_layer, "t", 3))
            destination.holds("to", TO.after(OF, HERE, THERE, [2]))
            let_go(source, destination)


@check()
def a_gate_of_other_layers_is_refused(harness: Harness) -> None:
    """A gate has as many layers as the pool."""
    with harness.rig() as rig:
        rig.here.pool("of", OF)
        rig.here.gate("g", LAYERS - 1)
        raises(LocalProtocolError, lambda: rig.here.send("t", "of", [0], gate="g"))


@check()
def a_gate_that_stays_shut_times_out(harness: Harness) -> None:
    """The source's match limit bounds it; it says what it waited for."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            source.pool("of", OF)
            destination.pool("to", TO)
            source.gate("g", LAYERS)
            destination.recv("t", "to", HERE)
            source.send("t", "of", THERE, gate="g", match_timeout_s=0.3)
            error = source.error("t")
            same((type(error), error.waiting_for), (TransferTimeout, "gate"), "error")
            same(type(destination.error("t")), PeerAborted, "the destination's error")
            destination.holds("to", TO.memory())
            let_go(source, destination)


@check()
def stopping_to_wait_ends_nothing(harness: Harness) -> None:
    """WaitTimeout of result and wait_layer leaves the transfer running."""
    with harness.rig() as rig:
        _stop_waiting(rig)


def _stop_waiting(rig: Rig) -> None:
    gated(rig.peer, rig.here)
    transfer = rig.here.actor.handles["t"]
    waited = raises(WaitTimeout, lambda: transfer.result(timeout=0.05))
    same(getattr(waited, "quiesced", None), False, "quiesced")
    raises(WaitTimeout, lambda: transfer.result(timeout=0))
    raises(WaitTimeout, lambda: rig.here.actor._transfer("t").wait_layer(0, timeout=0.05))
    true(not transfer.done(), "it is over")
    rig.peer.call("word", name="g", value=LAYERS)
    rig.here.result("t")
    rig.here.holds("to", TO.after(OF, HERE, THERE))
