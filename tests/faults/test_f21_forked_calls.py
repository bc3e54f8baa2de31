"""F21: what else a forked child may call: gates, queues, handles that have ended, what tells of a connection."""

import json
import os
import select

import numpy as np
import pytest

from kvtransport import Config, Endpoint
from kvtransport.errors import PeerLost, TransferCancelled

FORKED = "ForkedProcessError"


def outcome(call) -> str:
    """Name the error that it raises, or what it returns."""
    try:
        return repr(call())
    except Exception as error:
        return type(error).__name__


def in_a_child(calls) -> dict[str, str]:
    """Return the outcomes of the calls in a forked child; it has ten seconds."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, json.dumps({name: outcome(call) for name, call in calls.items()}).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as said:
        ready = select.select([said], [], [], 10)[0]
        if not ready:
            os.kill(pid, 9)
        found = said.read()
    os.waitpid(pid, 0)
    assert ready, "a call in the child hangs"
    return json.loads(found)


@pytest.fixture
def link():
    with Endpoint(Config(backends=("tcp",))) as ours, Endpoint(Config(backends=("tcp",))) as theirs:
        connection = ours.connect(theirs.listen("127.0.0.1:0"), timeout=20)
        yield ours, connection, theirs.accept(timeout=20)


def calls_of(ours, connection, pool, gate, queue, failed):
    session, engine = connection._session, ours.engine
    return {
        "gate.mark_ready": lambda: gate.mark_ready(0),
        "gate.fail": lambda: gate.fail("in the child"),
        "queue.poll": queue.poll,
        "queue.fileno": queue.fileno,
        "queue.push": lambda: queue.native.push(1),
        "failed.result": failed.result,
        "failed.exception": failed.exception,
        "backend": lambda: connection.backend,
        "explain": connection.explain,
        "refuse": lambda: connection.refuse("k", "in the child"),
        "lost_reason": session.lost_reason,
        "session.id": lambda: session.id,
        "set_peer": lambda: session.set_peer("the child"),
        "add_lane": lambda: session.add_lane(os.open("/dev/null", os.O_RDONLY), 7),
        "ready": session.ready,
        "pool.close": pool.close,
        "in_use": pool.native.in_use,
        "poll_events": engine.poll_events,
        "event_fd": engine.event_fd,
        "operations": engine.operations,
        "remove_listener": lambda: engine.remove_listener(1),
    }


def test_f21_no_call_of_a_child_takes_a_lock_of_its_parents(link):
    ours, connection, accepted = link
    pool = ours.register(np.zeros((4, 4096), np.uint8))
    gate, queue = ours.layer_gate(1), ours.completion_queue()
    waits = connection.send_blocks(pool, [0], key="gated", after=gate, queue=queue)
    failed, done = connection.recv_blocks(pool, [1], key="failed"), connection.send_message(b"whole")
    failed.cancel()
    with pytest.raises(TransferCancelled):
        failed.result(20)
    done.result(20)
    calls = calls_of(ours, connection, pool, gate, queue, failed)
    found = in_a_child(calls)
    assert found == dict.fromkeys(calls, FORKED)
    told = in_a_child({"repr": lambda: connection, "done": done.result, "endpoint": lambda: ours})
    assert told["repr"] == f"<Connection to {connection.peer} of another process>"
    assert (told["done"], "another process" in told["endpoint"]) == ("None", True)
    gate.mark_ready(0)  # for the first time: the child's call has done nothing
    target = accepted._endpoint.register(np.zeros((4, 4096), np.uint8))
    assert accepted.recv_blocks(target, [0], key="gated").result(20).nbytes == 4096
    assert waits.result(20).nbytes == 4096


def test_f21_a_childs_own_endpoint_takes_nothing_of_its_parents(link):
    """A gate or a queue of the parent's has its threads' locks."""
    ours, connection, _ = link
    gate, queue = ours.layer_gate(1), ours.completion_queue()
    theirs = connection.peer.address

    def post(**options):
        with Endpoint(Config(backends=("tcp",))) as own:
            pool = own.register(np.zeros((4, 4096), np.uint8))
            own.connect(theirs, timeout=20).send_blocks(pool, [0], key="own", **options)

    found = in_a_child({"gate": lambda: post(after=gate), "queue": lambda: post(queue=queue), "none": post})
    assert found == {"gate": FORKED, "queue": FORKED, "none": "None"}


def test_f21_a_lost_connection_in_a_child(link):
    ours, connection, accepted = link
    pool = ours.register(np.zeros((4, 4096), np.uint8))
    waits = connection.recv_blocks(pool, [0], key="k")
    accepted.close()
    with pytest.raises(PeerLost):
        waits.result(20)
    found = in_a_child({"post": lambda: connection.recv_blocks(pool, [1], key="l"), "result": waits.result})
    assert found["result"] == FORKED
    assert found["post"] in (FORKED, PeerLost.__name__)
