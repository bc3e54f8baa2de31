"""The Prometheus collector: what a scrape shows is what was moved, it costs little, it outlives its endpoint."""

import os
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kvtransport.errors import PeerAborted, TransferCancelled, TransferTimeout
from kvtransport.integrations import prometheus
from kvtransport.integrations.prometheus import KVTransportCollector

BLOCKS, NBYTES = 8, 4096
LIMIT_S = 20
LOOPBACK = "127.0.0.1:0"
MANY = 100
SCRAPE_S = 0.001
HASTE = {  # a hundred peers of one address, at once
    "max_handshakes_per_s_per_address": 1000,
    "max_handshakes_per_s": 1000,
    "handshake_burst_per_address": 512,
}


class Two:
    """Two endpoints with a pool each, joined; a registry for the one that receives, and one for the other."""

    def __init__(self, ours, theirs, where):
        self.ours, self.theirs = ours, theirs
        self.sender, self.receiver = ours.connect(where), theirs.accept(timeout=LIMIT_S)
        self.of = ours.register(np.ones((BLOCKS, NBYTES), dtype=np.uint8))
        self.to = theirs.register(np.zeros((BLOCKS, NBYTES), dtype=np.uint8))

    def move(self, key, blocks=BLOCKS):
        """Move some blocks; return the results of both sides."""
        got = self.receiver.recv_blocks(self.to, range(blocks), key=key)
        sent = self.sender.send_blocks(self.of, range(blocks), key=key).result(LIMIT_S)
        return sent, got.result(LIMIT_S)


@pytest.fixture
def two(endpoint):
    ours, theirs = endpoint(), endpoint()
    return Two(ours, theirs, theirs.listen(LOOPBACK))


def registry_of(endpoint):
    registry = CollectorRegistry()
    registry.register(KVTransportCollector(endpoint))
    return registry


def samples(registry, name):
    """Return {labels' values, in the order of their names: value} of one kind of sample."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == name
    }


def ended_by(error, handle):
    with pytest.raises(error):
        handle.result(LIMIT_S)


# --- what it shows ---


def test_bytes_are_those_that_were_moved(two):
    results = [two.move(f"{n}", blocks=n) for n in range(1, BLOCKS + 1)]
    for endpoint, op, side in ((two.ours, "send", 0), (two.theirs, "recv", 1)):
        moved = sum(result[side].nbytes for result in results)
        assert moved == NBYTES * sum(range(1, BLOCKS + 1))
        assert samples(registry_of(endpoint), "kvtransport_transfer_bytes_total") == {("tcp", op): moved}


def test_backends_are_told_apart(endpoint):
    ours, theirs = endpoint(backends=None), endpoint(backends=None)
    direct = Two(ours, theirs, theirs.descriptor())
    other = endpoint()
    by_socket = Two(other, theirs, theirs.listen(LOOPBACK))
    moved = {"inproc": direct.move("a")[1].nbytes, "tcp": by_socket.move("b", blocks=3)[1].nbytes}
    registry = registry_of(theirs)
    assert samples(registry, "kvtransport_transfer_bytes_total") == {
        (backend, "recv"): nbytes for backend, nbytes in moved.items()
    }
    ways = samples(registry, "kvtransport_path_info")
    assert set(ways.values()) == {1}
    assert {("inproc", "false"), ("tcp", "false"), ("inproc", "true")} <= set(ways)
    assert ("tcp", "true") not in ways


def test_bytes_are_counted_under_the_way_that_moved_them(endpoint, turns):
    ours, theirs = endpoint(backends=("shm", "tcp")), endpoint(backends=("shm", "tcp"))
    two = Two(ours, theirs, theirs.listen(LOOPBACK))
    turns.until(lambda: two.receiver.backend == two.sender.backend == "shm")
    sent, got = two.move("a", blocks=5)
    assert sent.backend == got.backend == "shm"
    for side, op in ((ours, "send"), (theirs, "recv")):
        assert samples(registry_of(side), "kvtransport_transfer_bytes_total") == {("shm", op): 5 * NBYTES}
    two.sender.send_message(b"four").result(LIMIT_S)
    assert samples(registry_of(ours), "kvtransport_transfer_bytes_total")["tcp", "message"] == 4


def test_errors_are_counted_by_class_and_timed(two):
    two.move("ok")
    got = two.receiver.recv_blocks(two.to, [0], key="cancelled")
    got.cancel()
    ended_by(TransferCancelled, got)
    for key in ("late", "later"):
        ended_by(TransferTimeout, two.receiver.recv_blocks(two.to, [0], key=key, match_timeout_s=0.05))
    refused = two.receiver.recv_blocks(two.to, [0], key="refused")
    two.sender.refuse("refused", "no memory")
    ended_by(PeerAborted, refused)
    registry = registry_of(two.theirs)
    errors = {("TransferCancelled",): 1, ("TransferTimeout",): 2, ("PeerAborted",): 1}
    assert samples(registry, "kvtransport_transfer_errors_total") == errors
    counts = samples(registry, "kvtransport_transfer_duration_seconds_count")
    assert counts == {("tcp", "recv", "ok"): 1} | {("tcp", "recv", *code): n for code, n in errors.items()}
    assert samples(registry_of(two.ours), "kvtransport_transfer_errors_total") == {}


def test_durations_are_a_histogram_of_the_same_seconds(two):
    results = [two.move(f"{n}")[1] for n in range(20)]
    late = two.receiver.recv_blocks(two.to, [0], key="late", match_timeout_s=0.1)
    ended_by(TransferTimeout, late)
    registry = registry_of(two.theirs)
    buckets = {
        (float(le), outcome): n
        for (_, le, _, outcome), n in samples(
            registry, "kvtransport_transfer_duration_seconds_bucket"
        ).items()
    }
    seconds = [result.seconds for result in results]
    for bound in {le for le, _ in buckets}:
        assert buckets[bound, "ok"] == sum(s <= bound for s in seconds), bound
    assert buckets[0.065536, "TransferTimeout"] == 0
    assert buckets[float("inf"), "TransferTimeout"] == 1
    total = samples(registry, "kvtransport_transfer_duration_seconds_sum")
    assert total["tcp", "recv", "ok"] == pytest.approx(sum(seconds), abs=1e-6)


def test_labels_are_as_few_with_many_peers_as_with_one(endpoint):
    theirs = endpoint()
    where = theirs.listen(LOOPBACK)
    registry, seen = registry_of(theirs), []
    for _ in range(5):
        Two(endpoint(), theirs, where).move("k")
        seen.append([(s.name, s.labels) for metric in registry.collect() for s in metric.samples])
    assert seen[0] == seen[-1]
    peers = [str(connection.peer) for connection in theirs.connections()]
    assert len(peers) == 5
    assert not any(peer in value for _, labels in seen[-1] for value in labels.values() for peer in peers)


def test_expired_grants_are_the_engine_s_count(two):
    expired = two.theirs.stats().get("grants", {}).get("expired", 0)
    name = "kvtransport_grants_expired_total"
    assert samples(registry_of(two.theirs), name) == {(): expired}
    engine = types.SimpleNamespace(grants=lambda: {"expired": 3})
    assert prometheus._expired_grants(types.SimpleNamespace(engine=engine)) == 3


# --- how it behaves ---


def test_a_scrape_of_a_hundred_connections_is_quick(endpoint):
    """Of all that a server does for it, text included; the best of many, since other tests share the machine."""
    theirs = endpoint(**HASTE)
    where = theirs.listen(LOOPBACK)
    pairs = [Two(endpoint(**HASTE), theirs, where) for _ in range(MANY)]
    for two in pairs:
        two.move("k", blocks=1)
    ended_by(TransferTimeout, two.receiver.recv_blocks(two.to, [0], key="late", match_timeout_s=0))
    registry = registry_of(theirs)
    took = []
    for _ in range(100):
        began = time.perf_counter()
        text = generate_latest(registry)
        took.append(time.perf_counter() - began)
    assert b'kvtransport_transfer_duration_seconds_count{backend="tcp",op="recv",outcome="ok"} 100.0' in text
    assert min(took) < SCRAPE_S, f"best {min(took) * 1e6:.0f} us"


def test_registering_asks_the_endpoint_nothing_and_names_clash_at_once(two, monkeypatch):
    def asked(collector):
        raise AssertionError("scraped")

    registry = CollectorRegistry(auto_describe=True)
    with monkeypatch.context() as patch:
        patch.setattr(KVTransportCollector, "collect", asked)
        registry.register(KVTransportCollector(two.ours))
        with pytest.raises(ValueError, match="kvtransport_transfer"):
            registry.register(KVTransportCollector(two.theirs))
    assert samples(registry, "kvtransport_grants_expired_total") == {(): 0}


def test_what_was_described_is_what_is_collected(two):
    two.move("k")
    collector = KVTransportCollector(two.ours)
    described, collected = list(collector.describe()), list(collector.collect())
    assert [(m.name, m.type) for m in described] == [(m.name, m.type) for m in collected]
    assert not any(metric.samples for metric in described)
    assert all(metric.samples for metric in collected if metric.name != "kvtransport_transfer_errors")


def test_a_closed_endpoint_has_nothing_to_tell(two):
    two.move("k")
    registry = registry_of(two.ours)
    assert samples(registry, "kvtransport_transfer_bytes_total")
    two.ours.close()
    assert not any(metric.samples for metric in registry.collect())


def test_a_forked_child_scrapes_nothing(two):
    two.move("k")
    registry = registry_of(two.ours)
    child = os.fork()
    if child == 0:
        try:
            os._exit(any(metric.samples for metric in registry.collect()))
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert samples(registry, "kvtransport_transfer_bytes_total")


def test_it_has_no_thread(two):
    before = threading.active_count(), len(os.listdir("/proc/self/task"))
    registry = registry_of(two.ours)
    for _ in range(3):
        generate_latest(registry)
    assert (threading.active_count(), len(os.listdir("/proc/self/task"))) == before


# --- without prometheus_client ---


def fresh(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_alone_does_not_import_it():
    assert fresh("import sys, kvtransport; print('prometheus_client' in sys.modules)") == "False"


def test_without_it_the_pip_line_is_said():
    hidden = "import sys; sys.modules['prometheus_client'] = None\n"
    said = fresh(
        hidden + "import kvtransport\ntry:\n    import kvtransport.integrations.prometheus\n"
        "except ImportError as e:\n    print(e)"
    )
    assert "pip install 'kvtransport[prometheus]'" in said
