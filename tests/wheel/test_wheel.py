"""The wheel as a user gets it: it needs no library beyond glibc, and in a clean venv, without compiler or
torch, it
runs the quickstart."""

import json
import os
import re
import shutil
import socket
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.py"

GLIBC = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
LOADER = re.compile(r"ld-linux-[\w-]+\.so\.\d")

pytestmark = pytest.mark.timeout(600)  # the first run compiles the whole core


@pytest.fixture(scope="module")
def wheel() -> Path:
    subprocess.run(["make", "wheel"], cwd=ROOT, check=True, timeout=500)
    (built,) = (ROOT / "dist").glob("kvtransport-*.whl")
    return built


@pytest.fixture(scope="module")
def clean_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv with the wheel and what it asks for, nothing else."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=True)
    install = [
        folder / "bin" / "pip",
        "install",
        "-qq",
        "--only-binary",
        ":all:",
        "-c",
        ROOT / "constraints.txt",
        wheel,
    ]
    subprocess.run(install, check=True, timeout=300, env=clean_environment(folder))
    return folder


def clean_environment(folder: Path) -> dict[str, str]:
    """No compiler on PATH, and nothing that would lead Python back to the tree."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    return kept | {"PATH": str(folder / "bin"), "CC": "/nonexistent", "CXX": "/nonexistent"}


@pytest.fixture(scope="module")
def extension(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if re.fullmatch(r"kvtransport/_native\..*\.so", n))
        return Path(archive.extract(name, tmp_path_factory.mktemp("extension")))


def test_holds_the_package_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "kvtransport").rglob("*.py*")
        if path.suffix in {".py", ".pyi"}
    }
    assert sources - names == set()
    assert "kvtransport/py.typed" in names
    foreign = {n for n in names if not n.startswith("kvtransport/") and ".dist-info/" not in n}
    assert foreign == set()
    assert not {n for n in names if n.endswith((".cpp", ".hpp", ".a", ".pyc"))}


def test_needs_only_glibc(extension: Path) -> None:
    dynamic = subprocess.run(["readelf", "-dW", extension], check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert "libc.so.6" in needed
    assert {name for name in needed if name not in GLIBC and not LOADER.fullmatch(name)} == set()
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


def test_keeps_its_cxx_runtime_to_itself(extension: Path) -> None:
    """What else it exported, of libstdc++ above all, could be taken for torch's copy in the same process."""
    symbols = subprocess.run(
        ["readelf", "--dyn-syms", "-W", extension], check=True, capture_output=True, text=True
    ).stdout
    exported = [
        line.split()[-1]
        for line in symbols.splitlines()
        if re.search(r"\b(GLOBAL|WEAK|UNIQUE)\b.*DEFAULT +\d+ ", line)
    ]
    assert exported == ["PyInit__native"]


def test_assumes_no_newer_cpu(wheel: Path) -> None:
    """Newer instructions come by __attribute__((target(...))) and are dispatched at run time."""
    commands = list((ROOT / "build").glob("cp*/compile_commands.json"))
    assert commands
    flags = {
        flag
        for file in commands
        for entry in json.loads(file.read_text())
        for flag in entry["command"].split()
    }
    assert {
        flag for flag in flags if flag.startswith(("-march", "-mavx", "-msse", "-mcpu", "-mtune"))
    } == set()


def test_clean_venv_is_clean(clean_venv: Path) -> None:
    env = clean_environment(clean_venv)
    assert not any(
        shutil.which(tool, path=env["PATH"]) for tool in ("cc", "gcc", "g++", "clang", "cmake", "ninja")
    )
    code = "import importlib.util as u, kvtransport; print(u.find_spec('torch'), kvtransport.__file__)"
    out = subprocess.run(
        [clean_venv / "bin/python", "-c", code], check=True, capture_output=True, text=True, env=env, cwd="/"
    )
    torch, where = out.stdout.split()
    assert torch == "None"
    assert where.startswith(str(clean_venv))


def test_its_command_runs(clean_venv: Path, tmp_path: Path) -> None:
    out = subprocess.run(
        [clean_venv / "bin/kvtransport", "doctor", "--json"],
        check=True,
        capture_output=True,
        text=True,
        env=clean_environment(clean_venv),
        cwd=tmp_path,
        timeout=60,
    )
    told = json.loads(out.stdout)
    assert told["works"] is True
    assert "torch" not in told["machine"]["versions"]


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("order", [("recv", "send"), ("send", "recv")], ids=lambda order: f"{order[0]} first")
def test_runs_the_quickstart(clean_venv: Path, tmp_path: Path, order: tuple[str, str]) -> None:
    """From a copy of the script in an empty folder, as two terminals would."""
    script = shutil.copy(QUICKSTART, tmp_path)
    address = free_address()
    started = {
        side: subprocess.Popen(
            [clean_venv / "bin/python", script, side, address],
            cwd=tmp_path,
            env=clean_environment(clean_venv),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for side in order
    }
    try:
        said = {side: process.communicate(timeout=60)[0] for side, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
    assert {side: process.returncode for side, process in started.items()} == {"send": 0, "recv": 0}, said
    assert said["send"].startswith("sent 196608 bytes")
    assert said["recv"].startswith("received 196608 bytes")
    assert "block 2 holds their block 21" in said["recv"]
