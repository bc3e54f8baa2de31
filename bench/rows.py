"""A row of the target table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What was asked for, what was measured, and whether that meets it. None: not measured.

    broken: not slow but wrong: the program failed, or bytes are not what they must be. It fails the bench.
    """

    name: str
    measured: str
    target: str
    met: bool | None
    broken: bool = False

    @classmethod
    def at_least(cls, name: str, value: float | None, target: float, unit: str = "x") -> Row:
        shown = _shown(value, target, unit)
        return cls(name, shown, f">= {target:g} {unit}", None if value is None else value >= target)

    @classmethod
    def at_most(cls, name: str, value: float | None, target: float, unit: str = "x") -> Row:
        shown = _shown(value, target, unit)
        return cls(name, shown, f"<= {target:g} {unit}", None if value is None else value <= target)

    @classmethod
    def failed(cls, name: str, error: str) -> Row:
        """A row whose program failed: an unmet target, not a missing one."""
        return cls(name, f"failed: {error.splitlines()[0][:90]}", "", False, broken=True)


def _shown(value: float | None, target: float, unit: str) -> str:
    """Two decimals, more where rounding would hide on which side of the target it is."""
    if value is None:
        return "not measured"
    digits = 2
    while digits < 6 and value != target and round(value, digits) == target:
        digits += 1
    return f"{value:.{digits}f} {unit}"
