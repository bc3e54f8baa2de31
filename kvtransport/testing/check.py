"""Check: one thing that every backend must do, and the list of all of them.

Here: the list and how a check enters it. Not here: the checks (`checks_*`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvtransport.testing.harness import Harness

Run = Callable[[Harness], None]


@dataclass(frozen=True)
class Check:
    """name: of the check. needs: what the harness must be able to do: "kill", "fork". Call it with a harness."""

    name: str
    run: Run
    needs: frozenset[str] = frozenset()

    def __call__(self, harness: Harness) -> None:
        """Run it; AssertionError, or whatever the library raised, where the backend fails."""
        self.run(harness)

    def __str__(self) -> str:
        return self.name


CHECKS: list[Check] = []
"""All checks, in the order in which they were written."""


def check(needs: Iterable[str] = ()) -> Callable[[Run], Run]:
    """Enter a function into the list, under its own name."""

    def enter(run: Run) -> Run:
        CHECKS.append(Check(run.__name__, run, frozenset(needs)))
        return run

    return enter


def raises(kind: type[BaseException], call: Callable[[], object]) -> BaseException:
    """Return the error of exactly this class that the call raises."""
    try:
        call()
    except BaseException as error:
        if type(error) is kind:
            return error
        raise
    raise AssertionError(f"{kind.__name__} wasn't raised")


def same(is_: object, must: object, what: str = "") -> None:
    """Assert that two values are equal, and show them where they aren't."""
    if is_ != must:
        raise AssertionError(f"{what or 'value'} is {is_!r}, not {must!r}")


def true(is_: object, what: str) -> None:
    """Assert it."""
    if not is_:
        raise AssertionError(what)
