"""What pyproject.toml, constraints.txt and the tree say of each other."""

import re
import sys

import pytest

from tests.structure import tree

if sys.version_info >= (3, 11):
    import tomllib
else:
    pytest.skip("reads TOML with the standard library: Python 3.11", allow_module_level=True)

PROJECT = tomllib.loads((tree.ROOT / "pyproject.toml").read_text())
PINS = set(re.findall(r"^([\w.-]+)==", (tree.ROOT / "constraints.txt").read_text(), re.MULTILINE))


def canonical(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~;\[ ]", requirement)[0]).lower()


def test_everything_that_make_installs_is_pinned() -> None:
    wanted = PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]
    for group in PROJECT["dependency-groups"].values():
        wanted += [requirement for requirement in group if isinstance(requirement, str)]
    assert {canonical(r) for r in wanted} - {canonical(p) for p in PINS} == set()


def test_run_time_needs_only_numpy_and_msgspec() -> None:
    assert {canonical(r) for r in PROJECT["project"]["dependencies"]} == {"numpy", "msgspec"}


def test_readme_is_published() -> None:
    assert (tree.ROOT / "README.md").is_file()
    assert PROJECT["project"].get("readme") == "README.md"


def test_package_is_typed() -> None:
    assert (tree.PACKAGE / "py.typed").is_file()


def test_no_third_party_source() -> None:
    """Headers come from packages: a copy in the tree goes stale and hides whose code it is."""
    foreign = {
        tree.name(path) for path in tree.files() if {"third_party", "vendor", "external"} & set(path.parts)
    }
    assert foreign == set()
