"""What can be called, and with which parameters: docs/reference/api.md against the package, the stub of the
extension against the extension. (That the names are there at all: `test_public_names`.)

In api.md a code span that opens a heading's or a row's first cell and ends in parentheses documents a
signature: all parameters in their order, each default as it is. `...` stands for more, `**name` for
keyword-only ones that another page lists. A span without parentheses documents what isn't called, save in
rows that say "Internal".
"""

import ast
import importlib
import inspect
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from tests.structure import tree

API = tree.ROOT / "docs" / "reference" / "api.md"
STUB = tree.PACKAGE / "_native.pyi"
CALL = re.compile(r"(?:kvt\.)?([A-Za-z_][\w.]*)\((.*)\)")
HANDLES = ("Transfer", "SentMessage")


@pytest.fixture(scope="module")
def kvtransport() -> ModuleType:
    return importlib.import_module("kvtransport")


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return importlib.import_module("kvtransport._native")


@dataclass(frozen=True)
class Parameter:
    name: str
    keyword_only: bool
    default: str | None  # None: it must be given


def shown(default: object) -> str:
    """10 and 10.0 are the same default, False and 0 are not."""
    is_number = isinstance(default, int | float) and not isinstance(default, bool)
    return repr(float(default)) if is_number else repr(default)  # type: ignore[arg-type]


def literals(function: ast.FunctionDef) -> list[Parameter]:
    """The parameters of a `def` whose defaults are literals, without self."""
    given = function.args
    assert not given.posonlyargs
    assert given.vararg is None
    places = [a.arg for a in given.args]
    defaults: list[ast.expr | None] = [None] * (len(places) - len(given.defaults))
    defaults += given.defaults
    all_ = [(name, False, d) for name, d in zip(places, defaults, strict=True)]
    all_ += [(a.arg, True, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return [
        Parameter(name, only, None if d is None else shown(ast.literal_eval(d)))
        for name, only, d in all_
        if name != "self"
    ]


def real(call: Any) -> list[Parameter]:
    found = []
    for name, p in inspect.signature(call).parameters.items():
        assert p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY), name
        default = None if p.default is p.empty else shown(p.default)
        found.append(Parameter(name, p.kind is p.KEYWORD_ONLY, default))
    return [p for p in found if p.name != "self"]


def mismatch(written: str, call: Any) -> str | None:
    """How `(written)`, a signature in the page, differs from what is called."""
    arguments = re.sub(r",?\s*\.\.\.$", "", written)
    function = ast.parse(f"def _({arguments}): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    said, has = literals(function), real(call)
    if function.args.kwarg is not None:
        has = [p for p in has if not p.keyword_only]
    elif arguments != written:
        has = has[: len(said)]
    return None if said == has else f"({written}) is {inspect.signature(call)}"


def rows() -> list[tuple[str, bool]]:
    """(code span, whether it is said to be internal) of all headings and first cells."""
    found = []
    for line in API.read_text().splitlines():
        cells = line.split("|") if line.startswith("|") else ["", line if line.startswith("#") else "", ""]
        found += [(span, "Internal" in cells[2]) for span in re.findall(r"`([^`]+)`", cells[1])]
    return found


def find(package: ModuleType, name: str) -> Any:
    """What a dotted name stands for, properties as such; None: a field, which only has an annotation."""
    owner: Any = package
    *owners, last = name.removeprefix("kvt.").split(".")
    for part in owners:
        owner = getattr(owner, part)
    return inspect.getattr_static(owner, last, None) if owners else getattr(owner, last)


def bullets(after: str) -> list[str]:
    """The list items that follow a line of the page."""
    lines = API.read_text().split(f"\n{after}\n\n")[1].split("\n\n")[0]
    return lines.removeprefix("- ").split("\n- ")


def test_documented_signatures_are_the_real_ones(kvtransport: ModuleType) -> None:
    calls = [found.groups() for span, _ in rows() if (found := CALL.fullmatch(span))]
    assert len(calls) > 30
    wrong = []
    for name, written in calls:
        owner, _, member = name.rpartition(".")
        call = getattr(getattr(kvtransport, owner), member) if owner else getattr(kvtransport, member)
        if words := mismatch(written, call):
            wrong.append(name + words)
    assert wrong == []


def test_what_is_called_is_documented_with_its_parameters(kvtransport: ModuleType) -> None:
    """And what isn't, without."""
    for span, internal in rows():
        call = CALL.fullmatch(span)
        name = call.group(1) if call else span
        if internal or "." not in name.removeprefix("kvt."):  # classes: some are made by others only
            continue
        is_call = inspect.isroutine(find(kvtransport, name))
        assert is_call == bool(call), span


def test_every_handle_s_methods(kvtransport: ModuleType) -> None:
    spans = [s for item in bullets("Every handle has:") for s in re.findall(r"`([^`]+)`", item)]
    calls = [found.groups() for span in spans if (found := CALL.fullmatch(span))]
    assert [name for name, _ in calls] == ["result", "done", "exception"]
    for name, written in calls:
        for handle in HANDLES:
            assert mismatch(written, getattr(getattr(kvtransport, handle), name)) is None


def test_the_arguments_that_both_posts_share(kvtransport: ModuleType) -> None:
    items = bullets("Arguments that `send_blocks` and `recv_blocks` share:")
    said = [span for item in items for span in re.findall(r"`([^`]+)`", item.split(":")[0])]
    required = [span for span in said if "=" not in span]
    assert required == ["block_ids", "key"]
    written = "pool, block_ids, *, key, " + ", ".join(s for s in said if s not in required)
    connection = kvtransport.Connection
    assert mismatch(written, connection.recv_blocks) is None
    assert [p for p in real(connection.send_blocks) if p.name != "after"] == real(connection.recv_blocks)


# --- the extension ---


PLAIN = {"int", "str", "bytes", "float", "bool", "None"}


def of_extension(function: Any) -> ast.FunctionDef:
    """The only signature that the extension tells of a function, as a `def`."""
    ((text, _, defaults),) = function.__nb_signature__
    text = re.sub(r"\\(\d+)", lambda m: repr(defaults[int(m.group(1))]), text)
    node = ast.parse(re.sub(r"^def \(", "def _(", text) + ": ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


def types(function: ast.FunctionDef) -> list[str | None]:
    """Of the parameters and the result, where they are plain ones."""
    annotations = [a.annotation for a in (*function.args.args, *function.args.kwonlyargs) if a.arg != "self"]
    words = [a and ast.unparse(a) for a in (*annotations, function.returns)]
    return [w if w in PLAIN else None for w in words]


def differs(stub: ast.FunctionDef, function: Any) -> bool:
    told = of_extension(function)
    pairs = zip(types(stub), types(told), strict=False)
    return literals(stub) != literals(told) or any(a != b for a, b in pairs if a and b)


def test_the_stub_s_functions_are_the_extension_s(native: ModuleType) -> None:
    functions = [n for n in ast.parse(STUB.read_text()).body if isinstance(n, ast.FunctionDef)]
    assert functions
    assert [f.name for f in functions if differs(f, getattr(native, f.name))] == []


def test_the_stub_s_methods_are_the_extension_s(native: ModuleType) -> None:
    wrong = []
    for cls in ast.parse(STUB.read_text()).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        members = vars(getattr(native, cls.name))
        stubs = {f.name: f for f in cls.body if isinstance(f, ast.FunctionDef)}
        if hasattr(members["__init__"], "__nb_signature__") != ("__init__" in stubs):
            wrong.append(f"{cls.name}.__init__")
        for name, stub in stubs.items():
            member = members[name]
            is_property = isinstance(member, property)
            if bool(stub.decorator_list) != is_property:
                wrong.append(f"{cls.name}.{name}: only one of both is a property")
            elif differs(stub, member.fget if is_property else member):
                wrong.append(f"{cls.name}.{name}")
    assert wrong == []
