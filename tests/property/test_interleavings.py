"""Any interleaving of sends, receives, cancels and gated layers: right bytes, one outcome a side, both agree.

Several transfers at once, each with blocks of its own in one pair of pools. Each is a little program (its sends,
receives, releases, cancels) and hypothesis shuffles the steps of all of them into one order.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import kvtransport as kvt
from kvtransport.testing import Blocks
from tests.property.loopback import LIMIT_S, LINKS, Pair, sized

keys = itertools.count()
LAYERS = 3
PER_TRANSFER = 3
quick = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
STEPS = ("send", "recv", "cancel send", "cancel recv", "release 0", "release 1", "release 2")


@dataclass
class Plan:
    gated: bool
    by_word: bool
    steps: list[str]

    @property
    def cancelled(self) -> bool:
        return any(step.startswith("cancel") for step in self.steps)

    @property
    def succeeds(self) -> bool:
        return {"send", "recv"} <= set(self.steps) and not self.cancelled


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    gated = draw(st.booleans())
    steps = draw(st.sampled_from([["send", "recv"], ["send", "recv"], ["send", "recv"], ["send"], ["recv"]]))
    cancels = draw(
        st.sampled_from([[], [], ["cancel send"], ["cancel recv"], ["cancel send", "cancel recv"]])
    )
    releases = [f"release {i}" for i in draw(st.permutations(range(LAYERS)))] if gated else []
    return Plan(
        gated, draw(st.booleans()), [*steps, *releases, *(c for c in cancels if c.split()[1] in steps)]
    )


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[Plan], list[tuple[int, str]]]:
    made = draw(st.lists(plans(), min_size=1, max_size=8))
    tickets = [at for at, plan in enumerate(made) for _ in plan.steps]
    left = [list(draw(st.permutations(plan.steps))) for plan in made]
    return made, [(at, left[at].pop(0)) for at in draw(st.permutations(tickets))]


class Run:
    """One example."""

    def __init__(self, ends: Pair, made: list[Plan], block_nbytes: int) -> None:
        self.ends, self.plans = ends, made
        count = PER_TRANSFER * len(made)
        self.of = Blocks(count, block_nbytes, layers=LAYERS, seed=1)
        self.to = Blocks(count, block_nbytes, layers=LAYERS, gap=3, seed=2)
        self.memory = self.of.memory(), self.to.memory()
        self.ours = ends.ours.register(self.of.views(self.memory[0]))
        self.theirs = ends.theirs.register(self.to.views(self.memory[1]))
        self.gates = [ends.ours.layer_gate(LAYERS) for _ in made]
        self.keys = [f"i{next(keys)}" for _ in made]
        self.handles: dict[tuple[int, str], kvt.Transfer] = {}

    def ids(self, at: int) -> list[int]:
        return list(range(at * PER_TRANSFER, (at + 1) * PER_TRANSFER))

    def places(self, at: int) -> list[int]:
        return [self.to.count - 1 - i for i in self.ids(at)]

    def step(self, at: int, name: str) -> None:
        plan, options = self.plans[at], {"key": self.keys[at], "match_timeout_s": LIMIT_S}
        if name == "send":
            after = self.gates[at] if plan.gated else None
            self.handles[at, name] = self.ends.out.send_blocks(
                self.ours, self.ids(at), after=after, **options
            )
        elif name == "recv":
            self.handles[at, name] = self.ends.back.recv_blocks(self.theirs, self.places(at), **options)
        elif name.startswith("release"):
            if plan.by_word:
                self.gates[at].word[0] += 1
            else:
                self.gates[at].mark_ready(int(name.split()[1]))
        elif handle := self.handles.get((at, name.split()[1])):
            handle.cancel()

    def finish(self, at: int) -> None:
        """Wait for what must end by itself; cancel what has no partner."""
        plan = self.plans[at]
        mine = {side: self.handles.get((at, side)) for side in ("send", "recv")}
        if plan.succeeds:
            for side in ("recv", "send"):
                result = mine[side].result(LIMIT_S)
                assert result.nbytes == LAYERS * PER_TRANSFER * self.of.nbytes
                assert mine[side].state == "done"
            return
        for handle in mine.values():
            if handle is not None:
                handle.cancel()
                assert kvt.wait([handle], LIMIT_S).done
        got, sent = (handle and handle.exception() for handle in (mine["recv"], mine["send"]))
        for handle, error in ((mine["recv"], got), (mine["send"], sent)):
            if handle is not None:
                assert isinstance(error, kvt.TransferCancelled | kvt.PeerAborted | None)
                assert handle.state == {"TransferCancelled": "cancelled", "PeerAborted": "failed"}.get(
                    type(error).__name__, "done"
                )
        received = mine["recv"] is not None and got is None
        assert not (mine["send"] is not None and sent is None and not received), "sent and not received"
        if received:
            event("success before the cancel")
        if sent is not None and sent.delivered is False:
            assert not received, "the source was told that it isn't delivered"

    def check_bytes(self) -> None:
        expected, sent = self.to.memory(), self.of.views(self.of.memory())
        views, found = self.to.views(expected), self.to.views(self.memory[1])
        for at in range(len(self.plans)):
            handle = self.handles.get((at, "recv"))
            error = handle and handle.exception()
            states = {} if error is None else {b: s for ids in error.blocks.values() for b, s in ids.items()}
            for i, j in zip(self.ids(at), self.places(at), strict=True):
                for layer in range(LAYERS):
                    if handle is not None and (error is None or states.get(j) == "sealed"):
                        views[layer][j] = sent[layer][i]
                    elif states.get(j) == "poisoned":
                        views[layer][j] = found[layer][j]  # whatever has landed
        for is_, must in zip(self.memory[1], expected, strict=True):
            assert np.array_equal(is_, must)


@pytest.mark.parametrize("link", LINKS, ids=str)
@quick
@given(
    schedule=schedules(),
    nbytes=st.sampled_from([1, 100, 5000, 60_000]),
    data=st.data(),
)
def test_any_interleaving(pair, link, schedule, nbytes, data) -> None:
    made, steps = schedule
    ends = pair(data.draw(sized(link, lanes=[1, 2, 4], chunks=[500, 1200, 1 << 20]), "link"))
    run = Run(ends, made, nbytes)
    for at, name in steps:
        run.step(at, name)
    for at in range(len(made)):
        run.finish(at)
    run.check_bytes()
    run.ours.close(timeout=LIMIT_S)
    run.theirs.close(timeout=LIMIT_S)
    run.check_bytes()
