"""`import kvtransport` brings no framework along and takes less than 100 ms."""

import statistics
import subprocess
import sys

ENGINES = {"torch", "cupy", "transformers", "vllm", "jax", "tensorflow", "ray", "numba"}

LIMIT_S = 0.100
NUMPY_IDLE_S = 0.080  # what importing numpy takes on the machine of the target, idle
RUNS = 9
TIMED = "import time; t = time.perf_counter(); import kvtransport; print(time.perf_counter() - t)"


def fresh(code: str) -> str:
    """What a fresh interpreter prints, started away from the tree, so that the installed package is what it
    finds."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/", timeout=60
    ).stdout.strip()


def test_import_loads_no_engine() -> None:
    loaded = set(
        fresh("import sys, kvtransport; print(' '.join({m.split('.')[0] for m in sys.modules}))").split()
    )
    assert "kvtransport" in loaded
    assert loaded & ENGINES == set()


def test_import_starts_nothing() -> None:
    """No thread and no descriptor of ours before there is an Endpoint."""
    code = (
        "import os, numpy, msgspec\n"
        "n = lambda: (len(os.listdir('/proc/self/task')), len(os.listdir('/proc/self/fd')))\n"
    )
    before, after = fresh(code + "a = n(); import kvtransport; print(a, n(), sep='|')").split("|")
    assert before == after


def test_import_time() -> None:
    """Measured: the wall time of the one statement `import kvtransport` in a fresh interpreter, files in the page
    cache (a first run is thrown away); the best of nine, since other tests share the machine. The interpreter's
    own start is not in it. A machine so loaded that numpy alone takes longer than when idle gets as much more.
    """
    fresh(TIMED)
    seconds = [float(fresh(TIMED)) for _ in range(RUNS)]
    numpy_alone = min(float(fresh(TIMED.replace("kvtransport", "numpy"))) for _ in range(RUNS))
    limit = LIMIT_S * max(1.0, numpy_alone / NUMPY_IDLE_S)
    median = statistics.median(seconds)
    what = f"median {median * 1e3:.0f} ms, best {min(seconds) * 1e3:.0f}; numpy alone {numpy_alone * 1e3:.0f}"
    assert min(seconds) < limit, what
