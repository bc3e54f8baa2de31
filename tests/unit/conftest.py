"""Endpoints that a test makes and need not close, and their acceptor threads' turns."""

import os
import socket

import pytest

from kvtransport.acceptor.loop import Loop
from kvtransport.config import Config
from kvtransport.endpoint import Endpoint
from tests.waiting import Turns

_TURNS = Turns()
os.register_at_fork(after_in_child=_TURNS.reset)


@pytest.fixture
def turns(monkeypatch):
    """Return what waits for the turns of acceptor threads that begin after it was asked for."""
    monkeypatch.setattr(Loop, "_turn", lambda loop: _TURNS.tell(loop))
    return _TURNS


@pytest.fixture
def endpoint(turns):
    """Make endpoints that are closed at the end; over TCP unless said otherwise."""
    made = []

    def make(**settings):
        settings.setdefault("backends", ("tcp",))
        made.append(Endpoint(Config(**settings)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
