"""The parts of `kvtransport bench` that need no second process: cases, pattern, figures, sizes, progress."""

import io
import sys

import numpy as np
import pytest

from bench import cases as bench_cases
from kvtransport.cli import bench
from kvtransport.cli.bench import cases, figures
from kvtransport.cli.bench.arena import Arena
from kvtransport.cli.bench.cases import CASES, Case, case_of
from kvtransport.cli.bench.figures import Figures
from kvtransport.cli.bench.progress import Progress
from kvtransport.cli.bench.verbs import Sample

SMALL = Case("s", "small", tensors=2, blocks=8, block_nbytes=64, ids=3)


@pytest.mark.parametrize("name", CASES)
def test_shapes_are_those_of_the_bench(name):
    ours, theirs = CASES[name], bench_cases.case_of(name)
    for field in ("tensors", "blocks", "block_nbytes", "ids", "id_step", "latency", "nbytes"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert cases.BATCH == bench_cases.LATENCY_BATCH
    assert cases.BATCH // cases.WARM_UP_SHARE == bench_cases.LATENCY_WARM_UPS


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [1, 2, 7, 128])
def test_ids_are_in_the_pool_and_none_comes_twice(name, scale):
    case = case_of(name, scale)
    for side in ("source", "destination"):
        ids = case.block_ids(5, side)
        assert ids.shape == (case.transfers, case.ids)
        assert len(np.unique(ids)) == ids.size
        assert ids.min() >= 0
        assert ids.max() < case.blocks
        assert (np.diff(np.sort(ids.ravel())) >= case.id_step).all()
        assert (ids == case.block_ids(5, side)).all()


def test_each_round_has_ids_of_its_own():
    for case in CASES.values():
        assert case.block_ids(5, "source").tolist() != case.block_ids(6, "source").tolist()
        assert case.block_ids(5, "source").tolist() != case.block_ids(5, "destination").tolist()


def test_a_scale_that_leaves_nothing():
    for name, case in CASES.items():
        assert case_of(name, case.blocks // case.id_step).ids == 1
        with pytest.raises(ValueError, match="can't be divided"):
            case_of(name, case.blocks // case.id_step + 1)
        with pytest.raises(ValueError, match="can't be divided"):
            case_of(name, 0)


# --- the pattern ---


@pytest.fixture
def arenas(endpoint):
    one = endpoint()
    source, destination = Arena(one, SMALL), Arena(one, SMALL)
    source.fill()
    return source, destination, np.array([7, 0, 3]), np.array([1, 2, 6])


def test_no_two_words_of_a_source_are_equal_and_none_is_zero(arenas):
    words = arenas[0].tensors.view(np.uint64)
    assert words.all()
    assert len(np.unique(words)) == words.size


def test_a_whole_copy_is_right(arenas):
    source, destination, theirs, ours = arenas
    destination.tensors[:, ours] = source.tensors[:, theirs]
    assert destination.wrong_blocks(theirs, ours) == 0
    destination.wipe()
    assert not destination.tensors.any()


@pytest.mark.parametrize(
    ("deed", "wrong"),
    [
        (lambda t: t[:, 1].fill(0), 2),  # a block that did not arrive, in both tensors
        (lambda t: t[1, 2, 13:14].fill(0), 1),  # a byte
        (lambda t: t[0].__setitem__([1, 2], t[0][[2, 1]]), 2),  # two that changed places
        (lambda t: t[1, 5, 63:].fill(9), 1),  # one byte where nothing was to land
        (lambda t: t.__setitem__(1, t[0]), 3),  # a tensor's bytes in another one
    ],
)
def test_what_is_wrong_is_counted(arenas, deed, wrong):
    source, destination, theirs, ours = arenas
    destination.tensors[:, ours] = source.tensors[:, theirs]
    deed(destination.tensors)
    assert destination.wrong_blocks(theirs, ours) == wrong


# --- figures ---


def samples(*seconds):
    return [Sample(times, 0.2, 0.4, "tcp") for times in seconds]


def test_rates_and_costs():
    case = CASES["a"]
    gb = case.nbytes / 1e9
    found = Figures.of(case, 1, "recv", samples((gb / 2,), (gb / 4,), (gb / 8,)), "how", "0.1.0")
    assert found.gb_per_s == pytest.approx({"median": 4, "least": 2, "most": 8})
    assert found.cpu_s_per_gb == pytest.approx({"here": 0.2 / gb, "there": 0.4 / gb})
    assert found.latency_us is None
    assert "4.00 GB/s (least 2.00, most 8.00)" in str(found)
    assert "not to be compared" not in str(found)


def test_latencies_leave_the_first_fifth_out():
    times = (1.0, 1.0, *(i * 1e-6 for i in range(1, 9)))
    found = Figures.of(CASES["b"], 1, "recv", samples(times, times), "how", "0.1.0")
    assert found.latency_us == pytest.approx({"p50": 5, "p99": 8, "count": 16})
    assert found.cpu_s_per_gb is None
    assert "p50 5.0 us, p99 8.0 us, of 16 transfers" in str(found)


def test_percentile_is_the_nearest_rank():
    assert figures.percentile(range(100), 0.5) == 50
    assert figures.percentile(range(100), 0.99) == 99
    assert figures.percentile([3], 0.99) == 3


# --- the command line ---


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1", 1), ("512MiB", 512 << 20), ("4 GiB", 4 << 30), ("64kib", 64 << 10)]
)
def test_sizes(text, nbytes):
    assert bench.size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1", "GiB", "4GB", "1.5GiB", "4XiB", "4GiBGiB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError):
        bench.size(text)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_is_one_line_that_goes(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(2)
    progress.step("connecting")
    progress.step("round 1 of 1")
    progress.close()
    written = sys.stderr.getvalue()
    assert "round 1 of 1" in written
    assert " 50% " in written
    assert "\n" not in written
    assert written.endswith("\r\x1b[K")


def test_no_progress_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = Progress(2)
    progress.step("connecting")
    progress.close()
    assert sys.stderr.getvalue() == ""
