"""Which way the bytes of a session go, and why not another: for `Connection.explain` and the log.

Here: the words. Not here: the choice itself (`places`, `direct`: by address and Config).

Invariant: a way that Config allows, that comes before the one in use in the order of preference, and that this
peer could have been reached by is never missing in silence: it is logged as a warning, with the remedy.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from kvtransport.acceptor import sharing
from kvtransport.acceptor.loop import Loop
from kvtransport.acceptor.places import Places
from kvtransport.acceptor.reachability import same_process
from kvtransport.acceptor.roster import Found, Roster
from kvtransport.config import LATER_BACKENDS
from kvtransport.protocol.messages import Reachability
from kvtransport.types import Peer

_log = logging.getLogger("kvtransport.paths")

BROKE_S: Final = 0.5
"""So long a session must outlive its shared memory for that to be worth a line."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A way that isn't used. `remedy`: what would make it the way; empty: nothing could, or the user forbade it."""

    backend: str
    reason: str
    remedy: str = ""


Shared = tuple[str, str]
"""Of a session's channel of shared memory: "none", "awaited" or "up", and what is wrong with it."""


def chosen(found: Found, shared: Shared = ("none", "")) -> str:
    """Return the line of the way in use."""
    how = found.proof.how if found.proof else "proved by its key"
    place = f"to {found.address}" if found.address else "dialled by the peer"
    lanes = f", {found.terms.lanes} lanes" if found.backend_name != "inproc" else ""
    stream = f"{found.backend_name}, {place}, protection {found.terms.protection}{lanes}"
    if shared[0] != "up":
        return f"host memory: {stream}; {how}"
    return f"host memory: shm, protection plain: the receiver copies; beside it {stream}; {how}"


def refusals(found: Found, places: Places, ours: Reachability, shared: Shared | None = None) -> list[Refusal]:
    """Return the ways that are not used, though this version has them. `shared`: None: it isn't known yet."""
    if found.backend_name == "inproc":
        return []
    return [*_of_inproc(found, places, ours), *_of_shared(found, places, ours, shared)]


def _of_shared(found: Found, places: Places, ours: Reachability, shared: Shared | None) -> list[Refusal]:
    reason, remedy = sharing.why_not(found, ours, places.names)
    if reason:
        return [Refusal("shm", reason, remedy)]
    if shared is None:
        return []
    state, wrong = shared
    if state == "up":
        remedy = "allocate it with Endpoint.allocate, or see kvtransport doctor"
        return [Refusal("shm", f"for memory of your own: {wrong}", remedy)] if wrong else []
    if wrong:
        return [Refusal("shm", wrong, "see kvtransport doctor")]
    return [Refusal("shm", "its channel has not come yet")]


def _of_inproc(found: Found, places: Places, ours: Reachability) -> list[Refusal]:
    if not same_process(ours, found.hello.reachability):
        return [Refusal("inproc", "the peer is another process")]
    if forbidden := places.why_not("inproc"):
        return [Refusal("inproc", f"{forbidden} here")]
    if "inproc" not in found.hello.features:
        return [Refusal("inproc", "the Config of the peer's endpoint doesn't allow it")]
    if found.address is None:
        return [Refusal("inproc", "the peer dialled a socket address of this endpoint")]
    remedy = "connect to what the other endpoint's descriptor() returns"
    return [Refusal("inproc", "the peer was dialled by its socket address", remedy)]


def lines(found: Found, places: Places, ours: Reachability, shared: Shared) -> list[str]:
    """Return the lines of `Connection.explain`."""
    told = [chosen(found, shared)]
    for refusal in refusals(found, places, ours, shared):
        remedy = f"; {refusal.remedy}" if refusal.remedy else ""
        told.append(f"{refusal.backend}: refused: {refusal.reason}{remedy}")
    told.append(f"{', '.join(LATER_BACKENDS)}: refused: not in this version")
    return told


def log(peer: Peer, found: Found, places: Places, ours: Reachability) -> None:
    """Tell of a new session: one line for the way, a warning for a better one that could have been.

    Of shared memory only what keeps it from being tried: `follow_shared` tells the rest.
    """
    _log.info("session with %s: %s", peer, chosen(found))
    order = places.names
    for refusal in refusals(found, places, ours):
        better = refusal.backend in order and order.index(refusal.backend) < order.index(found.backend_name)
        if better and refusal.remedy:
            _log.warning(
                "%s is the better way to %s and was refused: %s; %s",
                refusal.backend,
                peer,
                refusal.reason,
                refusal.remedy,
            )


def follow_shared(loop: Loop, roster: Roster, session_id: bytes, news: str, why: str) -> None:
    """Tell what became of a session's shared memory: `news` is "up", "refused" or "broke".

    A peer that ends closes all that it has, and shared memory is seen to break before its session is: that is told
    by the session's end alone.
    """

    def tell(now: float) -> None:
        for connection in roster.of_session(session_id):
            if connection.state != "lost":
                log_shared(connection.peer, news, why)

    if news == "broke":
        loop.call_at(loop.now() + BROKE_S, tell)
    else:
        tell(loop.now())


def log_shared(peer: Peer, news: str, why: str) -> None:
    """Say it; see `follow_shared`."""
    if news == "up":
        _log.info("memory is shared with %s", peer)
    elif news == "broke":
        _log.warning(
            "memory is no longer shared with %s, whose session goes on without: %s; a new connection shares it again",
            peer,
            why,
        )
    else:
        _log.warning("shm is the better way to %s and was refused: %s; see kvtransport doctor", peer, why)
