"""A backend is known by name in as few places as can be, and docs/how-to/add-a-backend.md has all of them."""

import re
from pathlib import Path

from tests.structure import tree

PAGE = tree.ROOT / "docs" / "how-to" / "add-a-backend.md"
BACKENDS = [p.stem for p in tree.python_files("kvtransport/backends") if p.stem not in ("__init__", "base")]


def names_one(path: Path) -> bool:
    """Whether code names a backend: as a string, its module or header, its classes, calls with it in their
    name.
    """
    text = path.read_text()
    words = "|".join(BACKENDS)
    types = "|".join(name.title().replace("_", "") for name in BACKENDS)
    code = (
        rf'"(?:{words})"|backends\.(?:{words})\b|backends/(?:{words})\w*\.hpp'
        rf"|\b(?:{types})[A-Z]\w+|open_(?:{words})_"
    )
    return bool(re.search(code, text))


def test_every_place_that_names_a_backend_is_in_the_page() -> None:
    own = tuple(tree.ROOT / folder for folder in ("kvtransport/backends", "native/backends", "native/tests"))
    code = [
        path
        for path in [
            *tree.python_files("kvtransport"),
            *tree.cpp_files("native"),
            tree.PACKAGE / "_native.pyi",
        ]
        if not any(path.is_relative_to(folder) for folder in own)
    ]
    naming = {tree.name(path) for path in code if names_one(path)}
    assert len(naming) > 5
    told = set(re.findall(r"`((?:kvtransport|native)/[\w./]+)`", PAGE.read_text()))
    assert naming - told == set()


def test_every_file_that_the_page_names_is_there() -> None:
    paths = re.findall(r"`([\w-]+/[\w./-]+)`", PAGE.read_text())
    assert [path for path in paths if not (tree.ROOT / path).exists()] == []
