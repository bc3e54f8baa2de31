"""Checks of every end other than success: cancelled, closed, killed, refused, out of time.

Each looks at both sides' errors, at the blocks' states, at the destination's bytes, and moves the same blocks by
the same key afterwards where there is still a connection.
"""

from __future__ import annotations

import time
from typing import Any, Final

from kvtransport.errors import (
    ConnectionClosed,
    KVTransportError,
    PeerAborted,
    PeerLost,
    TransferCancelled,
    TransferTimeout,
)
from kvtransport.testing.blocks import Blocks
from kvtransport.testing.check import check, raises, same, true
from kvtransport.testing.checks_gates import HERE, LAYERS, OF, THERE, TO, gated, let_go
from kvtransport.testing.harness import Harness, Rig
from kvtransport.testing.side import Side

KNOWN_WITHIN_S: Final = 0.5
"""A peer's death on one host is known in 50 ms; the rest is for a busy machine."""


def again(source: Side, destination: Side, landed: tuple[int, ...] = ()) -> None:
    """The destination holds these layers, no other byte; and the same key works for the same blocks."""
    destination.holds("to", TO.after(OF, HERE, THERE, landed))
    destination.recv("again", "to", HERE, key="t")
    source.send("again", "of", THERE, key="t")
    destination.result("again")
    source.result("again")
    destination.holds("to", TO.after(OF, HERE, THERE))
    let_go(source, destination)


def states_of(error: KVTransportError) -> dict[int, str]:
    """Return the destination's block states of a pool of one group."""
    return {at: state for states in error.blocks.values() for at, state in states.items()}


def poisoned(error: Any) -> None:
    """No block is whole, and nothing moves any more."""
    same(states_of(error), dict.fromkeys(HERE, "poisoned"), "block states")
    same(error.quiesced, True, "quiesced")
    same(error.key, "t", "key")


@check()
def cancel_before_the_match(harness: Harness) -> None:
    """It leaves nothing behind: the same key, posted again on both sides, is a new transfer."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            source.pool("of", OF)
            destination.pool("to", TO)
            for side, post in ((source, "send"), (destination, "recv")):
                if post == "send":
                    side.send("t", "of", THERE)
                else:
                    side.recv("t", "to", HERE)
                true(side.state("t") == "posted", f"it is {side.state('t')}")
                side.cancel("t")
                same(type(side.error("t")), TransferCancelled, f"error of the {post}")
                same(side.state("t"), "cancelled", "state")
                side.cancel("t")
            again(source, destination)


def _cancel(rig: Rig, opened: int) -> None:
    for source, destination in rig.both_ways():
        for by in (source, destination):
            other = destination if by is source else source
            gated(source, destination)
            source.matched("t")
            for layer in range(opened):
                source.mark("g", layer)
                destination.wait_layer("t", layer)
            if opened:
                same(destination.state("t"), "moving", "state")
            by.cancel("t")
            ours, theirs = by.error("t"), other.error("t")
            same((type(ours), type(theirs)), (TransferCancelled, PeerAborted), "errors")
            same((by.state("t"), other.state("t")), ("cancelled", "failed"), "states")
            poisoned(ours if by is destination else theirs)
            true((theirs if by is destination else ours).delivered in (False, None), "delivered")
            again(source, destination, tuple(range(opened)))


@check()
def cancel_while_gated(harness: Harness) -> None:
    """Matched, and no byte may be sent yet; by either side."""
    with harness.rig() as rig:
        _cancel(rig, 0)


@check()
def cancel_while_moving(harness: Harness) -> None:
    """Some layers have landed, the others are held back; by either side. What landed is there."""
    with harness.rig() as rig:
        _cancel(rig, 2)


@check()
def cancel_in_the_stream(harness: Harness) -> None:
    """While bytes run, at times that nobody chose: both succeed, or nothing lands after it is over."""
    of, to = Blocks(64, 200_000), Blocks(64, 200_000, gap=64, seed=2)
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            source.pool("of", of)
            for n in range(8):
                destination.pool("to", to)
                destination.recv("t", "to", range(64))
                source.send("t", "of", range(64))
                source.matched("t")
                by = destination if n % 2 else source
                while n > 3 and not destination.progress("t")[0] and not destination.done("t"):
                    pass
                by.cancel("t")
                got, sent = destination.error("t"), source.error("t")
                true(sent is not None or got is None, f"the source succeeded, the destination has {got!r}")
                if got is None:
                    destination.holds("to", to.after(of, range(64), range(64)))
                else:
                    same(got.quiesced, True, "quiesced")
                    first = destination.call("digests", name="to")
                    destination.recv("next", "to", [])
                    source.send("next", "of", [])
                    destination.result("next")
                    same(destination.call("digests", name="to"), first, "memory after the end")
                destination.call("close_pool", name="to")


def _all_raise(side: Side, kind: type[KVTransportError], cause: str = "") -> None:
    for handle in ("t", "alone", "alone too"):
        error = side.error(handle, timeout=5)
        same(type(error), kind, f"{side.name}: error of {handle}")
        if cause:
            same(error.cause, cause, "cause")


def _pending_both(rig: Rig) -> tuple[Side, Side]:
    """Let each side have one of every kind, under the names that `_all_raise` asks for."""
    source, destination = rig.here, rig.peer
    gated(source, destination)
    source.mark("g", 1)
    destination.wait_layer("t", 1)
    for side, pool in ((source, "of"), (destination, "to")):
        side.send("alone", pool, [1])
        if side is source:
            side.pool("in", TO)
        side.recv("alone too", "in" if side is source else pool, [1])
    return source, destination


def _post_raises(kind: type[KVTransportError], side: Side, rig: Rig) -> None:
    raises(kind, lambda: side.send("late", "of" if side is rig.here else "to", [0]))


@check()
def close_with_transfers_pending(harness: Harness) -> None:
    """Ours raise ConnectionClosed, the peer's PeerLost(closed), at once, and later posts as well."""
    for closer in ("here", "peer"):
        with harness.rig() as rig:
            _pending_both(rig)
            by, other = (rig.here, rig.peer) if closer == "here" else (rig.peer, rig.here)
            by.call("close_connection")
            _all_raise(by, ConnectionClosed)
            _all_raise(other, PeerLost, "closed")
            same((by.call("connection_state"), other.call("connection_state")), ("lost", "lost"), "states")
            _post_raises(ConnectionClosed, by, rig)
            _post_raises(PeerLost, other, rig)
            rig.peer.holds("to", TO.after(OF, HERE, THERE, [1]))


@check()
def close_the_endpoint_with_transfers_pending(harness: Harness) -> None:
    """The same by Endpoint.close; pools can be let go of afterwards."""
    with harness.rig() as rig:
        _pending_both(rig)
        handles = dict(rig.here.actor.handles)
        rig.here.actor.endpoint.close()
        for name, handle in handles.items():
            same(type(handle.exception()), ConnectionClosed, f"error of {name}")
        _all_raise(rig.peer, PeerLost, "closed")
        rig.peer.call("close_pool", name="to")


def _kill(rig: Rig, we_receive: bool) -> None:
    peer = rig.process()
    source, destination = (peer, rig.here) if we_receive else (rig.here, peer)
    gated(source, destination)
    source.mark("g", 3)
    destination.wait_layer("t", 3)
    rig.here.send("alone", "to" if we_receive else "of", [1])
    peer.kill()
    start = time.monotonic()
    for handle in ("t", "alone"):
        error = rig.here.error(handle, timeout=10)
        same(type(error), PeerLost, f"error of {handle}")
        same(error.quiesced, True, "quiesced")
    seconds = time.monotonic() - start
    true(seconds < KNOWN_WITHIN_S, f"the peer's death was known after {seconds:.3f} s")
    raises(PeerLost, lambda: rig.here.send("late", "to" if we_receive else "of", [1]))
    if we_receive:
        poisoned(rig.here.error("t"))
        rig.here.holds("to", TO.after(OF, HERE, THERE, [3]))
    rig.here.call("close_pool", name="to" if we_receive else "of")


@check(needs={"kill"})
def the_peer_is_killed(harness: Harness) -> None:
    """In mid-transfer, as source and as destination: PeerLost, soon; what landed is there and no more."""
    for we_receive in (True, False):
        with harness.rig() as rig:
            _kill(rig, we_receive)


@check(needs={"kill", "fork"})
def the_peer_is_killed_and_its_child_lives(harness: Harness) -> None:
    """A forked child that still has the peer's memory and descriptors hides nothing."""
    for we_receive in (True, False):
        with harness.rig() as rig:
            rig.process().fork()
            _kill(rig, we_receive)


@check(needs={"kill"})
def the_peer_is_killed_in_the_stream(harness: Harness) -> None:
    """While bytes run: a success, or PeerLost and only sealed blocks that hold what was sent."""
    of, to = Blocks(64, 1 << 20), Blocks(64, 1 << 20, seed=2)
    with harness.rig() as rig:
        peer = rig.process()
        peer.pool("of", of)
        rig.here.pool("to", to)
        rig.here.recv("t", "to", range(64))
        peer.send("t", "of", range(64))
        while not rig.here.progress("t")[0]:
            pass
        peer.kill()
        error = rig.here.error("t", timeout=10)
        if error is None:
            rig.here.holds("to", to.after(of, range(64), range(64)))
            return
        same((type(error), error.quiesced), (PeerLost, True), "error")
        arrived = to.views(rig.here.actor.memory["to"])[0]
        sent = of.views(of.memory())[0]
        states = states_of(error)
        same(sorted(states), list(range(64)), "blocks")
        for block, state in states.items():
            true(
                state == "poisoned" or bool((arrived[block] == sent[block]).all()),
                f"block {block} is {state}",
            )


@check()
def refused(harness: Harness) -> None:
    """The waiting side gets PeerAborted with the reason, also where it comes to wait later."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            source.pool("of", OF)
            destination.pool("to", TO)
            destination.recv("t", "to", HERE)
            source.call("refuse", key="t", reason="no memory")
            error = destination.error("t")
            same((type(error), error.reason), (PeerAborted, "no memory"), "error")
            source.call("refuse", key="later", reason="too late")
            destination.recv("later", "to", HERE)
            error = destination.error("later")
            same((type(error), error.reason), (PeerAborted, "too late"), "error")
            again(source, destination)


@check()
def limits_of_time(harness: Harness) -> None:
    """No partner, and too long in all: TransferTimeout in time, that says what was waited for."""
    with harness.rig() as rig:
        for source, destination in rig.both_ways():
            source.pool("of", OF)
            destination.pool("to", TO)
            start = time.monotonic()
            destination.recv("t", "to", HERE, match_timeout_s=0.3)
            error = destination.error("t")
            same((type(error), error.waiting_for), (TransferTimeout, "match"), "error")
            true(0.29 < time.monotonic() - start < 1.3, f"it took {time.monotonic() - start:.3f} s, not 0.3")
            source.send("t", "of", THERE, match_timeout_s=0.1)
            error = source.error("t")
            same((type(error), error.waiting_for), (TransferTimeout, "match"), "error")
            source.gate("g", LAYERS)
            destination.recv("t", "to", HERE, timeout_s=0.3)
            source.send("t", "of", THERE, gate="g")
            error = destination.error("t")
            same((type(error), error.waiting_for), (TransferTimeout, "total"), "error")
            poisoned(error)
            same(type(source.error("t")), PeerAborted, "the source's error")
            again(source, destination)
