"""F11, F12, F13: a side gives up: the destination or the source in mid-transfer, and while it completes."""

import time

import pytest

from kvtransport import wait
from kvtransport.errors import PeerAborted, PeerLost, TransferCancelled, TransferTimeout
from kvtransport.testing.blocks import Blocks
from tests.faults.peers import (
    CHUNK,
    FRAME,
    HEADER,
    IDS,
    OF,
    ROUNDS,
    SLOW_S,
    TO,
    check_delivered,
    check_landed,
    check_median,
    check_states,
    check_untouched,
    post,
    rewrite,
    within,
)
from tests.faults.proxy import Fault
from tests.waiting import until

LANDED = (0, 1, 2)
MATCH_S = 0.5
REUSABLE_S, KNOWN_S = 0.001, 0.1
MID_CHUNK = len(LANDED) * FRAME + HEADER + 1000


def fence(source, destination) -> None:
    """Move nothing of the old blocks, behind everything that the lane still carried."""
    other = Blocks(1, CHUNK, seed=3)
    source.pool("fence of", other)
    destination.pool("fence to", other)
    destination.recv("fence", "fence to", [0])
    source.send("fence", "fence of", [0])
    destination.result("fence")
    source.result("fence")


def test_f11_destination_cancels_in_mid_transfer(tcp):
    held = Fault("lane", "down", MID_CHUNK, "hold")
    with tcp.linked(held) as rig:
        peer, here = rig.peer, rig.here
        post(peer, here)
        assert held.reached.wait(20)
        until(lambda: here.progress("t")[0] == len(LANDED) * CHUNK)
        with within(SLOW_S / 2):
            here.cancel("t")
            error = here.error("t")
        rewrite(here)  # at once, with the rest of the chunk still to come
        assert type(error) is TransferCancelled
        assert here.state("t") == "cancelled"
        check_states(error, LANDED)
        theirs = peer.error("t")
        assert type(theirs) is PeerAborted
        check_delivered(theirs)
        held.go.set()
        fence(peer, here)
        check_untouched(here)
        here.recv("again", "to", IDS, key="t")
        peer.send("again", "of", IDS, key="t")
        here.result("again")
        check_landed(here, IDS)


def test_f11_reusable_within_a_millisecond(tcp):
    """From the cancel in the middle of a chunk to the proof, which is local, that nothing more of it lands."""
    took = []
    for _ in range(ROUNDS + 2):
        held = Fault("lane", "down", MID_CHUNK, "hold")
        with tcp.linked(held) as rig:
            post(rig.peer, rig.here)
            assert held.reached.wait(20)
            until(lambda here=rig.here: here.progress("t")[0] == len(LANDED) * CHUNK)
            handle = rig.here.actor.handles["t"]
            start = time.perf_counter()
            handle.cancel()
            wait([handle], 20)
            took.append(time.perf_counter() - start)
            assert type(handle.exception()) is TransferCancelled
            assert took[-1] < SLOW_S / 2
            rewrite(rig.here)
            held.go.set()
            fence(rig.peer, rig.here)
            check_untouched(rig.here)
    check_median(took, 0, REUSABLE_S)


def test_f11_source_may_rewrite_once_it_is_told(tcp):
    """Nothing that is read from the source after its end is sealed at the destination."""
    held = Fault("lane", "up", MID_CHUNK, "hold")
    with tcp.linked(held) as rig:
        peer, here = rig.peer, rig.here
        post(here, peer)
        assert held.reached.wait(20)
        until(lambda: peer.progress("t")[0] == len(LANDED) * CHUNK)
        here.cancel("t")
        with within(SLOW_S):
            error = here.error("t")
        assert type(error) is TransferCancelled
        check_delivered(error)
        for view in OF.views(here.actor.memory["of"]):
            view[:] = 0xCD
        held.go.set()
        theirs = peer.error("t")
        assert type(theirs) is PeerAborted
        sealed = [block for block in IDS if block not in theirs.failed_block_ids]
        check_states(theirs, sealed)
        here.pool("back", OF)
        peer.send("back", "to", sealed)
        here.recv("back", "back", sealed)
        here.result("back")
        back, sent = OF.views(here.actor.memory["back"])[0], OF.views(OF.memory())[0]
        assert (back[sealed] == sent[sealed]).all()
        assert sealed[: len(LANDED)] == list(LANDED)


@pytest.mark.parametrize("how", ["cancel", "gate fails", "refuse"])
def test_f12_source_aborts(way, how):
    """The destination knows within 100 ms, not after its timeout, and why."""
    took = []
    for _ in range(ROUNDS):
        with way.linked() as rig:
            abort(rig.peer, rig.here, how, took)
    check_median(took, 0, KNOWN_S)


def abort(peer, here, how, took):
    here.pool("to", TO)
    peer.pool("of", OF)
    peer.gate("g", 1)
    here.recv("t", "to", IDS)
    if how != "refuse":
        peer.send("t", "of", IDS, gate="g")
        until(lambda: here.state("t") == "matched")
    with within(SLOW_S, took):
        if how == "cancel":
            peer.cancel("t")
        elif how == "refuse":
            peer.call("refuse", key="t", reason="prefill failed")
        else:
            peer.call("fail_gate", name="g", reason="prefill failed")
        error = here.error("t")
    assert type(error) is PeerAborted
    assert error.reason == "prefill failed" or how == "cancel"
    if how != "refuse":
        check_states(error, ())
        theirs = peer.error("t")
        assert type(theirs) is TransferCancelled
        assert theirs.delivered is False
    rewrite(here)
    check_untouched(here)


@pytest.mark.parametrize("how", ["cancel", "gate fails"])
def test_f12_source_gives_up_before_the_match(way, how):
    """It leaves nothing at the destination, whose user may mean another send: `refuse` is the word for that."""
    with way.linked() as rig:
        peer, here = rig.peer, rig.here
        here.pool("to", TO)
        peer.pool("of", OF)
        peer.gate("g", 1)
        peer.send("t", "of", IDS, gate="g")
        if how == "cancel":
            peer.cancel("t")
        else:
            peer.call("fail_gate", name="g", reason="prefill failed")
        assert type(peer.error("t")) is TransferCancelled
        here.recv("alone", "to", IDS, key="t", match_timeout_s=0.2)
        error = here.error("alone")
        assert (type(error), error.waiting_for) == (TransferTimeout, "match")
        peer.call("refuse", key="t", reason="prefill failed")
        with within(SLOW_S):
            here.recv("told", "to", IDS, key="t")
            error = here.error("told")
        assert (type(error), error.reason) == (PeerAborted, "prefill failed")


def race(rig, n: int, by_source: bool, we_receive: bool, size: Blocks) -> tuple[bool, bool]:
    """Post, and cancel from this side after n looks at the handle; return who succeeded: source, destination."""
    source, destination = (rig.peer, rig.here) if we_receive else (rig.here, rig.peer)
    ids = range(size.count)
    destination.recv("t", "to", ids, match_timeout_s=MATCH_S)
    source.send("t", "of", ids, match_timeout_s=MATCH_S)
    by = source if by_source else destination
    for _ in range(n):
        if rig.here.done("t"):
            break
    by.cancel("t")
    sent, got = source.error("t"), destination.error("t")
    # Cancelled before the match, a side leaves nothing behind: the other waits out its match_timeout_s.
    for error in (sent, got):
        assert type(error) in (type(None), TransferCancelled, PeerAborted, TransferTimeout)
        assert type(error) is not TransferTimeout or error.waiting_for == "match"
    if got is not None:
        assert got.quiesced is True
        assert sent is not None, f"the source reports success, the destination {got!r}"
        assert sent.delivered in (None, False)
    return sent is None, got is None


@pytest.mark.parametrize("by_source", [True, False], ids=["by the source", "by the destination"])
@pytest.mark.parametrize("we_receive", [True, False], ids=["we receive", "we send"])
def test_f13_cancel_races_completion(way, by_source, we_receive):
    """Never success at the source and not at the destination; with the link up both sides say the same."""
    size = Blocks(4, 20_000)
    seen = set()
    with way.linked() as rig:
        for side, pool in (
            ((rig.peer, "of"), (rig.here, "to"))
            if we_receive
            else (
                (rig.here, "of"),
                (rig.peer, "to"),
            )
        ):
            side.pool(pool, size)
        for n in range(120):
            outcome = race(rig, 40 * (n % 20), by_source, we_receive, size)
            assert outcome in ((True, True), (False, False)), outcome
            seen.add(outcome)
    assert (True, True) in seen


def test_f13_the_link_dies_around_the_end(way):
    """The destination has sealed, its DONE is lost with the link: the source doesn't know, and says so."""
    held = Fault("control", "up", None, "hold")
    with way.linked(held) as rig:
        peer, here = rig.peer, rig.here
        here.pool("to", TO)
        peer.pool("of", OF)
        peer.gate("g", 1)
        here.recv("t", "to", IDS)
        peer.send("t", "of", IDS, gate="g")
        until(lambda: here.state("t") == "matched")
        held.armed.set()
        assert held.reached.wait(20)  # by a PING
        peer.mark("g", 0)
        assert here.result("t")["nbytes"] == len(IDS) * CHUNK
        way.proxy.cut()
        error = peer.error("t")
        assert type(error) is PeerLost
        assert error.delivered is None
        assert error.quiesced is True
        check_landed(here, IDS)
