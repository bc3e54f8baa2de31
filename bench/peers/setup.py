"""Makes the peers' venv, bench/.venv-peers: `python -m bench.peers.setup`. Run again, it does nothing.

The peers bring torch and what else they need, so they don't share the project's venv. torch is pinned: an
open range may resolve to a CUDA build of several GB. Mooncake's library needs libibverbs even for TCP; as
root on Debian it is installed.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / ".venv-peers"
VENV_PYTHON = VENV / "bin" / "python"
# nixl itself is a thin front; its own dependencies would pull the CUDA 13 wheel beside the CUDA 12 one.
STEPS = (
    ("torch==2.13.0", "numpy==2.4.6", "nixl-cu12==1.5.1"),
    ("nixl==1.5.1", "--no-deps"),
    ("mooncake-transfer-engine-non-cuda==0.3.13.post1",),
)
CHECK = "import numpy; from nixl._api import nixl_agent; from mooncake.engine import TransferEngine"
PIP_LIMIT_S = 1800


def ready() -> bool:
    """Return whether the venv is there and both peers can be imported."""
    if not VENV_PYTHON.exists():
        return False
    # By os._exit: the wheel may crash when the interpreter ends.
    command = [str(VENV_PYTHON), "-c", f"{CHECK}; import os; os._exit(0)"]
    return subprocess.run(command, capture_output=True, timeout=120).returncode == 0


def install_libibverbs() -> None:
    """Install Debian's libibverbs1 where that can be done, else say what is missing."""
    if ctypes.util.find_library("ibverbs"):
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=True, timeout=300, env=env)
        subprocess.run(["apt-get", "install", "-y", "-qq", "libibverbs1"], check=True, timeout=300, env=env)
    else:
        print("libibverbs1 is missing: Mooncake needs it (apt-get install libibverbs1)", file=sys.stderr)


def main() -> int:
    if ready():
        print(f"the peers are installed in {VENV.relative_to(Path.cwd())}")
        return 0
    install_libibverbs()
    if not VENV_PYTHON.exists():
        venv.create(VENV, with_pip=True)
    for step in STEPS:
        print("== pip install", *step, flush=True)
        subprocess.run(
            [str(VENV_PYTHON), "-m", "pip", "install", "-q", *step], check=True, timeout=PIP_LIMIT_S
        )
    if not ready():
        print("the peers were installed but can't be imported:", file=sys.stderr)
        return subprocess.run([str(VENV_PYTHON), "-c", CHECK], timeout=120).returncode or 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
