"""What a special row's program is given, and the two ends it usually works with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.cases import Case, case_of
from bench.ours import Pair
from bench.progress import Progress


@dataclass
class Context:
    """Settings of the whole bench, and where details go that a table's row has no room for.

    reads: how often the row of the rewriting owner reads.
    """

    config: Mapping[str, Any]
    rounds: int
    progress: Progress
    reads: int = 1_000_000
    details: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def pair(self, case: Case | str, backend: str = "tcp", open_now: bool = True) -> Iterator[Pair]:
        """Two workers over a backend (a participant's name), closed at the end."""
        made = Pair(backend, case_of(case) if isinstance(case, str) else case, self.config, open_now)
        try:
            yield made
        finally:
            made.close()


def titled(name: str, backend: str) -> str:
    """Return the name of a row or of its details, with the backend where that isn't the usual one."""
    return name if backend == "tcp" else f"{name} {backend}"
