"""F19: a receiver stops reading: its sender is held back, then told; other peers go on."""

import time

from kvtransport import Config, Endpoint
from kvtransport.errors import PeerAborted, TransferTimeout
from kvtransport.testing.blocks import Blocks
from tests.faults.peers import IDS, OF, SLOW_S, TO, check_delivered, stopped
from tests.waiting import until

MUCH = Blocks(64, 1 << 20)
STALL_S = 1.5
ATTEMPTS = 5


def connected(ours, *sides):
    """Return our Connection to each side."""
    connections = {side: ours.connect(side.call("listen", address="127.0.0.1:0")) for side in sides}
    for side in sides:
        side.call("accept")
    return connections


def test_f19_receiver_stopped_others_go_on(far):
    frozen, other = far("frozen", dead_after_s=30.0), far("other")
    with Endpoint(Config(backends=("tcp",), dead_after_s=30.0)) as ours:
        connections = connected(ours, frozen, other)
        much, some = ours.register(MUCH.views(MUCH.memory())), ours.register(OF.views(OF.memory()))
        frozen.pool("to", MUCH)
        frozen.recv("t", "to", range(MUCH.count))
        gate = ours.layer_gate(1)
        slow = connections[frozen].send_blocks(
            much, range(MUCH.count), key="t", after=gate, stall_timeout_s=STALL_S
        )
        until(lambda: slow.state == "matched")
        with stopped(frozen.pid):
            start = time.monotonic()
            gate.mark_ready(0)
            rounds = 0
            while not slow.done():
                moves(connections[other], some, other, f"t{rounds}")
                rounds += 1
            took = time.monotonic() - start
            error = slow.exception()
            assert connections[frozen].state == "open"
        assert type(error) is TransferTimeout
        assert error.waiting_for == "bytes"
        assert error.retryable
        assert STALL_S - 0.1 < took < STALL_S + SLOW_S
        check_delivered(error)
        assert rounds >= 5
        theirs = frozen.error("t")
        assert type(theirs) is PeerAborted
        assert theirs.quiesced is True
        moves(connections[frozen], some, frozen, "next")


def test_f19_others_keep_their_rate(far):
    """At least 90 % of it, by the best of some transfers with and without a peer that has stopped reading.

    The neighbours of a busy machine take from both, seldom from all of an attempt's: one of a few must show it.
    """
    frozen, other = far("frozen", dead_after_s=30.0), far("other")
    with Endpoint(Config(backends=("tcp",), dead_after_s=30.0)) as ours:
        connections = connected(ours, frozen, other)
        much = ours.register(MUCH.views(MUCH.memory()))
        for side in connections:
            side.pool("to", MUCH)
        ratios = []
        for attempt in range(ATTEMPTS):
            key = f"slow {attempt}"
            frozen.recv(key, "to", range(MUCH.count))
            gate = ours.layer_gate(1)
            slow = connections[frozen].send_blocks(much, range(MUCH.count), key=key, after=gate)
            until(lambda slow=slow: slow.state == "matched")
            with stopped(frozen.pid):
                alone = fastest(connections[other], much, other, f"alone {attempt}")
                gate.mark_ready(0)
                until(lambda slow=slow: slow.state == "moving")
                beside = fastest(connections[other], much, other, f"beside {attempt}")
                assert not slow.done()
            assert slow.result(20).nbytes == MUCH.count * MUCH.nbytes
            ratios.append(alone / beside)
            if ratios[-1] >= 0.9:
                break
        assert ratios[-1] >= 0.9, ratios


def fastest(connection, pool, side, key: str) -> float:
    """Return the seconds of the fastest of some transfers of 16 MiB."""
    ids, took = range(16), []
    for n in range(12):
        side.recv(f"{key} {n}", "to", ids)
        start = time.monotonic()
        connection.send_blocks(pool, ids, key=f"{key} {n}").result(20)
        took.append(time.monotonic() - start)
        side.result(f"{key} {n}")
    return min(took)


def moves(connection, pool, side, key: str) -> None:
    """Send some blocks to another peer, and see them arrive."""
    side.pool(key, TO)
    side.recv(key, key, IDS)
    connection.send_blocks(pool, IDS, key=key).result(20)
    side.result(key)
    side.holds(key, TO.after(OF, IDS, IDS))
    side.call("close_pool", name=key)
