"""Just enough C++ to find includes and the length of functions. A heuristic, not a parser: it knows scopes,
initialisers and functions."""

import re
from dataclasses import dataclass

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)

_NOISE = re.compile(
    r'R"(?P<tag>[^()\\\s]{0,16})\(.*?\)(?P=tag)"'  # raw strings first: they may hold anything
    r"|//[^\n]*|/\*.*?\*/"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'"  # not the separator in 1'000
    r"|^[ \t]*#(?:\\\n|[^\n])*",
    re.DOTALL | re.MULTILINE,
)
_SCOPE = re.compile(r"\b(namespace|class|struct|union|enum|extern)\b")
_FUNCTION = re.compile(
    r"\)\s*(?:(?:const|noexcept|override|final|mutable|try|&&?)\s*|noexcept\s*\([^{}]*\)\s*|requires[^{}]*)*"
    r"(?:->[^{};]*)?$"
)


@dataclass(frozen=True)
class Function:
    """A function with a body: its head in one line, the line of its opening brace, and the lines between its
    braces."""

    head: str
    line: int
    body_lines: int


def includes(text: str) -> list[tuple[str, str]]:
    """(kind, target) of each include; kind is ``<`` or ``"``. Commented-out includes don't count."""
    return INCLUDE.findall(re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL))


def blank_noise(text: str) -> str:
    """The text with comments, strings, characters and preprocessor lines blanked; newlines stay, so that
    lines still count."""
    return _NOISE.sub(lambda m: "".join(c if c == "\n" else " " for c in m.group()), text)


def functions(text: str) -> list[Function]:
    """The outermost functions of a file (lambdas inside them are part of them), constructors and test cases
    included."""
    code = blank_noise(text)
    found: list[Function] = []
    start = position = 0  # of the head that we are in, of the character
    while position < len(code):
        char = code[position]
        head = " ".join(code[start:position].split())
        if char == "{" and _FUNCTION.search(head):
            end = _closing(code, position)
            body = code[position + 1 : end].strip("\n ").count("\n") + 1
            found.append(Function(head, code.count("\n", 0, position) + 1, body))
            start = position = end + 1
        elif char == "{" and not _is_scope(head):
            position = (
                _closing(code, position) + 1
            )  # an initialiser: the head goes on behind it (`: a_{1}, b_(2) {`)
        else:
            position += 1
            if char in ";{}":
                start = position
    return found


def _is_scope(head: str) -> bool:
    return bool(_SCOPE.search(head)) and "=" not in head


def _closing(code: str, opening: int) -> int:
    depth = 0
    for position in range(opening, len(code)):
        depth += {"{": 1, "}": -1}.get(code[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"brace of line {code.count(chr(10), 0, opening) + 1} is never closed")
