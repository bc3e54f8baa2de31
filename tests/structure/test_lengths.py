"""Files and functions short enough to be read: design, Habits."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.structure import tree
from tests.structure.cpp import functions

PYTHON_FILE = 500
CPP_FILE = 600
FUNCTION = 40

# What may be longer, each with the reason why it reads better in one piece: {"native/x.cpp:function":
# "reason"}.
LONGER: dict[str, str] = {}


def test_files() -> None:
    found = [(path, PYTHON_FILE) for path in tree.python_files()] + [
        (path, CPP_FILE) for path in tree.cpp_files()
    ]
    assert found
    long = {
        f"{tree.name(path)}: {count} lines, {limit} at most"
        for path, limit in found
        if (count := path.read_text().count("\n")) > limit and tree.name(path) not in LONGER
    }
    assert not long, "\n".join(long)


def test_python_functions() -> None:
    long = [
        f"{tree.name(path)}:{node.lineno} {node.name}: {count} lines, {FUNCTION} at most"
        for path in tree.python_files()
        for node in ast.walk(tree.parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (count := python_body_lines(node)) > FUNCTION and f"{tree.name(path)}:{node.name}" not in LONGER
    ]
    assert not long, "\n".join(long)


def test_cpp_functions() -> None:
    long = [
        f"{tree.name(path)}:{line} {head[:80]}: {count} lines, {FUNCTION} at most"
        for path in tree.cpp_files()
        for head, line, count in cpp_functions(path)
        if count > FUNCTION and f"{tree.name(path)}:{cpp_name(head)}" not in LONGER
    ]
    assert not long, "\n".join(long)


def test_exceptions_are_needed_and_explained() -> None:
    known = {tree.name(path) for path in tree.files()}
    assert all(key.split(":")[0] in known and reason for key, reason in LONGER.items())


def python_body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines from the first statement after the docstring to the end."""
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def cpp_functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Test cases are left out: a case is a list of sections, each read by itself."""
    for function in functions(path.read_text()):
        if not function.head.startswith(("TEST_CASE", "NB_MODULE")):
            yield function.head, function.line, function.body_lines


def cpp_name(head: str) -> str:
    words = head.split("(")[0].split()
    return words[-1].lstrip("*&") if words else ""
