"""Who may include whom in native/: protocol, memory and backends never know each other, and only the bindings
know Python."""

from pathlib import Path

from tests.structure import tree
from tests.structure.cpp import includes

OURS = ("base", "memory", "protocol", "backends", "engine", "bindings")

# What a folder may include of ours, besides its own files. Tests, fuzzers and the simulator may include all
# but the bindings.
ALLOWED = {
    "base": set(),
    "memory": {"base"},
    "protocol": {"base"},
    "backends": {
        "base",
        "memory",
        "protocol",
    },  # runs and chunk headers; test_backends_* below keep them apart from each other
    "engine": {"base", "memory", "protocol", "backends"},
    "bindings": {"base", "memory", "protocol", "backends", "engine"},
    "tests": {"base", "memory", "protocol", "backends", "engine"},
    "fuzz": {"base", "memory", "protocol", "backends", "engine"},
}

# The protocol is a pure machine: bytes and events in, bytes and events out. What would let it look at the
# world. (A mutex is no thread, and iovec is a type.)
IMPURE = {
    *("sys/socket.h", "netinet/in.h", "netinet/tcp.h", "arpa/inet.h", "netdb.h", "sys/un.h"),
    *("unistd.h", "fcntl.h", "poll.h", "sys/epoll.h", "sys/eventfd.h", "sys/timerfd.h", "sys/mman.h"),
    *("thread", "condition_variable", "future", "stop_token", "semaphore", "latch", "barrier", "pthread.h"),
    *("chrono", "ctime", "time.h", "sys/time.h", "random", "cstdio", "iostream", "fstream"),
}


def folder(path: Path) -> str:
    return path.relative_to(tree.NATIVE).parts[0]


def sources() -> list[Path]:
    found = tree.cpp_files("native")
    assert found, "native/ has no sources"
    return found


def is_ours(target: str) -> bool:
    return "/" in target and target.split("/")[0] in OURS  # <memory> is the standard's


def test_only_known_folders() -> None:
    assert {folder(p) for p in sources()} <= set(ALLOWED), (
        "give the new folder a line in ALLOWED, and in the design"
    )


def test_each_folder_includes_only_what_it_may() -> None:
    wrong = [
        f"{tree.name(path)} includes {target}"
        for path in sources()
        for _, target in includes(path.read_text())
        if is_ours(target) and target.split("/")[0] not in ALLOWED[folder(path)] | {folder(path)}
    ]
    assert not wrong, "\n".join(wrong)


def folders(path: Path) -> list[Path]:
    beside = path.is_relative_to(tree.NATIVE / "tests") or path.is_relative_to(tree.NATIVE / "fuzz")
    return [tree.NATIVE, path.parent] if beside else [tree.NATIVE]


def test_our_headers_are_named_from_native() -> None:
    """`#include "plan.hpp"` or `"../memory/plan.hpp"` would slip through the test above. Tests and fuzzers may name
    what lies beside them.
    """
    wrong = [
        f'{tree.name(path)} includes "{target}": no such file below native/'
        for path in sources()
        for kind, target in includes(path.read_text())
        if kind == '"' and not any((folder / target).is_file() for folder in folders(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_bindings_know_python() -> None:
    wrong = [
        f"{tree.name(path)} includes {target}"
        for path in sources()
        for _, target in includes(path.read_text())
        if folder(path) != "bindings"
        and (target.startswith(("nanobind", "pybind11")) or target == "Python.h")
    ]
    assert not wrong, "\n".join(wrong)


def test_protocol_is_pure() -> None:
    wrong = [
        f"{tree.name(path)} includes <{target}>"
        for path in sources()
        for _, target in includes(path.read_text())
        if folder(path) == "protocol" and target in IMPURE
    ]
    assert not wrong, "\n".join(wrong)


def test_memory_has_no_sockets_threads_or_clocks() -> None:
    allowed = {"sys/mman.h", "unistd.h", "fcntl.h"}  # an arena is a memfd
    wrong = [
        f"{tree.name(path)} includes <{target}>"
        for path in sources()
        for _, target in includes(path.read_text())
        if folder(path) == "memory" and target in IMPURE - allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_backends_do_not_include_each_other() -> None:
    """A backend's files begin with its name, which is that of its Python file: tcp.hpp, tcp_lane.cpp. The
    others are the seam: every backend may include them, and they include no backend.
    """
    seam = {"__init__", "base"}
    python = {path.stem for path in tree.python_files("kvtransport/backends")} - seam
    backends = {stem.split("_")[0] for stem in python}
    assert backends, "kvtransport/backends has no backend"

    def owner(name: str) -> str | None:
        word = Path(name).stem.split("_")[0]
        return word if word in backends else None

    wrong = [
        f"{tree.name(path)} includes {target}"
        for path in sources()
        if folder(path) == "backends"
        for _, target in includes(path.read_text())
        if target.startswith("backends/") and owner(target) not in {None, owner(path.name)}
    ]
    assert not wrong, "\n".join(wrong)


def test_the_bindings_are_where_python_is() -> None:
    """Guards the tests above: were the folder renamed, they would pass on nothing."""
    seen = {t for path in sources() if folder(path) == "bindings" for _, t in includes(path.read_text())}
    assert any(target.startswith("nanobind/") for target in seen)
