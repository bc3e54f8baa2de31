"""Which way the bytes of a session go, and why not another: for `Connection.explain` and the log.

Here: the words. Not here: the choice itself (`places`, `direct`: by address and Config).

Invariant: a way that Config allows, that comes before the one in use in the order of preference, and that this
peer could have been reached by is never missing in silence: it is logged as a warning, with the remedy.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from kvtransport.acceptor.places import Places
from kvtransport.acceptor.reachability import same_process
from kvtransport.acceptor.roster import Found
from kvtransport.config import LATER_BACKENDS
from kvtransport.protocol.messages import Reachability
from kvtransport.types import Peer

_log = logging.getLogger("kvtransport.paths")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A way that isn't used. `remedy`: what would make it the way; empty: nothing could, or the user forbade it."""

    backend: str
    reason: str
    remedy: str = ""


def chosen(found: Found) -> str:
    """Return the line of the way in use."""
    how = found.proof.how if found.proof else "proved by its key"
    place = f"to {found.address}" if found.address else "dialled by the peer"
    lanes = f", {found.terms.lanes} lanes" if found.backend_name != "inproc" else ""
    return f"host memory: {found.backend_name}, {place}, protection {found.terms.protection}{lanes}; {how}"


def refusals(found: Found, places: Places, ours: Reachability) -> list[Refusal]:
    """Return the ways that are not used, though this version has them."""
    if found.backend_name == "inproc":
        return []
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


def lines(found: Found, places: Places, ours: Reachability) -> list[str]:
    """Return the lines of `Connection.explain`."""
    told = [chosen(found)]
    for refusal in refusals(found, places, ours):
        remedy = f"; {refusal.remedy}" if refusal.remedy else ""
        told.append(f"{refusal.backend}: refused: {refusal.reason}{remedy}")
    told.append(f"{', '.join(LATER_BACKENDS)}: refused: not in this version")
    return told


def log(peer: Peer, found: Found, places: Places, ours: Reachability) -> None:
    """Tell of a new session: one line for the way, a warning for a better one that could have been."""
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
