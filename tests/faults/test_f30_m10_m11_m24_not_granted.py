"""F30, M10, M11, M24: tokens and pieces that aren't the peer's: an error each, no byte, and answers all alike."""

import numpy as np
import pytest

from kvtransport import Config, Endpoint, new_token
from kvtransport.errors import GrantError, PermissionDenied, StaleGrant
from kvtransport.grant import raw_of
from tests.faults.grant_frames import Granted, hold, read, write
from tests.faults.hostile import PIECE
from tests.faults.peers import IDS, OF, TO
from tests.waiting import until

COUNT, FEW = 8, 3
LIMIT_S = 20


class Tenants:
    """An owner with grants in every state, of which tenant B may use some and tenant A none."""

    def __init__(self) -> None:
        self.owner = Endpoint(Config(backends=("tcp",)))
        self.where = self.owner.listen("127.0.0.1:0")
        self.b = Endpoint(Config(backends=("tcp",)))
        self.to_owner = self.b.connect(self.where, timeout=LIMIT_S)
        self.theirs = self.owner.accept(LIMIT_S)
        self.memory = np.arange(COUNT * PIECE, dtype=np.uint32).astype(np.uint8).reshape(COUNT, PIECE)
        self.before = self.memory.copy()
        self.pool = self.owner.register(self.memory)
        self.pool_of_b = self.b.register(np.zeros((COUNT, PIECE), np.uint8))

    def tokens(self, mode: str) -> dict[str, str]:
        """Return tokens that say nothing to A, by what is the matter with them."""
        grant, foreign = self.pool.grant, self.theirs.peer
        grants = {
            "another's": grant([0, 1], mode=mode, to=foreign),
            "of the other mode": grant([0, 1], mode="write" if mode == "read" else "read", to=foreign),
            "revoked": grant([0, 1], mode=mode),
            "expired": grant([0, 1], mode=mode, ttl_s=0),
            "reused": grant([7], mode=mode),
            "full": grant([0, 1], mode=mode, ttl_s=None),
            "finished": grant([0], mode=mode),
        }
        grants["revoked"].revoke()
        self.pool.reuse([7])
        move = self.to_owner.read_blocks if mode == "read" else self.to_owner.write_blocks
        self.leases = [self.to_owner.hold(grants["full"].token)]
        move(grants["full"].token, self.pool_of_b, [0, 1]).result(LIMIT_S)
        move(grants["finished"].token, self.pool_of_b, [0]).result(LIMIT_S)
        for name in ("expired", "finished", "reused"):
            until(grants[name].done)
        if mode == "write":
            self.memory[:] = self.before
        return {name: made.token for name, made in grants.items()} | {"unknown": new_token()}

    def close(self) -> None:
        self.owner.close()
        self.b.close()


@pytest.fixture
def tenants():
    made = Tenants()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("mode", "make"), [("read", read), ("write", write), ("read", hold), ("write", hold)]
)
def test_m10_m24_answers_are_alike(tenants, mode, make):
    """Tenant A shows the true tokens of B and random ones: byte for byte the same, and nothing has moved."""
    tokens = tenants.tokens(mode)
    if make is hold:
        tokens.pop("of the other mode")
    with Granted(tenants.where) as a:
        answers = {name: a.ask(make, raw_of(token)) for name, token in tokens.items()}
        again = {name: a.ask(make, raw_of(token)) for name, token in tokens.items()}
    assert len({*answers.values(), *again.values()}) == 1, answers
    assert (tenants.memory == tenants.before).all()
    assert len(tenants.owner.connections()) >= 1
    tenants.to_owner.send_message(b"still here").result(LIMIT_S)


@pytest.mark.parametrize(("mode", "make"), [("read", read), ("write", write)])
def test_m11_pieces_that_are_not_granted(tenants, mode, make):
    """Out of range, by one or by all, beside good ones; heads that there aren't; for a write a block twice."""
    grant = tenants.pool.grant(range(FEW), mode=mode, ttl_s=None)
    wrong = [
        {"positions": (FEW,)},
        {"positions": (0, 1, FEW)},
        {"positions": ((1 << 32) - 1,)},
        {"positions": (1 << 31, 0)},
        {"heads": (0, 1)},
        {"heads": ((1 << 32) - 1, 2)},
    ]
    if mode == "write":
        wrong.append({"positions": (1, 1)})
    with Granted(tenants.where) as a:
        unknown = a.ask(make, raw_of(new_token()))
        for options in wrong:
            assert a.ask(make, raw_of(grant.token), **options) == unknown, options
    assert grant.state == "open"
    assert (tenants.memory == tenants.before).all()
    tenants.pool.close(timeout=LIMIT_S)


def test_f30_five_cases(tcp):
    """vLLM 52234: unknown, out of range, consumed, stale, expired: a GrantError each, the destination untouched."""
    with tcp.linked() as rig:
        owner, reader = rig.peer, rig.here
        owner.pool("of", OF)
        reader.pool("to", TO)
        consumed = owner.grant("consumed", "of", IDS)
        reader.read("first", consumed, "to", IDS)
        reader.result("first")
        stale = owner.grant("stale", "of", IDS, readers=None)
        reader.read("second", stale, "to", IDS)
        reader.result("second")
        owner.reuse("of", [IDS[0]])
        owner.fill("of", OF, 0xEE)
        expired = owner.grant("expired", "of", IDS, ttl_s=0)
        owner.error("expired")
        small = owner.grant("small", "of", IDS[:2])
        cases = {
            new_token(): (PermissionDenied, {}),
            small: (PermissionDenied, {"subset": [0] * (len(IDS) - 1) + [2]}),
            consumed: (StaleGrant, {}),
            stale: (StaleGrant, {}),
            expired: (PermissionDenied, {}),
        }
        for n, (token, (kind, options)) in enumerate(cases.items()):
            reader.read(f"{n}", token, "to", IDS, **options)
            error = reader.error(f"{n}")
            assert type(error) is kind, error
            assert isinstance(error, GrantError)
            assert token not in str(error)
            assert error.failed_block_ids == list(IDS)
        reader.holds("to", TO.after(OF, IDS, IDS))


def test_f29_abort_storm_of_reads(tcp):
    """Nine of ten are aborted, by the reader or by the owner: the rest has its bytes, and all blocks are free."""
    count, there, here = 2000, IDS[:2], IDS[2:4]
    sent = OF.views(OF.memory())[0][list(there)]
    with tcp.linked(lanes=2) as rig:
        owner, reader = rig.peer, rig.here
        owner.pool("of", OF)
        reader.pool("to", TO)
        landed = TO.views(reader.actor.memory["to"])[0]
        sound = 0
        for n in range(count):
            reader.read("t", owner.grant("g", "of", there), "to", here)
            if n % 10:
                (reader.cancel if n % 2 else owner.revoke)("t" if n % 2 else "g")
            error = reader.error("t")
            assert error is None or n % 10, error
            if error is None:
                sound += 1
                assert (landed[list(here)] == sent).all()
            reader.fill("to", TO, 0)  # at once: nothing may come any more
            owner.revoke("g")
        assert sound >= count // 10
        assert not landed.any()
        reader.call("close_pool", name="to")
        owner.call("close_pool", name="of")
