"""The bench's arithmetic: ids, pattern, ratios. A bench that can't see wrong bytes proves nothing."""

from __future__ import annotations

import numpy as np
import pytest

from bench import measure, shm_targets, targets
from bench.arena import Arena
from bench.cases import LATENCY_WARM_UPS, Case, batch_ids, case_of, ids_of
from bench.rounds import CaseResult
from bench.rows import Row
from bench.run import Bench, parse
from bench.sample import Sample
from bench.ways import BACKENDS, Way

WHOLE = Case("t", "test", 3, 32, 512, 8)
SLICED = Case("t", "test", 4, 16, 512, 8, row_nbytes=64)
COMPACT = Case("t", "test", 4, 16, 512, 8, row_nbytes=64, compact_dst=True)


def copy(case: Case, src: Arena, dst: Arena, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Move a run as a transport would."""
    source, here = ids_of(case, seed, "src"), ids_of(case, seed, "dst")
    if not case.sliced:
        dst.tensors[:, here] = src.tensors[:, source]
        return source, here
    rows = src.tensors.reshape(case.tensors, case.blocks, -1, case.row_nbytes)
    half = case.row_nbytes // 2
    into = dst.tensors.reshape(
        case.tensors, case.blocks, rows.shape[2], half if case.compact_dst else case.row_nbytes
    )
    into[:, here, :, :half] = rows[:, source, :, :half]
    return source, here


@pytest.mark.parametrize("case", [WHOLE, SLICED, COMPACT])
def test_arena_accepts_exactly_the_right_bytes(case: Case) -> None:
    src, dst = Arena(case, "src"), Arena(case, "dst")
    source, here = copy(case, src, dst, 1)
    assert dst.wrong_blocks(source, here) == 0
    assert dst.wrong_blocks(np.roll(source, 1), here) == case.ids * case.tensors
    untouched = next(i for i in range(case.blocks) if i not in here)
    for block in (int(here[0]), untouched):
        dst.tensors[1, block, -1] ^= 1
        assert dst.wrong_blocks(source, here) == 1
        dst.tensors[1, block, -1] ^= 1


@pytest.mark.parametrize("case", [WHOLE, SLICED, COMPACT])
def test_arena_sees_that_nothing_arrived(case: Case) -> None:
    dst = Arena(case, "dst")
    source, here = ids_of(case, 1, "src"), ids_of(case, 1, "dst")
    assert dst.wrong_blocks(source, here) == case.ids * case.tensors


@pytest.mark.parametrize("name", ["a", "d", "e", "f", "n:1000", "n:40000"])
def test_ids_are_equal_everywhere_distinct_and_in_range(name: str) -> None:
    case = case_of(name)
    for side in ("src", "dst"):
        ids = ids_of(case, 3, side)
        assert (ids == ids_of(case, 3, side)).all()
        assert len(ids) == case.ids
        assert ids.min() >= 0
        assert ids.max() < case.side_blocks(side)
    assert len(set(ids_of(case, 3, "dst").tolist())) == case.ids
    assert not (np.diff(ids_of(case, 3, "src")) == 1).all()


def test_pieces_of_d_and_n_are_never_adjacent() -> None:
    d = case_of("d")
    assert (ids_of(d, 1, "src") % 2 == 0).all()
    assert (ids_of(d, 1, "dst") % 2 == 0).all()
    assert not (np.diff(ids_of(case_of("n:100000"), 1, "src")) == 1).any()


def test_the_cases_move_what_they_say() -> None:
    assert case_of("a").nbytes == 8192 * 65536
    assert case_of("d").nbytes == 32768 * 4096
    assert case_of("e").nbytes == 61 * 64 * 73728
    assert case_of("f").nbytes == 262144 * 1024
    assert case_of("n:5").nbytes == 5 * 4096


def test_runs_of_a_batch_go_to_different_blocks() -> None:
    ids = batch_ids(case_of("b"), 1, "dst", 200)
    assert ids.shape == (200, 1)
    assert len(set(ids.ravel().tolist())) == 200


def result_with(**rates: list[float]) -> CaseResult:
    result = CaseResult(case_of("a"))
    for name, values in rates.items():
        result.samples[name.replace("_", "-")] = {
            turn: Sample(10**9, 1 / rate, 0.1, True) for turn, rate in enumerate(values)
        }
    return result


def test_ratio_is_made_inside_a_round() -> None:
    # The machine became four times slower in mid-run; the ratio of each round says the same.
    result = result_with(tcp=[8.0, 8.0, 2.0], R2=[10.0, 10.0, 2.5])
    assert result.ratio("tcp", "R2") == pytest.approx(0.8)
    assert result.ratio("tcp", "nobody") is None


def test_slow_limits_fail_the_bench() -> None:
    good = result_with(memcpy1=[10.0], R2=[6.1], memfd1=[9.0], vmread1=[5.1])
    assert targets.slow_limits({"a": good}) == []
    bad = result_with(memcpy1=[10.0], R2=[5.9], memfd1=[8.0], vmread1=[4.9])
    assert len(targets.slow_limits({"a": bad})) == 3
    assert len(targets.slow_limits({"a": result_with(memcpy1=[10.0])})) == 3


def test_rows_say_whether_a_target_is_met() -> None:
    rows = {row.name: row for row in targets.rows_of({"a": result_with(tcp=[9.6], R2=[10.0])})}
    assert rows["(a) 512 MiB in 64 KiB pieces / R2"].met is True
    assert rows["(a) with digests / R2"].met is None
    assert Row.at_most("x", 2.0, 1.0).met is False


def test_percentile() -> None:
    values = [float(i) for i in range(100)]
    assert measure.percentile(values, 0.5) == 50
    assert measure.percentile(values, 0.99) == 99
    assert measure.percentile([7.0], 0.99) == 7


@pytest.mark.parametrize(
    ("row", "status"),
    [
        (Row("slow", "0.1 x", ">= 1", False), 0),
        (Row.failed("g", "2 blocks hold wrong bytes"), 1),
        (Row("awaits", "1 foreign blocks", "0", False, broken=True), 1),
    ],
)
def test_wrong_bytes_fail_the_bench_and_slowness_alone_does_not(row: Row, status: int) -> None:
    bench = Bench(parse(["--cases", "", "--backends", "", "--quiet"]))
    bench.rows = [row]
    assert bench._finish() == status


def test_a_latency_sample_leaves_the_warm_ups_out() -> None:
    sample = Sample.of_latencies(4, [99.0] * LATENCY_WARM_UPS + [1.0, 3.0])
    assert (sample.latencies_us, sample.first_us, sample.seconds) == ([1.0, 3.0], 99.0, 4e-6)


def test_rounding_does_not_hide_a_missed_target() -> None:
    row = Row.at_least("a", 0.7996, 0.8)
    assert (row.measured, row.met) == ("0.7996 x", False)
    assert Row.at_most("a", 1.234, 1.2).measured == "1.23 x"


def test_a_name_says_what_is_run() -> None:
    case = case_of("a")
    plain, one = Way("shm-plain-read"), Way("shm-1")
    assert (plain.shares, plain.mapped, plain.reads) == (True, False, True)
    assert (one.shares, one.mapped, one.reads) == (True, True, False)
    assert one.config({}, case)["movers"] == len(one.config({}, case)["cpus"]) == 1
    assert one.config({"movers": 3}, case)["movers"] == 3
    for name in BACKENDS:
        config = Way(name).config({}, case)
        assert ("shm" in config["backends"]) == name.startswith("shm"), name
        assert (config["protection"] == "digest") == (name == "tcp-digest"), name


def test_memory_targets_are_ratios_of_the_same_round() -> None:
    result = result_with(shm=[24.0, 12.0], shm_1=[10.0, 5.0], memfd2=[24.0, 12.0], memfd1=[10.0, 10.0])
    rows = {row.name: row for row in shm_targets.rows_of({"a": result})}
    assert rows["(a) shm / memfd2"].met is True
    assert rows["(a) shm-1 / memfd1"].met is False
    assert rows["CPU s/GB (a) shm / memfd2"].met is True
    assert not any("nixl" in name or "plain" in name for name in rows)


def test_a_read_of_a_piece_is_held_against_time_and_nixl() -> None:
    result = CaseResult(case_of("c"))
    for name, us in (("shm-read", 2.4), ("nixl-read", 2.3)):
        result.samples[name] = {0: Sample(4096, 1.0, 0.0, True, latencies_us=[us] * 5)}
    rows = {row.name: row.met for row in shm_targets.rows_of({"c": result})}
    assert rows == {"(c) shm-read of 4 KiB, p50": True, "(c) shm-read p50 / nixl-read": False}


def test_an_arena_that_can_be_mapped_holds_the_same_bytes() -> None:
    from kvtransport.memory.allocation import HostMemory

    src = Arena(WHOLE, "src", mapped=True)
    assert isinstance(src._memory, HostMemory)
    assert (src.data == Arena(WHOLE, "src").data).all()
