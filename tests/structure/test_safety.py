"""Nothing in the package can turn a peer's bytes into code, and only the files named here see the
extension."""

import ast
from collections.abc import Iterator

from tests.structure import tree

FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "code",
    "codeop",
    "runpy",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
MAY_IMPORT_NATIVE = {
    "kvtransport/endpoint.py",
    "kvtransport/connection.py",
    "kvtransport/transfer.py",
    "kvtransport/grant.py",
    "kvtransport/memory/pool.py",
}


def imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        dots = "." * node.level
        module = node.module or ""
        yield dots + module
        yield from (f"{dots}{module}.{alias.name}" for alias in node.names)


def run_time_nodes(module: ast.Module) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING:`, which never run."""
    todo: list[ast.AST] = [module]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            todo.extend(node.orelse)
        else:
            todo.extend(ast.iter_child_nodes(node))


def test_no_module_that_runs_data() -> None:
    wrong = [
        f"{tree.name(path)}:{getattr(node, 'lineno', 0)} {name}"
        for path in package()
        for node in ast.walk(tree.parse(path))
        for name in imported(node)
        if name.split(".")[0] in FORBIDDEN_MODULES
    ]
    assert not wrong, "\n".join(wrong)


def test_no_eval() -> None:
    wrong = [
        f"{tree.name(path)}:{node.lineno} {node.func.id}"
        for path in package()
        for node in ast.walk(tree.parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS
    ]
    assert not wrong, "\n".join(wrong)


def test_numpy_never_unpickles() -> None:
    wrong = [
        f"{tree.name(path)}:{node.value.lineno}"
        for path in package()
        for node in ast.walk(tree.parse(path))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    ]
    assert not wrong, "\n".join(wrong)


def test_who_imports_the_extension() -> None:
    importers = {
        tree.name(path)
        for path in package()
        for node in run_time_nodes(tree.parse(path))
        for name in imported(node)
        if "_native" in name.split(".")
    }
    assert importers, "nobody imports the extension: has it been renamed?"
    assert importers <= MAY_IMPORT_NATIVE


def package() -> list:
    found = tree.python_files("kvtransport")
    assert found, "kvtransport/ has no files"
    return found
