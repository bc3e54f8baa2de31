"""A progress bar on stderr: one line that is rewritten on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

WIDTH = 28
LOG_EVERY_S = 10.0


class Progress:
    """Counts steps to a known total and shows what runs now."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        self._total = max(1, total)
        self._done = 0
        self._began = time.monotonic()
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._shown_s = -LOG_EVERY_S

    def step(self, label: str) -> None:
        """Say that `label` begins; what began before has ended."""
        if self._quiet:
            return
        share = min(1.0, self._done / self._total)
        bar = "#" * int(share * WIDTH)
        seconds = time.monotonic() - self._began
        text = f"[{bar:<{WIDTH}}] {share:4.0%} {seconds:4.0f} s  {label}"
        if self._live:
            sys.stderr.write(f"\r\x1b[K{text}")
        elif seconds - self._shown_s >= LOG_EVERY_S:
            self._shown_s = seconds
            sys.stderr.write(text + "\n")
        sys.stderr.flush()
        self._done += 1

    def say(self, text: str) -> None:
        """Print a line that stays."""
        sys.stderr.write(("\r\x1b[K" if self._live else "") + text + "\n")

    def close(self) -> None:
        if self._live and not self._quiet:
            sys.stderr.write("\r\x1b[K")
