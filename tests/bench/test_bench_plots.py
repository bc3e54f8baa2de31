"""Plots: a file for each thing that a document has, and a refusal before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import plots, report, run
from bench.cases import case_of
from bench.rounds import CaseResult
from bench.sample import Sample

PNG = b"\x89PNG\r\n\x1a\n"
CROWD = {
    "load": 0.7,
    "jain": 0.99,
    "loaded_us": {str(n): [300.0 * n, 400.0 * n] for n in (1, 4, 16, 64, 256)},
    "alone_us": {str(n): [250.0 * n] for n in (1, 4, 16, 64, 256)},
}


def result(case: str, **samples: list[Sample]) -> CaseResult:
    return CaseResult(case_of(case), {who: dict(enumerate(turns)) for who, turns in samples.items()})


def small_document() -> dict[str, Any]:
    fast, slow = (Sample(10**9, seconds, 0.2, True) for seconds in (0.1, 0.2))
    results = {
        "a": result("a", R2=[fast, fast], tcp=[fast, slow, slow]),
        "d": result("d", R2=[slow], tcp=[]),
        "b": result(
            "b", R1=[Sample(0, 0.0, 0.0, True, 0, [3.0, 1.0])], tcp=[Sample(0, 0.0, 0.0, True, 0, [2.0])]
        ),
    }
    document = report.document({"details": {"crowd": CROWD}}, results, [])
    read: dict[str, Any] = json.loads(json.dumps(document))
    return read


def test_figures_are_medians_over_rounds_and_latencies_of_all() -> None:
    cases = small_document()["cases"]
    assert plots.by_case({"a": cases["a"], "d": cases["d"]}, plots.rate) == {
        "a": {"R2": 10.0, "tcp": 5.0},
        "d": {"R2": 5.0},
    }
    assert plots.by_case({"a": cases["a"]}, plots.cpu_per_gb) == {"a": {"R2": 0.2, "tcp": 0.2}}
    assert plots.latencies(cases["b"]) == {"R1": [1.0, 3.0], "tcp": [2.0]}


def drawn(folder: Path) -> set[str]:
    assert all(path.read_bytes().startswith(PNG) for path in folder.iterdir())
    return {path.name for path in folder.iterdir()}


def test_a_file_is_drawn_for_each_thing_that_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results, folder = tmp_path / "results.json", tmp_path / "made" / "plots"
    results.write_text(json.dumps(small_document()))
    assert plots.main([str(results), str(folder)]) == 0
    assert drawn(folder) == {"bandwidth.png", "cpu.png", "latency-b.png", "crowd.png"}


def test_nothing_is_drawn_of_what_was_not_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plots.write(report.document({}, {"a": result("a", R2=[])}, []), tmp_path)
    assert drawn(tmp_path) == set()


def test_the_bench_draws_where_it_is_told_to(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = tmp_path / "plots"
    bench = run.Bench(run.parse(["--cases", "", "--backends", "", "--quiet", "--plots", str(folder)]))
    bench.results["a"] = result("a", tcp=[Sample(10**9, 0.1, 0.2, True)])
    bench.context.details["crowd"] = CROWD
    bench._write()
    assert drawn(folder) == {"bandwidth.png", "cpu.png", "crowd.png"}


def test_without_matplotlib_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    monkeypatch.setattr(run, "Bench", None)
    folder = tmp_path / "plots"
    assert run.main(["--cases", "a", "--plots", str(folder)]) == 2
    assert plots.main([str(tmp_path / "results.json"), str(folder)]) == 2
    assert capsys.readouterr().err.count("pip install matplotlib") == 2
    assert not folder.exists()
