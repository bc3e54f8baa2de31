"""Plots of the bench's samples: `python -m bench ... --plots FOLDER`, or of a file that `--json` has written:
`python -m bench.plots results.json FOLDER`.

Here: the JSON document in, PNG files out. Not here: measuring, or other figures than the document's. matplotlib draws
them (dependency group `bench`), and is imported when something is drawn.

Invariant: a plot of what a document doesn't have isn't made; so each of the files stands for something measured.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import measure
from bench.arrivals import CLASSES
from bench.raw_limits import COPIES, R1, R2

LIMITS = (R1, R2, *COPIES)
NEEDS = "plots need matplotlib: pip install matplotlib (make build brings it: the dependency group bench)"
SIZE = (9.0, 5.0)
DOTS_PER_INCH = 120

Document = Mapping[str, Any]


def available() -> bool:
    """Say whether plots can be made here."""
    return importlib.util.find_spec("matplotlib") is not None


def write(document: Document, folder: Path) -> list[Path]:
    """Draw what the document has; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in _figures(document):
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=DOTS_PER_INCH, bbox_inches="tight")
        files.append(path)
    return files


def _figures(document: Document) -> Iterator[tuple[str, Any]]:
    bulk = {name: case for name, case in document["cases"].items() if not case["case"]["latency"]}
    for name, value in (("bandwidth", rate), ("cpu", cpu_per_gb)):
        if medians := by_case(bulk, value):
            label = {"bandwidth": "GB/s, median over rounds", "cpu": "CPU s/GB of both processes, median"}[
                name
            ]
            yield name, _bars(medians, label)
    for name, case in document["cases"].items():
        if case["case"]["latency"] and (samples := latencies(case)):
            yield (
                f"latency-{name.replace(':', '-')}",
                _cumulative(f"({name}) {case['case']['title']}", samples),
            )
    for name, crowd in document["settings"].get("details", {}).items():
        if name.split()[0] == "crowd":
            yield name.replace(" ", "-"), _crowd(crowd)


# --- figures of a document ---------------------------------------------------------------------------------------


def rate(sample: Mapping[str, Any]) -> float:
    """Return a run's GB/s."""
    return float(sample["nbytes"] / sample["seconds"] / 1e9)


def cpu_per_gb(sample: Mapping[str, Any]) -> float:
    """Return a run's CPU seconds for each GB."""
    return float(sample["cpu_s"] / sample["nbytes"] * 1e9)


def by_case(cases: Mapping[str, Any], value: Any) -> dict[str, dict[str, float]]:
    """Return {case: {participant: the median of `value` over rounds}} of those that have samples."""
    found = {
        name: {
            who: measure.median([value(s) for s in turns.values()])
            for who, turns in case["samples"].items()
            if turns
        }
        for name, case in cases.items()
    }
    return {name: medians for name, medians in found.items() if medians}


def latencies(case: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return each participant's latencies of all rounds, in order."""
    found = {
        who: sorted(us for sample in turns.values() for us in sample["latencies_us"])
        for who, turns in case["samples"].items()
    }
    return {who: values for who, values in found.items() if values}


# --- drawing -----------------------------------------------------------------------------------------------------


def _axes() -> tuple[Any, Any]:
    """Return a figure of its own, which no window shows: pyplot would keep it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE)
    return figure, figure.subplots()


def _bars(medians: Mapping[str, Mapping[str, float]], label: str) -> Any:
    """Draw a group of bars for each case, one for each participant; limits are lines across the group."""
    figure, axes = _axes()
    everyone = list(dict.fromkeys(who for of in medians.values() for who in of))
    bars = [who for who in everyone if who not in LIMITS]
    width = 0.8 / max(1, len(bars))
    for i, who in enumerate(bars):
        places = [(group, of[who]) for group, of in enumerate(medians.values()) if who in of]
        axes.bar([g - 0.4 + (i + 0.5) * width for g, _ in places], [v for _, v in places], width, label=who)
    for i, who in enumerate(who for who in everyone if who in LIMITS):
        for group, of in enumerate(medians.values()):
            if who in of:
                name = who if group == next(g for g, o in enumerate(medians.values()) if who in o) else None
                style = (0, (1 + i, 1))
                axes.hlines(
                    of[who],
                    group - 0.45,
                    group + 0.45,
                    color=f"C{i + len(bars)}",
                    linestyle=style,
                    label=name,
                )
    axes.set_xticks(range(len(medians)), [f"({name})" for name in medians])
    axes.set_ylabel(label)
    axes.legend(
        fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0)
    )  # beside the lines, not over them
    return figure


def _cumulative(title: str, samples: Mapping[str, Sequence[float]]) -> Any:
    figure, axes = _axes()
    for who, values in samples.items():
        shares = [(i + 1) / len(values) for i in range(len(values))]
        axes.step(values, shares, where="post", label=who, linestyle="--" if who in LIMITS else "-")
    axes.set_xscale("log")
    axes.set_xlabel("us")
    axes.set_ylabel("share of repetitions that took at most so long")
    axes.set_title(title)
    axes.legend(fontsize="small")
    return figure


def _crowd(crowd: Mapping[str, Any]) -> Any:
    """Draw case h: p99 and p50 of each class, and its median alone."""
    figure, axes = _axes()
    loaded, alone = ({int(n): us for n, us in crowd[key].items()} for key in ("loaded_us", "alone_us"))
    for label, values, q in (("p99", loaded, 0.99), ("p50", loaded, 0.5), ("alone, p50", alone, 0.5)):
        axes.plot(
            CLASSES, [measure.percentile(values[n], q) / 1000 for n in CLASSES], marker="o", label=label
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(CLASSES, [str(n) for n in CLASSES])
    axes.minorticks_off()
    axes.set_xlabel("blocks of a request")
    axes.set_ylabel("ms from its planned arrival")
    axes.set_title(f"(h) at {crowd['load']:.0%} of R2; Jain's index of the senders {crowd['jain']:.3f}")
    axes.legend(fontsize="small")
    return figure


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        print("usage: python -m bench.plots results.json FOLDER", file=sys.stderr)
        return 2
    if not available():
        print(NEEDS, file=sys.stderr)
        return 2
    for path in write(json.loads(Path(argv[0]).read_text()), Path(argv[1])):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
