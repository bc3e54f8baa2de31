"""Any sequence of grants, leases, reads, revokes and reuses: a model says who may read what, and what it is.

The owner's blocks are rewritten whenever no open grant covers them; each generation has words of its own, so that a
read that the model forbids can't pass for one that it allows. Over shared memory the pools are mapped, and reads of
grants for the reader alone ask nobody.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import kvtransport as kvt
from tests.property.loopback import LIMIT_S, Link
from tests.waiting import until

BLOCKS, WORDS = 6, 700
ids = st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=4)


class Model:
    """What one grant is, as the rules of grants say it."""

    def __init__(self, handle: kvt.Grant, blocks: list[int], standing: bool) -> None:
        self.handle, self.blocks, self.standing = handle, blocks, standing
        self.state = "open"
        self.known = False  # to the reader: it was let in
        self.leases: list[kvt.Lease] = []

    def finish(self) -> None:
        if not self.standing:
            self.state = "read"


class Grants(RuleBasedStateMachine):
    """One owner, one reader. Every step is over at both ends before the next one."""

    pair = None  # the connected endpoints
    allocates = False  # memory that the other side maps
    unasked = 0  # reads that were over when their call returned

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = self.blocks(self.pair.ours), self.blocks(self.pair.theirs)
        self.of, self.to = self.pair.ours.register(self.source), self.pair.theirs.register(self.target)
        self.generation = 0
        self.grants: list[Model] = []
        self.write(range(BLOCKS))

    def teardown(self) -> None:
        self.of.close(timeout=LIMIT_S)
        self.to.close(timeout=LIMIT_S)
        for grant in self.grants:
            assert grant.handle.done()

    def blocks(self, endpoint: kvt.Endpoint) -> np.ndarray:
        if not self.allocates:
            return np.zeros((BLOCKS, WORDS), np.int64)
        return np.frombuffer(endpoint.allocate(nbytes=BLOCKS * WORDS * 8), np.int64).reshape(BLOCKS, WORDS)

    def write(self, blocks) -> None:
        self.generation += 1
        for block in blocks:
            self.source[block] = self.generation * BLOCKS + block

    def pick(self, data) -> Model:
        return data.draw(st.sampled_from(self.grants), "grant")

    @rule(blocks=ids, standing=st.booleans(), named=st.sampled_from([True, True, True, False]))
    def grant(self, blocks, standing, named) -> None:
        readers, to = None if standing else 1, self.pair.out.peer if named else None
        self.grants.append(Model(self.of.grant(blocks, readers=readers, to=to), blocks, standing))

    @rule(blocks=ids, place=st.integers(0, BLOCKS - 1), comes=st.booleans())
    def grant_that_is_waited_for(self, blocks, place, comes) -> None:
        token, before = kvt.new_token(), self.target.copy()
        read = self.pair.back.read_blocks(
            token, self.to, [place], subset=[len(blocks) - 1], wait_grant_s=LIMIT_S
        )
        if not comes:
            self.pair.out.refuse(token, "not this one")
            with pytest.raises(kvt.PeerAborted, match="not this one"):
                read.result(LIMIT_S)
            assert (self.target == before).all()
            return
        model = Model(self.of.grant(blocks, token=token), blocks, False)
        read.result(LIMIT_S)
        before[place] = self.source[blocks[-1]]
        assert (self.target == before).all()
        model.known = True
        model.finish()
        self.grants.append(model)

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def hold(self, data) -> None:
        model = self.pick(data)
        lease = self.pair.back.hold(model.handle.token)
        until(lambda: lease.held or lease.done())
        assert lease.held is (model.state == "open")
        if lease.held:
            model.known = True
            model.leases.append(lease)
        else:
            error = lease.exception()
            assert type(error) is (kvt.StaleGrant if model.known else kvt.PermissionDenied)

    @precondition(lambda self: any(model.leases for model in self.grants))
    @rule(data=st.data())
    def release(self, data) -> None:
        model = data.draw(st.sampled_from([one for one in self.grants if one.leases]), "grant")
        model.leases.pop(data.draw(st.integers(0, len(model.leases) - 1), "lease")).release()
        if not model.leases and model.state == "open":
            model.finish()

    @precondition(lambda self: self.grants)
    @rule(data=st.data(), beyond=st.booleans())
    def read(self, data, beyond) -> None:
        model, before = self.pick(data), self.target.copy()
        last = len(model.blocks) - 1
        positions = data.draw(st.lists(st.integers(0, last), min_size=1, max_size=BLOCKS - 1), "positions")
        places = data.draw(st.permutations(range(BLOCKS)), "places")[: len(positions) + beyond]
        positions += [last + 1] * beyond
        read = self.pair.back.read_blocks(model.handle.token, self.to, places, subset=positions)
        type(self).unasked += read.done()
        if model.state != "open" or beyond:
            with pytest.raises(kvt.StaleGrant if model.known else kvt.PermissionDenied) as caught:
                read.result(LIMIT_S)
            assert sorted(caught.value.failed_block_ids) == sorted(places)
        else:
            read.result(LIMIT_S)
            before[places] = self.source[[model.blocks[at] for at in positions]]
            model.known = True
            if not model.leases:
                model.finish()
        assert (self.target == before).all()

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def revoke(self, data) -> None:
        self.end([self.pick(data)], lambda models: models[0].handle.revoke())

    @rule(blocks=ids)
    def reuse(self, blocks) -> None:
        hit = [model for model in self.grants if set(model.blocks) & set(blocks)]
        self.end(hit, lambda _: self.of.reuse(blocks))
        self.write(set(blocks))

    def end(self, models, how) -> None:
        how(models)
        for model in models:
            if model.state == "open":
                model.state = "revoked"
                assert isinstance(model.handle.exception(), kvt.TransferCancelled)
                for lease in model.leases:
                    with pytest.raises(kvt.StaleGrant):
                        lease.result(LIMIT_S)
            model.leases = []

    @invariant()
    def the_owner_sees_the_model(self) -> None:
        for model in self.grants:
            if model.state == "open":
                assert (model.handle.state, model.handle.done()) == ("open", False)
            else:  # what the reader has done is told on its way
                until(model.handle.done, LIMIT_S)
                assert model.handle.state == model.state


LINKS = [Link("tcp"), Link("inproc"), Link("tcp", "digest", 2, 1200), Link("shm")]


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_grants_keep_to_the_model(pair, link):
    shared = link.way == "shm"
    machine = type("Grants", (Grants,), {"pair": pair(link), "allocates": shared})
    health = [HealthCheck.too_slow]
    quick = settings(max_examples=130, stateful_step_count=25, deadline=None, suppress_health_check=health)
    run_state_machine_as_test(machine, settings=quick)
    assert not shared or machine.unasked > 5
