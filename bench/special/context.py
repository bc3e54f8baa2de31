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
    """Settings of the whole bench, and where details go that a table's row has no room for."""

    config: Mapping[str, Any]
    rounds: int
    progress: Progress
    details: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def pair(self, case: Case | str, open_now: bool = True) -> Iterator[Pair]:
        """Two workers over TCP, closed at the end."""
        made = Pair("tcp", case_of(case) if isinstance(case, str) else case, self.config, open_now)
        try:
            yield made
        finally:
            made.close()
