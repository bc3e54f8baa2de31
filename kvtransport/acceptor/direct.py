"""Joining two endpoints of this process: a session without a handshake.

Here: claiming both rosters, and what the two are told. Not here: joining the engines (native), tries by
sockets (`attempt`).

Invariant: `inproc.joining` is held, so that of two endpoints that join each other at once one finds the
other's session.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from kvtransport.acceptor.roster import Found, Ruling
from kvtransport.backends import inproc
from kvtransport.backends.base import LinkProof
from kvtransport.errors import HandshakeError, ResourceLimit
from kvtransport.protocol.agreement import Unfit, agree
from kvtransport.protocol.auth import NullSuite
from kvtransport.types import Protection

if TYPE_CHECKING:
    from kvtransport.acceptor.acceptor import Acceptor
    from kvtransport.acceptor.attempt import Wanted
    from kvtransport.connection import Connection

DEFAULT_PROTECTION: Protection = "plain"


class Claim:
    """One end's claim while two endpoints are joined; it is over before anything could displace it."""

    def __init__(self, *, dialled: bool) -> None:
        self.dialled = dialled

    def displace(self) -> None:
        """Do nothing: a joined session takes the entry at once."""


def join(ours: Acceptor, theirs: Acceptor, wanted: Wanted) -> tuple[Connection | None, str]:
    """Return the Connection of a session between the two, or None and why there is none yet.

    Called by the thread of `ours`. Raises KVTransportError where there never will be one.
    """
    if ours is theirs:
        raise HandshakeError("an endpoint doesn't connect to itself")
    address = inproc.address_of(theirs.incarnation)
    with inproc.joining:
        here, there = Claim(dialled=True), Claim(dialled=False)
        ruling = ours.roster.claim(theirs.incarnation, here)
        if ruling is Ruling.CONNECTED:
            return ours.roster.joined(theirs.incarnation, wanted.connection, address), ruling.value
        if ruling is Ruling.FULL:
            raise ResourceLimit("as many peers are connected as max_connections allows")
        if ruling is not Ruling.GO:
            return None, ruling.value
        try:
            ruling = theirs.roster.claim(ours.incarnation, there, polite=True)
            if ruling is not Ruling.GO:
                return None, ruling.value
            _open(ours, theirs, wanted, address)
        finally:
            ours.roster.release(theirs.incarnation, here)
            theirs.roster.release(ours.incarnation, there)
    return ours.roster.joined(theirs.incarnation, wanted.connection, address), "the session was lost at once"


def _open(ours: Acceptor, theirs: Acceptor, wanted: Wanted, address: str) -> None:
    own, other = ours.hello(DEFAULT_PROTECTION), theirs.hello(DEFAULT_PROTECTION)
    suite, session_id = NullSuite(), os.urandom(16)
    try:
        mine, others = agree(own, other, suite), agree(other, own, suite)
    except Unfit as e:
        raise e.error from None
    proof = LinkProof(os.geteuid(), os.getpid(), "same process")
    session, peers = ours.engine.open_inproc_pair(
        theirs.engine, session_id=session_id, protection=mine.protection
    )
    with ours.roster.lock:
        found = Found(replace(mine, session_id=session_id, initiator=True), "inproc", proof, address)
        peer = ours.adopt(session, found, wanted, ready=True)
    back = Found(replace(others, session_id=session_id), "inproc", proof, None)
    with theirs.roster.lock:
        dialler = theirs.adopt(peers, back, None, ready=True)
    ours.log_path(peer, found)
    theirs.log_path(dialler, back)
