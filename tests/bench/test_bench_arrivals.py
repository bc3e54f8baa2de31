"""Case h's arithmetic: plans that every process computes alike, room that is never given twice, fairness."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bench import measure
from bench.arrivals import (
    BLOCK_NBYTES,
    CASE,
    CLASSES,
    ENDS,
    LARGE,
    RESERVE,
    Request,
    Room,
    alone,
    crowd,
    slowdowns,
    source_ids,
)

RATE = 7e9


def test_a_plan_is_the_same_everywhere_and_another_with_another_seed() -> None:
    assert crowd(1, 10, RATE) == crowd(1, 10, RATE)
    assert crowd(1, 10, RATE) != crowd(2, 10, RATE)
    request = crowd(1, 10, RATE)[3]
    assert (source_ids(1, request) == source_ids(1, request)).all()


def test_a_plan_has_as_many_of_each_class_in_the_order_of_time() -> None:
    plan = crowd(3, 40, RATE)
    assert {n: sum(r.blocks == n for r in plan) for n in CLASSES} == dict.fromkeys(CLASSES, 40)
    assert [r.index for r in plan] == list(range(len(plan)))
    assert [r.at_s for r in plan] == sorted(r.at_s for r in plan)
    assert {(r.sender, r.receiver) for r in plan} == set(itertools.product(range(ENDS), repeat=2))


def test_what_is_offered_is_the_rate_that_was_asked_for() -> None:
    plan = crowd(4, 2000, RATE)
    offered = sum(r.nbytes for r in plan) / plan[-1].at_s
    assert offered == pytest.approx(RATE, rel=0.05)
    assert plan[0].nbytes == plan[0].blocks * 2 * (1 << 20) == plan[0].blocks * BLOCK_NBYTES


def test_gaps_are_those_of_a_poisson_process() -> None:
    """Exponential: as much spread as mean, a median of ln 2, and no memory from one to the next."""
    gaps = np.diff([r.at_s for r in crowd(5, 2000, RATE)])
    mean = gaps.mean()
    assert gaps.std() / mean == pytest.approx(1, rel=0.05)
    assert np.median(gaps) / mean == pytest.approx(np.log(2), rel=0.05)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.05


def test_requests_alone_leave_each_other_time() -> None:
    plan = alone(256, 5, RATE)
    assert {r.blocks for r in plan} == {256}
    assert min(np.diff([r.at_s for r in plan])) > 3 * plan[0].nbytes / RATE


def test_blocks_of_a_request_are_distinct_and_there() -> None:
    for request in crowd(6, 2, RATE):
        ids = source_ids(6, request)
        assert len(set(ids.tolist())) == len(ids) == request.blocks
        assert ids.min() >= 0 and ids.max() < CASE.blocks


def request(index: int, blocks: int) -> Request:
    return Request(index, 0.0, blocks, 0, 0)


def admitted(room: Room, index: int, blocks: int) -> list[int] | None:
    room.enter(request(index, blocks))
    found = room.admit()
    return None if found is None else found[1].tolist()


def test_room_is_never_given_twice() -> None:
    room, capacity = Room(1), CASE.side_blocks("dst")
    given = [admitted(room, i, 16) for i in range(capacity // 16)]
    assert sorted(itertools.chain(*given)) == list(range(capacity))
    assert admitted(room, 1000, 1) is None
    room.leave(np.array(given[3]), np.arange(16))
    found = room.admit()
    assert found is not None
    assert found[0].index == 1000
    assert found[1][0] in given[3]
    assert room.waiting() == 0


def test_large_requests_wait_and_small_ones_pass_them() -> None:
    room, capacity = Room(1), CASE.side_blocks("dst")
    large = [admitted(room, i, 256) for i in range((capacity - RESERVE) // 256)]
    assert None not in large
    assert admitted(room, 100, LARGE) is None
    assert admitted(room, 101, 16) is not None
    assert room.waiting() == 1
    room.leave(np.array(large[0]), np.arange(256))
    found = room.admit()
    assert found is not None
    assert (found[0].index, len(found[1]), room.waiting()) == (100, LARGE, 0)


def test_room_knows_what_was_written_last() -> None:
    room = Room(1)
    room.leave(np.array([3, 9]), np.array([30, 90]))
    room.leave(np.array([9]), np.array([91]))
    source, here = room.contents()
    assert dict(zip(here.tolist(), source.tolist(), strict=True)) == {3: 30, 9: 91}


def test_slowdown_is_over_the_same_class_alone_in_the_same_round() -> None:
    first = [Request(0, 0.0, 1, 0, 0), Request(1, 0.1, 4, 1, 0)]
    second = [Request(0, 0.0, 4, 0, 0), Request(1, 0.1, 1, 2, 0)]
    bases = [{1: 10.0, 4: 40.0}, {1: 20.0, 4: 80.0}]
    found = slowdowns([[20.0, 160.0], [320.0, 20.0]], [first, second], bases)
    assert found == {0: 3.0, 1: 4.0, 2: 1.0}


def test_jain_s_index() -> None:
    assert measure.jain([2.5] * 4) == pytest.approx(1)
    assert measure.jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert measure.jain([1, 2]) == pytest.approx(0.9)
    assert measure.jain([10, 20]) == pytest.approx(measure.jain([1, 2]))  # a scale changes nothing
