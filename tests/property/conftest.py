"""One set of endpoints for all examples of this folder."""

from collections.abc import Callable, Iterator

import pytest

from tests.property import loopback


@pytest.fixture(scope="session")
def pair() -> Iterator[Callable[..., loopback.Pair]]:
    made: list[loopback.Pair] = []

    def get(*config: int | None) -> loopback.Pair:
        found = loopback.pair(*config)
        if found not in made:
            made.append(found)
        return found

    yield get
    loopback.close_pairs(made)
    loopback.pair.cache_clear()
