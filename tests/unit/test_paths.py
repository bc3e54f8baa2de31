"""What is told of the ways that a session doesn't use."""

import dataclasses
import logging
import threading

import msgspec
import pytest

from kvtransport import Endpoint
from kvtransport.acceptor import paths
from tests.waiting import until

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def session():
    """Return (what a session by sockets within this process was found to be, its endpoint's acceptor)."""
    with Endpoint() as ours, Endpoint() as theirs:
        connection = ours.connect(theirs.listen("127.0.0.1:0"), timeout=20)
        yield connection.peer, ours._acceptor.roster.found(connection), ours._acceptor


def test_an_endpoint_of_this_process_by_its_socket_is_warned_of(session, caplog):
    peer, found, acceptor = session
    with caplog.at_level(logging.INFO, "kvtransport.paths"):
        paths.log(peer, found, acceptor._places, acceptor.reachability)
    assert "inproc is the better way to" in caplog.text


@pytest.mark.parametrize("differ", [("pid_ns", "pid_started"), ("pid_ns",), ("pid_started",), ("pid",)])
def test_the_first_process_of_another_container_is_another_process(session, caplog, differ):
    """The containers of a pod share a network namespace, and the main process of each is number 1."""
    peer, found, acceptor = session
    ours = msgspec.structs.replace(acceptor.reachability, pid=1)
    theirs = msgspec.structs.replace(ours, **{name: getattr(ours, name) + 1 for name in differ})
    hello = msgspec.structs.replace(found.hello, reachability=theirs)
    found = dataclasses.replace(found, terms=dataclasses.replace(found.terms, peer=hello))
    assert [refusal.reason for refusal in paths.refusals(found, acceptor._places, ours)] == [
        "the peer is another process"
    ]
    with caplog.at_level(logging.INFO, "kvtransport.paths"):
        paths.log(peer, found, acceptor._places, ours)
    assert [record.levelname for record in caplog.records] == ["INFO"]


class Asks(logging.Handler):
    """A handler whose lines are taken by another thread, which asks the endpoints who is connected."""

    def __init__(self, *endpoints):
        super().__init__()
        self.rosters, self.answers = [one._acceptor.roster for one in endpoints], []

    def emit(self, record):
        if record.name != "kvtransport.paths":
            return
        thread = threading.Thread(target=lambda: [one.connections() for one in self.rosters])
        thread.start()
        thread.join(5)
        self.answers.append(not thread.is_alive())


@pytest.mark.parametrize(("by", "lines"), [("a socket", 3), ("inproc", 2)])
def test_a_slow_handler_stops_nobody(by, lines, caplog):
    with Endpoint() as ours, Endpoint() as theirs:
        where, handler = theirs.listen("127.0.0.1:0"), Asks(ours, theirs)
        log = logging.getLogger("kvtransport")
        with caplog.at_level(logging.INFO, "kvtransport"):
            log.addHandler(handler)
            try:
                ours.connect(where if by == "a socket" else theirs.descriptor(), timeout=20)
                theirs.accept(timeout=20)
                until(lambda: len(handler.answers) >= lines)
            finally:
                log.removeHandler(handler)
        assert all(handler.answers)
