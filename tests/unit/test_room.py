"""How much memory may be taken, as the kernel's files say."""

from pathlib import Path

from kvtransport.memory.room import available


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {
    "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    1000 kB\nSwapFree: 24 kB\nHugePages_Total: 0\n"
}


def group(at: str, limit: str, used: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{at}".rstrip("/")
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": "anon 7\ninactive_file 1000\nactive_file 5\n",
    }


def test_the_machine(tmp_path: Path) -> None:
    assert available(write(tmp_path, MACHINE)) == 1024 << 10


def test_the_smallest_cgroup_around(tmp_path: Path) -> None:
    files = MACHINE | {"proc/self/cgroup": "1:name=systemd:/x\n0::/a/b\n"}
    write(tmp_path, files | group("a/b", "max\n", 0) | group("a", "500000\n", 100_000))
    assert available(tmp_path) == 401_000
    write(tmp_path, group("a/b", "150000\n", 100_000))
    assert available(tmp_path) == 51_000
    write(tmp_path, group("a/b", "99\n", 100_000))
    assert available(tmp_path) == 0
    write(tmp_path, group("a/b", "max\n", 0) | group("a", "99000000", 0))
    assert available(tmp_path) == 1024 << 10


def test_a_container_that_sees_only_its_own_cgroup(tmp_path: Path) -> None:
    write(tmp_path, MACHINE | {"proc/self/cgroup": "0::/\n"} | group("", "500000", 100_000))
    assert available(tmp_path) == 401_000


def test_version_1(tmp_path: Path) -> None:
    """In a container the path may be the host's, which isn't seen there; its own cgroup is the top."""
    for name, own, at in (("a", "/x/y", "memory/x"), ("b", "/docker/5", "memory")):
        folder = f"{name}/sys/fs/cgroup/{at}"
        files = {
            f"{folder}/memory.limit_in_bytes": "500000",
            f"{folder}/memory.usage_in_bytes": "100000",
            f"{folder}/memory.stat": "inactive_file 1\ntotal_inactive_file 30\n",
            f"{name}/proc/self/cgroup": f"4:cpu,memory:{own}\n3:cpuset:/\n0::/\n",
        }
        write(tmp_path, files)
        assert available(tmp_path / name) == 400_030


def test_nothing_known(tmp_path: Path) -> None:
    assert available(tmp_path) is None
    assert available(write(tmp_path, {"proc/self/cgroup": "3:memory:/x\n", "proc/meminfo": "x\n"})) is None


def test_here() -> None:
    room = available()
    assert room is not None
    assert room > 1 << 20
