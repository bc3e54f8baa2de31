"""Four lists that must not drift apart: `kvtransport.__all__`, what the package really has, the extension and
its stub, and the names that docs/reference/api.md documents.

A name is documented when it opens a code span in a heading or in the first cell of a table row:
``### `Endpoint(config)` ``, ``| `Transfer.result(timeout=None)` | ... |``. A leading ``kvt.`` is dropped;
``Class.member`` documents a member.
"""

import ast
import importlib
import re
import types

import pytest

from tests.structure import tree

API = tree.ROOT / "docs" / "reference" / "api.md"
STUB = tree.PACKAGE / "_native.pyi"


# Imported by fixtures: a package that can't be imported fails these tests, not the collection of all.
@pytest.fixture(scope="module")
def kvtransport() -> types.ModuleType:
    return importlib.import_module("kvtransport")


@pytest.fixture(scope="module")
def native() -> types.ModuleType:
    return importlib.import_module("kvtransport._native")


def documented() -> set[str]:
    assert API.is_file(), f"{tree.name(API)} is missing: it documents every public name"
    spans: set[str] = set()
    for line in API.read_text().splitlines():
        cell = line.split("|")[1] if line.startswith("|") else line if line.startswith("#") else ""
        spans.update(re.findall(r"`([^`]+)`", cell))
    names = {re.sub(r"^(?:kvt|kvtransport)\.", "", span) for span in spans}
    return {match.group() for name in names if (match := re.match(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", name))}


def test_all_is_sorted_and_real(kvtransport: types.ModuleType) -> None:
    names = list(kvtransport.__all__)
    assert names
    assert len(names) == len(set(names))
    assert not [name for name in names if not hasattr(kvtransport, name)]


def test_nothing_public_is_left_out_of_all(kvtransport: types.ModuleType) -> None:
    public = {
        n
        for n, v in vars(kvtransport).items()
        if not n.startswith("_") and not isinstance(v, types.ModuleType)
    }
    assert public - set(kvtransport.__all__) == set()


def test_every_public_name_is_documented(kvtransport: types.ModuleType) -> None:
    assert {n for n in kvtransport.__all__ if not n.startswith("__")} - documented() == set()


def test_every_documented_name_exists(kvtransport: types.ModuleType) -> None:
    unknown = set()
    for name in documented():
        owner: object = kvtransport
        for part in name.split("."):
            if not hasattr(owner, part) and part not in getattr(owner, "__annotations__", {}):
                unknown.add(name)
                break
            owner = getattr(owner, part, None)
    assert unknown == set()


def test_documented_top_level_names_are_in_all(kvtransport: types.ModuleType) -> None:
    top = {name for name in documented() if "." not in name}
    assert top - set(kvtransport.__all__) == set()


def test_public_members_are_documented(kvtransport: types.ModuleType) -> None:
    """Of the classes that a user calls. Errors and records are documented by their fields, in their own
    pages."""
    missing = {
        f"{owner}.{member}"
        for owner in ("Endpoint", "Connection", "BlockPool", "Transfer", "LayerGate", "CompletionQueue")
        for member in vars(getattr(kvtransport, owner))
        if not member.startswith("_")
    } - documented()
    assert missing == set()


def stub_members(body: list[ast.stmt]) -> set[str]:
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return {name for name in names if not name.startswith("_")}


def test_stub_names_what_the_extension_has(native: types.ModuleType) -> None:
    module = ast.parse(STUB.read_text())
    assert stub_members(module.body) == {name for name in dir(native) if not name.startswith("_")}


def test_stub_classes_have_the_members_of_the_extension(native: types.ModuleType) -> None:
    module = ast.parse(STUB.read_text())
    for node in module.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            real = {name for name in vars(getattr(native, node.name)) if not name.startswith("_")}
            assert stub_members(node.body) == real, node.name
