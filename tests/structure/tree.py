"""The files of the tree, as git sees them: what is tracked, and what is new and not ignored."""

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kvtransport"
NATIVE = ROOT / "native"
CPP = {".cpp", ".hpp", ".h", ".cc"}


@cache
def files() -> tuple[Path, ...]:
    """Every file of the tree that is there (a tracked file may be deleted in the work tree)."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    return tuple(sorted({ROOT / name for name in listed if name and (ROOT / name).is_file()}))


def python_files(*folders: str) -> list[Path]:
    """The Python files below these folders of the tree; without folders, all of them."""
    return [p for p in files() if p.suffix == ".py" and _below(p, folders)]


def cpp_files(*folders: str) -> list[Path]:
    """The C++ files below these folders of the tree; without folders, all of them."""
    return [p for p in files() if p.suffix in CPP and _below(p, folders)]


def _below(path: Path, folders: tuple[str, ...]) -> bool:
    return not folders or any(path.is_relative_to(ROOT / folder) for folder in folders)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name(path: Path) -> str:
    """The path as messages give it."""
    return str(path.relative_to(ROOT))
