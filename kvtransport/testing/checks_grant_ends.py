"""Checks of who is let in by a grant, how often, and of a grant's every end.

Invariant: after an end nothing of the grant's blocks is delivered, so every check rewrites them and looks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from kvtransport.errors import (
    KVTransportError,
    PeerAborted,
    PermissionDenied,
    StaleGrant,
    TransferCancelled,
)
from kvtransport.grant import new_token
from kvtransport.testing.blocks import Blocks
from kvtransport.testing.check import check, same, true
from kvtransport.testing.checks_ends import states_of
from kvtransport.testing.checks_gates import HERE, OF, THERE, TO, let_go
from kvtransport.testing.harness import Harness
from kvtransport.testing.side import Side

WAIT_S: Final = 20
STRANGER: Final = "00" * 16
REWRITTEN: Final = 0xAB


def _pools(owner: Side, user: Side) -> None:
    owner.pool("of", OF)
    user.pool("to", TO)


def denied(user: Side, token: str, kind: type[KVTransportError], **options: Any) -> None:
    """The read ends with this error, and nothing of the destination has changed."""
    before = user.call("digests", name="to")
    user.read("no", token, "to", HERE, **options)
    error = user.error("no")
    same(type(error), kind, f"error {error!r}")
    same((error.key, error.quiesced, error.retryable), (token, True, False), "key, quiesced, retryable")
    same(states_of(error), dict.fromkeys(HERE, "poisoned"), "block states")
    same(user.call("digests", name="to"), before, "memory")


@check()
def one_read_finishes_a_grant(harness: Harness) -> None:
    """The first success is the reader's last read; what failed doesn't count."""
    with harness.rig() as rig:
        for owner, user in rig.both_ways():
            _pools(owner, user)
            token = owner.grant("g", "of", THERE)
            denied(user, token, PermissionDenied, subset=[0, 1, 2, 4])
            same(owner.state("g"), "open", "the grant")
            user.read("t", token, "to", HERE)
            user.result("t")
            same((owner.result("g"), owner.state("g")), ({}, "read"), "the grant")
            denied(user, token, StaleGrant)
            owner.revoke("g")
            same(owner.state("g"), "read", "the grant, revoked after its end")
            let_go(owner, user)


@check()
def any_number_of_reads_by_a_lease(harness: Harness) -> None:
    """While a lease is held reads finish nothing, and time stands still; its release does."""
    with harness.rig() as rig:
        for owner, user in rig.both_ways():
            _pools(owner, user)
            token = owner.grant("g", "of", THERE, ttl_s=30)
            for lease in ("l", "m"):
                user.hold(lease, token)
                user.held(lease)
            for at, id_ in enumerate(HERE):
                user.read("t", token, "to", [id_], subset=[at])
                user.result("t")
            user.release("l")
            user.result("l")
            user.read("t", token, "to", HERE)
            user.result("t")
            true(not owner.done("g"), "the grant ended before its last lease")
            user.release("m")
            same((owner.result("g"), owner.state("g")), ({}, "read"), "the grant")
            user.holds("to", TO.after(OF, HERE, THERE))
            denied(user, token, StaleGrant)
            let_go(owner, user)


@check()
def a_lease_outlives_the_ttl(harness: Harness) -> None:
    """A held grant doesn't expire; one that is let go of ends."""
    with harness.rig() as rig:
        for owner, user in rig.both_ways():
            _pools(owner, user)
            token = owner.grant("g", "of", THERE, ttl_s=1)
            user.hold("l", token)
            user.held("l")
            expired = owner.grant("other", "of", THERE, ttl_s=1)
            same(type(owner.error("other")), StaleGrant, "error of the one without a lease")
            same((owner.state("other"), owner.state("g")), ("expired", "open"), "states")
            denied(user, expired, PermissionDenied)
            user.read("t", token, "to", HERE)
            user.result("t")
            user.release("l")
            same(owner.result("g"), {}, "the grant's result")
            user.holds("to", TO.after(OF, HERE, THERE))
            let_go(owner, user)


@check()
def standing_grants(harness: Harness) -> None:
    """Over a whole pool, any number of reads; other blocks' reuse is nothing to others' grants."""
    with harness.rig() as rig:
        for owner, user in rig.both_ways():
            _pools(owner, user)
            token = owner.grant("g", "of", None, readers=None, ttl_s=None)
            owner.grant("other", "of", [7])
            for _ in range(20):
                user.read("t", token, "to", HERE, subset=list(THERE))
                user.result("t")
            user.holds("to", TO.after(OF, HERE, THERE))
            owner.reuse("of", [1])
            same((owner.state("g"), owner.state("other")), ("revoked", "open"), "states")
            same(type(owner.error("g")), TransferCancelled, "error")
            denied(user, token, StaleGrant, subset=list(THERE))
            owner.reuse("of", range(OF.count))
            same(owner.state("other"), "revoked", "the other one")
            let_go(owner, user)


def _ends() -> dict[str, Callable[[Side], None]]:
    return {
        "revoke": lambda owner: owner.revoke("g"),
        "reuse": lambda owner: owner.reuse("of", [THERE[2]]),
        "close": lambda owner: owner.call("close_pool", name="of"),
    }


@check()
def ended_before_the_read(harness: Harness) -> None:
    """Revoked, reused, expired, closed: PermissionDenied, never data; StaleGrant to who had been let in."""
    for how, end in _ends().items():
        with harness.rig() as rig:
            for owner, user in rig.both_ways():
                _pools(owner, user)
                token = owner.grant("g", "of", THERE, readers=None)
                known = owner.grant("k", "of", THERE, readers=None)
                user.read("t", known, "to", HERE)
                user.result("t")
                end(owner)
                owner.revoke("k")
                same(owner.state("g"), "revoked", f"after {how}")
                denied(user, token, PermissionDenied)
                denied(user, known, StaleGrant)
                user.call("close_pool", name="to")
                if how != "close":
                    owner.call("close_pool", name="of")


@check()
def ended_during_the_read(harness: Harness) -> None:
    """What is sealed is of before the end, though the owner rewrites at once; the rest is poisoned."""
    of, to = Blocks(32, 256 << 10, layers=2), Blocks(32, 256 << 10, layers=2, gap=8, seed=2)
    ends = [*_ends().items()][:2]
    with harness.rig() as rig:
        for n in range(12):
            owner, user = rig.both_ways()[n % 2]
            owner.pool("of", of)
            user.pool("to", to)
            token = owner.grant("g", "of", range(of.count))
            user.read("t", token, "to", range(to.count))
            ends[n % 4 // 2][1](owner)
            owner.fill("of", of, REWRITTEN)
            error = user.error("t")
            if error is None:
                user.holds("to", to.after(of, range(of.count), range(to.count)))
            else:
                true(type(error) in (StaleGrant, PermissionDenied), f"{error!r}")
                sealed = [block for block, state in states_of(error).items() if state == "sealed"]
                _hold_these(user, of, to, sealed)
            let_go(owner, user)


def _hold_these(user: Side, of: Blocks, to: Blocks, sealed: list[int]) -> None:
    """Move the sealed blocks' bytes out of the user's memory, and look at them."""
    user.call("keep_only", name="to", blocks=to.to_json(), ids=sealed)
    expected = to.memory()
    for view, sent in zip(to.views(expected), of.views(of.memory()), strict=True):
        view[:] = 0
        view[sealed] = sent[sealed]
    user.holds("to", expected)


@check()
def a_write_that_is_ended(harness: Harness) -> None:
    """When revoke or reuse returns no byte lands any more: the owner rewrites, and all of it stays."""
    of, to = Blocks(32, 256 << 10), Blocks(32, 256 << 10, gap=8, seed=2)
    with harness.rig() as rig:
        for n in range(12):
            user, owner = rig.both_ways()[n % 2]
            user.pool("of", of)
            owner.pool("to", to)
            token = owner.grant("g", "to", range(of.count), mode="write")
            user.write("t", token, "of", range(of.count))
            if n % 4 < 2:
                owner.revoke("g")
            else:
                owner.reuse("to", [3])
            owner.fill("to", to, REWRITTEN)
            error = user.error("t")
            same(error is None, owner.state("g") == "written", f"{error!r}, and the grant's state")
            expected = to.memory()
            for view in to.views(expected):
                view[:] = REWRITTEN
            owner.holds("to", expected)
            let_go(user, owner)


@check()
def not_for_this_peer(harness: Harness) -> None:
    """Named for another, of the other mode, out of range, unknown: PermissionDenied, and the grant stays."""
    with harness.rig() as rig:
        for owner, user in rig.both_ways():
            _pools(owner, user)
            denied(user, owner.grant("g", "of", THERE, to=STRANGER), PermissionDenied)
            same(owner.state("g"), "open", "the grant")
            denied(user, owner.grant("w", "of", THERE, mode="write"), PermissionDenied)
            denied(user, new_token(), PermissionDenied)
            denied(user, owner.grant("few", "of", THERE[:2]), PermissionDenied, subset=[0, 1, 2, 1 << 31])
            token = owner.grant("mine", "of", THERE, to="peer")
            user.read("t", token, "to", HERE)
            user.result("t")
            user.holds("to", TO.after(OF, HERE, THERE))
            let_go(owner, user)


@check()
def a_write_may_not_name_a_block_twice(harness: Harness) -> None:
    """Twice in the subset, or out of range: PermissionDenied and no byte; the same grant works afterwards."""
    with harness.rig() as rig:
        for user, owner in rig.both_ways():
            _pools(user, owner)
            token = owner.grant("g", "to", HERE, mode="write")
            for subset in ([0, 0], [1, 4]):
                user.write("no", token, "of", THERE[:2], subset=subset)
                same(type(user.error("no")), PermissionDenied, f"error for {subset}")
            owner.holds("to", TO.memory())
            user.write("t", token, "of", THERE)
            user.result("t")
            owner.holds("to", TO.after(OF, HERE, THERE))
            let_go(user, owner)


@check()
def refused_by_token(harness: Harness) -> None:
    """Who waits, or comes later, gets PeerAborted with the reason; a lease PermissionDenied."""
    with harness.rig() as rig:
        for owner, user in rig.both_ways():
            _pools(owner, user)
            for late in (False, True):
                token, lease = new_token(), new_token()
                if late:
                    owner.call("refuse", key=token, reason="prefill failed")
                user.read("t", token, "to", HERE, wait_grant_s=WAIT_S)
                if not late:
                    user.hold("l", lease, wait_grant_s=WAIT_S)
                    owner.call("refuse", key=token, reason="prefill failed")
                    owner.call("refuse", key=lease, reason="prefill failed")
                    same(type(user.error("l")), PermissionDenied, "the lease's error")
                error = user.error("t")
                same((type(error), error.reason), (PeerAborted, "prefill failed"), "error")
                user.holds("to", TO.memory())
            let_go(owner, user)


@check()
def waiting_ends_in_time(harness: Harness) -> None:
    """No grant within wait_grant_s; cancelled while it waits: the same token can be read afterwards."""
    with harness.rig() as rig:
        for owner, user in rig.both_ways():
            _pools(owner, user)
            token = new_token()
            denied(user, token, PermissionDenied, wait_grant_s=0.2)
            user.hold("l", token, wait_grant_s=0.2)
            same(type(user.error("l")), PermissionDenied, "the lease's error")
            user.read("t", token, "to", HERE, wait_grant_s=WAIT_S)
            user.cancel("t")
            same(type(user.error("t")), TransferCancelled, "error")
            owner.grant("g", "of", THERE, token=token)
            user.read("t", token, "to", HERE)
            user.result("t")
            user.holds("to", TO.after(OF, HERE, THERE))
            let_go(owner, user)
