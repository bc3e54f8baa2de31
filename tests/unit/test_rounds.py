"""How long a try may take where there are others to make, over many rounds."""

import contextlib
import socket
from types import SimpleNamespace

import pytest

from kvtransport.acceptor import dialler
from kvtransport.acceptor.attempt import Attempt, State
from kvtransport.acceptor.dialler import Dial
from kvtransport.acceptor.roster import Ruling
from kvtransport.backends.tcp import TcpBackend

LIMIT_S = 20
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def rounds(monkeypatch):
    """Return the reasons with which rounds ended; pauses and tries are short."""
    monkeypatch.setattr(dialler, "TRY_S", 0.02)
    monkeypatch.setattr(dialler, "TRY_LAST_S", 0.08)
    monkeypatch.setattr(dialler, "PAUSE_FIRST_S", 0.001)
    monkeypatch.setattr(dialler, "PAUSE_LAST_S", 0.001)
    reasons, pause = [], Dial._pause

    def told(dial):
        reasons.append(dial._reason)
        pause(dial)

    monkeypatch.setattr(Dial, "_pause", told)
    return reasons


def silent_server(port=0):
    """A listener that never says a word; who dials it is connected nonetheless."""
    return socket.create_server(("127.0.0.1", port))


def address_of(server):
    return f"127.0.0.1:{server.getsockname()[1]}"


def two_free_ports():
    with contextlib.ExitStack() as held:
        return [held.enter_context(silent_server()).getsockname()[1] for _ in range(2)]


def test_refused_rounds_make_no_later_try_longer(endpoint, turns, rounds):
    ours, theirs = endpoint(), endpoint()
    first, second = two_free_ports()
    future = ours._acceptor.connect([f"127.0.0.1:{first}", f"127.0.0.1:{second}"], 60)
    turns.until(lambda: len(rounds) > 20)
    (dial,) = ours._acceptor._dials.values()
    assert dial._try_s == 0.02
    with silent_server(first):
        theirs.listen(f"127.0.0.1:{second}")
        assert future.result(LIMIT_S).peer.incarnation == theirs.incarnation


def test_a_silent_address_has_longer_tries_up_to_a_limit(endpoint, turns, rounds, free_port):
    ours, theirs = endpoint(), endpoint()
    refuses = f"127.0.0.1:{free_port}"
    with silent_server() as server:
        future = ours._acceptor.connect([refuses, address_of(server)], 60)
        turns.until(lambda: len(rounds) > 12)
        told = [reason.partition("longer than ")[2].partition(":")[0] for reason in rounds]
        assert told[:4] == ["0.02 s", "0.04 s", "0.08 s", "0.08 s"]
        assert set(told[4:]) == {"0.08 s"}
        theirs.listen(refuses)
        assert future.result(LIMIT_S).peer.incarnation == theirs.incarnation


def test_a_name_whose_first_address_is_silent(endpoint, monkeypatch, rounds):
    ours, theirs = endpoint(), endpoint()
    good = theirs.listen("127.0.0.1:0")
    resolve = TcpBackend.resolve
    with silent_server() as server:
        both = [*resolve(TcpBackend(), address_of(server)), *resolve(TcpBackend(), good)]
        monkeypatch.setattr(TcpBackend, "resolve", lambda backend, where: both)
        assert ours.connect("two.example:7000", timeout=LIMIT_S).peer.incarnation == theirs.incarnation
    assert not rounds


def test_a_try_that_has_waited_for_another_handshake_has_a_limit_again():
    timers, failed, clock = [], [], [100.0]
    loop = SimpleNamespace(
        now=lambda: clock[0],
        call_at=lambda when, call: timers.append((when, call)),
        unwatch=lambda sock: None,
    )
    roster = SimpleNamespace(claim=lambda incarnation, one: Ruling.GO, release=lambda incarnation, one: None)
    wanted = SimpleNamespace(failed=lambda reason, final, **why: failed.append((reason, why)))
    one = Attempt(SimpleNamespace(loop=loop, roster=roster), wanted, None, "there")
    one._try_s, one._deadline, one.state = 2.0, 99.0, State.WAIT
    one.hello = SimpleNamespace(incarnation=b"p" * 16)
    machine = SimpleNamespace(proceed=lambda: None)
    one._channel = SimpleNamespace(machine=machine, sock=None, close=lambda: None)
    one._talk = lambda: None
    one.on_time(clock[0])
    assert not failed  # it waits for what is bounded elsewhere
    one._claim()
    ((when, call),) = timers
    assert when == 102.0
    call(101.0)
    assert not failed
    call(102.0)
    ((reason, why),) = failed
    assert reason == "there took longer than 2 s: the handshake runs"
    assert why["late"]
