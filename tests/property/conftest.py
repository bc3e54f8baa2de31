"""One set of endpoints for all examples of this folder."""

from collections.abc import Iterator

import pytest

from tests.property.loopback import Pairs


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    made = Pairs(tmp_path_factory.mktemp("links"))
    yield made
    made.close()
