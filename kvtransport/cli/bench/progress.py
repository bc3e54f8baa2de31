"""A progress bar on stderr, where stderr is a terminal; nothing elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Final

WIDTH: Final = 28


class Progress:
    """Counts steps to a known total, and shows what runs now in one line that is rewritten."""

    def __init__(self, total: int) -> None:
        self._total = max(1, total)
        self._begun = 0
        self._start = time.monotonic()
        self._live = sys.stderr.isatty()

    def step(self, label: str) -> None:
        """Say that `label` begins; what began before is over."""
        share = min(1.0, self._begun / self._total)
        self._begun += 1
        if self._live:
            bar = "#" * int(share * WIDTH)
            seconds = time.monotonic() - self._start
            sys.stderr.write(f"\r\x1b[K[{bar:<{WIDTH}}] {share:4.0%} {seconds:4.0f} s  {label}")
            sys.stderr.flush()

    def close(self) -> None:
        """Remove the line."""
        if self._live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
