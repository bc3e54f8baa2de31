"""Words that say nothing (util, manager) or are other systems' words (xfer, dlist) name no file and nothing
public."""

import ast
import re
from collections.abc import Iterator

from tests.structure import tree

BANNED = {"util", "helper", "common", "misc", "manager", "xfer", "dlist"}
NAMED_BY_DESIGN = {"NoCommonPath"}  # an error of the design: there the word means something


def words(name: str) -> set[str]:
    """snake_case and CamelCase, singular."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    lower = {part.lower() for part in parts}
    return lower | {word.removesuffix("s") for word in lower}


def public_names() -> Iterator[tuple[str, str]]:
    for path in tree.python_files("kvtransport"):
        for node in ast.walk(tree.parse(path)):
            if isinstance(
                node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ) and not node.name.startswith("_"):
                yield tree.name(path), node.name
    for path in tree.cpp_files("native"):
        for match in re.finditer(r"\b(?:class|struct|enum class|namespace)\s+(\w+)", path.read_text()):
            yield tree.name(path), match.group(1)


def test_file_names() -> None:
    wrong = [
        tree.name(p)
        for p in tree.files()
        if BANNED & {w for part in p.relative_to(tree.ROOT).parts for w in words(part)}
    ]
    assert not wrong, "\n".join(wrong)


def test_public_names() -> None:
    names = list(public_names())
    assert names, "kvtransport/ has no public name"
    wrong = [f"{at}: {name}" for at, name in names if BANNED & words(name) and name not in NAMED_BY_DESIGN]
    assert not wrong, "\n".join(wrong)


def test_the_words_are_seen() -> None:
    assert BANNED & words("PathManager")
    assert BANNED & words("test_utils.py")
    assert BANNED & words("xferDList")
    assert not BANNED & words("uncommonly_utilised")
