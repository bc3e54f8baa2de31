"""Libraries that stand between a process and its C library (LD_PRELOAD), built when a test wants one.

Here: building them from `shims/`, and starting processes with them. Not here: what they do.

They are for processes that a test starts: the one that runs the tests can't be given them any more.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SHIMS = Path(__file__).parent / "shims"


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="kvt-shims-")


@functools.cache
def built(name: str) -> Path:
    """Compile shims/<name>.c; return the library. Skips the test where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc) to build the shim with")
    library = Path(_folder().name) / f"{name}.so"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, SHIMS / f"{name}.c", "-o", library, "-ldl"], check=True, timeout=60)
    return library


@contextlib.contextmanager
def preloaded(library: Path, **variables: object) -> Iterator[None]:
    """Processes that are started meanwhile have the library, and these variables."""
    before = dict(os.environ)
    first = [before["LD_PRELOAD"]] if before.get("LD_PRELOAD") else []  # a sanitizer's runtime has to be
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ["LD_PRELOAD"] = ":".join([*first, str(library)])
    try:
        yield
    finally:
        for name in ("LD_PRELOAD", *variables):
            os.environ.pop(name, None)
        os.environ.update(before)
