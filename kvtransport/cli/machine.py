"""Facts of this machine and process that decide what kvtransport can do here.

Here: reading them, mostly from /proc. Not here: trials of backends (`kvtransport.backends`), how facts are
shown (`report`).

Invariant: a fact that can't be read is None, nothing here raises, and no framework is imported to be asked.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvtransport.acceptor import reachability
from kvtransport.backends import shm

Facts = dict[str, dict[str, Any]]

UNLIMITED: Final = "unlimited"
ROOT: Final = Path("/")


def facts(root: Path = ROOT) -> Facts:
    """Return {group: {fact: value}}. Values are plain JSON; None: it can't be read here.

    root: where /proc, /sys and the like are looked for.
    """
    return {
        "versions": _versions(),
        "cores": _cores(root),
        "memory": _memory(root),
        "limits": _limits(root),
        "network": _network(root),
        "place": _place(root),
        "devices": _devices(root),
    }


def _versions() -> dict[str, Any]:
    found = {
        "kvtransport": _version("kvtransport"),
        "python": platform.python_version(),
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "libc": _libc(),
        "numpy": _version("numpy"),
        "msgspec": _version("msgspec"),
    }
    torch = _version("torch")
    return found | ({"torch": torch} if torch else {})


def _version(name: str) -> str | None:
    """Return a package's version: of what is loaded, else of what is installed, which isn't imported."""
    loaded = getattr(sys.modules.get(name), "__version__", None)
    if loaded is not None:
        return str(loaded)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _libc() -> str | None:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        return " ".join(platform.libc_ver()).strip() or None


def _cores(root: Path) -> dict[str, Any]:
    return {
        "online": os.cpu_count(),
        "usable": sorted(os.sched_getaffinity(0)),
        "cgroup_quota": cpu_quota(root),
    }


def _memory(root: Path) -> dict[str, Any]:
    told = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(root, "proc/meminfo") or "", re.MULTILINE))
    total, available = told.get("MemTotal"), told.get("MemAvailable")
    whole, free = _space(root / "dev/shm")
    huge = "sys/kernel/mm/transparent_hugepage"
    return {
        "total_nbytes": int(total) * 1024 if total else None,
        "available_nbytes": int(available) * 1024 if available else None,
        "cgroup_limit_nbytes": memory_limit(root),
        "dev_shm_nbytes": whole,
        "dev_shm_free_nbytes": free,
        "huge_pages": _chosen(_read(root, f"{huge}/enabled")),
        "huge_pages_of_shared_memory": _chosen(_read(root, f"{huge}/shmem_enabled")),
    }


def _limits(root: Path) -> dict[str, Any]:
    status = shm.process_status()
    return {
        "open_files": _limit(resource.RLIMIT_NOFILE),
        "locked_memory_nbytes": _limit(resource.RLIMIT_MEMLOCK),
        "ptrace_scope": shm.ptrace_scope(),
        "seccomp": {"0": "none", "1": "strict", "2": "filter"}.get(status.get("Seccomp", "")),
        "no_new_privs": {"0": False, "1": True}.get(status.get("NoNewPrivs", "")),
    }


def _network(root: Path) -> dict[str, Any]:
    buffers = {
        f"{name}_nbytes": int(text) if (text := _read(root, f"proc/sys/net/core/{name}")) else None
        for name in ("rmem_max", "wmem_max")
    }
    ipv4 = "proc/sys/net/ipv4"
    return {
        "congestion_control": _read(root, f"{ipv4}/tcp_congestion_control"),
        "congestion_controls": (_read(root, f"{ipv4}/tcp_available_congestion_control") or "").split(),
        **buffers,
    }


def _place(root: Path) -> dict[str, Any]:
    here = reachability.here()
    return {
        "host": here.hostname,
        "boot_id": here.boot_id or None,
        "uid": here.uid,
        "pid_namespace": here.pid_ns or None,
        "net_namespace": here.net_ns or None,
        "ipc_namespace": here.ipc_ns or None,
        "user_namespace": here.user_ns or None,
        "container": container_signs(root, os.environ),
    }


def _devices(root: Path) -> dict[str, Any]:
    driver = re.search(r"Kernel Module\D*([\d.]+)", _read(root, "proc/driver/nvidia/version") or "")
    try:
        rdma = sorted(path.name for path in (root / "sys/class/infiniband").iterdir())
    except OSError:
        rdma = []
    return {"nvidia_driver": driver.group(1) if driver else None, "rdma": rdma}


# --- containers -----------------------------------------------------------------------------------------------


def container_signs(root: Path, environ: Mapping[str, str]) -> list[str]:
    """Return what suggests that this runs in a container; empty: nothing does."""
    signs = [f"/{name}" for name in (".dockerenv", "run/.containerenv") if (root / name).exists()]
    signs += [name for name in ("KUBERNETES_SERVICE_HOST", "container") if environ.get(name)]
    groups = _read(root, "proc/1/cgroup") or ""
    signs += [
        f"cgroup {word}" for word in ("docker", "kubepods", "containerd", "lxc", "podman") if word in groups
    ]
    if re.search(r" / / \S+ .*- overlay ", _read(root, "proc/self/mountinfo") or ""):
        signs.append("the root is an overlay")
    return signs


def cpu_quota(root: Path) -> float | str | None:
    """Return the cores' worth of time that the cgroups allow, of all of them the least."""
    quotas = []
    for folder in _cgroups(root, ""):
        quota, _, period = (_read(folder, "cpu.max") or "").partition(" ")
        if quota.isdecimal() and period.isdecimal():
            quotas.append(int(quota) / int(period))
        elif quota == "max":
            quotas.append(float("inf"))
    for folder in _cgroups(root, "cpu"):
        us, of_us = _read(folder, "cpu.cfs_quota_us"), _read(folder, "cpu.cfs_period_us")
        if us and of_us:
            quotas.append(int(us) / int(of_us) if int(us) > 0 else float("inf"))
    return _least(quotas)


def memory_limit(root: Path) -> int | str | None:
    """Return the bytes that the cgroups allow, of all of them the least."""
    told = [_read(folder, "memory.max") for folder in _cgroups(root, "")]
    told += [_read(folder, "memory.limit_in_bytes") for folder in _cgroups(root, "memory")]
    limits = [float("inf") if text == "max" else int(text) for text in told if text]
    least = _least([float("inf") if limit >= 1 << 60 else limit for limit in limits])  # version 1: no limit
    return int(least) if isinstance(least, float) else least


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Return the folders of this process's cgroup and of those around it. controller: "": version 2."""
    for line in (_read(root, "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
            below = Path(path.lstrip("/"))
            return [top / part for part in (below, *below.parents)] if path != "/" else [top]
    return []


def _least(values: list[float]) -> float | str | None:
    if not values:
        return None
    return UNLIMITED if min(values) == float("inf") else min(values)


# --- reading --------------------------------------------------------------------------------------------------


def _read(root: Path, name: str) -> str | None:
    try:
        return (root / name).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _chosen(text: str | None) -> str | None:
    """Return the word in brackets: "always [madvise] never"."""
    found = re.search(r"\[(\w+)\]", text or "")
    return found.group(1) if found else None


def _space(folder: Path) -> tuple[int | None, int | None]:
    """Return (size, free) of a file system."""
    try:
        told = os.statvfs(folder)
    except OSError:
        return None, None
    return told.f_blocks * told.f_frsize, told.f_bavail * told.f_frsize


def _limit(which: int) -> int | str:
    soft, _ = resource.getrlimit(which)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft
