"""Report: what works on this machine, why not, and what would make it; what `kvt.doctor` returns.

Here: putting it together, and its two forms. Not here: the trials (`kvtransport.backends`), the facts
(`machine`), a peer (`peer`).

Invariant: a backend is shown as usable only if this version has it and its trial has worked just now.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvtransport.backends.base import Viability
from kvtransport.backends.inproc import InprocBackend
from kvtransport.backends.shm import ShmBackend
from kvtransport.backends.tcp import TcpBackend
from kvtransport.cli import machine
from kvtransport.cli.copying import copy_speed
from kvtransport.config import LATER_BACKENDS
from kvtransport.types import BACKENDS

WIDTH: Final = 110
FEW_FILES: Final = 4096
NOT_YET: Final = "not in this version"

_TRIALS: Final = {
    backend.name: backend.viability for backend in (InprocBackend(), TcpBackend(), ShmBackend())
}
_ELSE: Final = {
    "cuda_ipc": "copy to host memory first, which this version moves",
    "ucx": "tcp between hosts, with insecure=True",
}


@dataclass(frozen=True)
class Report:
    """What `kvt.doctor` found. `str(report)` is what `kvtransport doctor` prints, `to_json()` what `--json` does.

    backends: {name: Viability}, the preferred first: `.usable`, `.reason`, `.remedy`, and `.parts` of what was
        tried. A backend that this version hasn't got is not usable.
    machine: {group: {fact: value}}; None: it can't be read here.
    copying: the speed of plain copies in this process: {"nbytes": of a copy, "gb_per_s": {threads: rate}}.
    advice: settings of the machine that could be better, each with what to do.
    """

    backends: Mapping[str, Viability]
    machine: Mapping[str, Mapping[str, Any]]
    copying: Mapping[str, Any]
    advice: tuple[str, ...]

    @property
    def works(self) -> bool:
        """Whether two processes can be connected at all: over TCP or unix sockets."""
        return self.backends["tcp"].usable

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "works": self.works,
            "backends": {name: viability_to_json(found) for name, found in self.backends.items()},
            "machine": {group: dict(told) for group, told in self.machine.items()},
            "copying": dict(self.copying),
            "advice": list(self.advice),
        }

    def __str__(self) -> str:
        lines = ["backends", *backend_lines(self.backends), ""]
        for group, told in self.machine.items():
            words = ", ".join(_fact(name, value) for name, value in told.items() if value not in (None, []))
            lines += _wrapped(f"{group:<9} ", words or "none found")
        rates = self.copying["gb_per_s"].items()
        words = ", ".join(f"{rate:.1f} GB/s by {n} thread{'s' * (n != '1')}" for n, rate in rates)
        lines += _wrapped(f"{'copying':<9} ", words or "not measured: too little memory")
        if self.advice:
            lines += ["", "advice", *(line for text in self.advice for line in _wrapped("  ", text))]
        return "\n".join(lines)


def examine() -> Report:
    """Try every backend and read the machine's facts; takes about half a second, most of it copying."""
    found = machine.facts()
    return Report(
        backends={name: viability_of(name) for name in backend_names()},
        machine=found,
        copying=copy_speed(),
        advice=tuple(_advice(found)),
    )


def backend_names() -> tuple[str, ...]:
    """Return the words of all backends, also of those that this version hasn't got."""
    return tuple(dict.fromkeys((*BACKENDS, *LATER_BACKENDS)))


def viability_of(name: str) -> Viability:
    """Try a backend; one that this version hasn't got isn't usable."""
    if name in BACKENDS:
        return _TRIALS[name]()
    return Viability(False, NOT_YET, _ELSE.get(name, ""))


def viability_to_json(found: Viability) -> dict[str, Any]:
    """Return its fields; parts: {what was tried: fields}."""
    told = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    return told | {"parts": {what: viability_to_json(part) for what, part in found.parts}}


def backend_lines(backends: Mapping[str, Viability]) -> list[str]:
    """Return the lines of all backends: usable or not, why, what would make it, and what was tried."""
    lines: list[str] = []
    for name, found in backends.items():
        told = dataclasses.replace(found, remedy="") if found.parts else found  # the parts say it
        lines += _viability_lines(f"  {name:<9} ", told, shows_reason=not found.parts)
        for what, part in found.parts:
            lines += _viability_lines(" " * 12 + f"{what}: ", part)
    return lines


def _viability_lines(head: str, found: Viability, shows_reason: bool = True) -> list[str]:
    words = "works" if found.usable else NOT_YET if found.reason == NOT_YET else "doesn't work"
    if shows_reason and found.reason not in ("", NOT_YET):
        words += f"{',' if found.usable else ':'} {found.reason}"
    lines = _wrapped(head, words)
    return lines + (_wrapped(" " * 14 + "-> ", found.remedy) if found.remedy else [])


def _advice(found: machine.Facts) -> Iterator[str]:
    files = found["limits"]["open_files"]
    if isinstance(files, int) and files < FEW_FILES:
        yield f"{files} descriptors for each process: raise it (ulimit -n), a connection takes 3 to 5"
    quota, usable = found["cores"]["cgroup_quota"], len(found["cores"]["usable"])
    if isinstance(quota, float) and quota < usable:
        yield (
            f"the cgroup allows {quota:g} cores' time and {usable} are visible: threads that use them all are "
            f"stopped together; set Config(movers=, lanes=) to {max(1, int(quota))}, or raise the quota"
        )


def _fact(name: str, value: Any) -> str:
    words = name.removesuffix("_nbytes").replace("_", " ")
    if name.endswith("_nbytes") and isinstance(value, int):
        return f"{words} {_size(value)}"
    if isinstance(value, bool):
        return f"{words} {'yes' if value else 'no'}"
    if isinstance(value, list):
        return f"{words} {_ranges(value) if name == 'usable' else ' '.join(value)}"
    return f"{words} {value}"


def _ranges(numbers: list[int]) -> str:
    """Write sorted numbers as 0-7 9."""
    firsts = [n for n in numbers if n - 1 not in numbers]
    lasts = [n for n in numbers if n + 1 not in numbers]
    return " ".join(f"{a}-{b}" if a < b else str(a) for a, b in zip(firsts, lasts, strict=True))


def _size(nbytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} B"


def _wrapped(head: str, text: str) -> list[str]:
    """Break text into lines that begin below where it begins in the first."""
    below = " " * min(len(head), 14)
    return textwrap.wrap(
        text, WIDTH, initial_indent=head, subsequent_indent=below, break_long_words=False
    ) or [head]
