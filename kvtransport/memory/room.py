"""How much memory may still be taken: by this machine and by the container around this process.

Here: reading what the kernel says of it. Not here: taking it (`allocation`).

Invariant: nothing is raised: where the kernel says nothing, the answer is None. Linux gives out more pages of
shared memory than there are and then ends a process, so who takes many asks first.
"""

from __future__ import annotations

from pathlib import Path


def available(root: Path = Path("/")) -> int | None:
    """Return the bytes that can be had without anybody being ended for it; None if unknown."""
    rooms = [room for room in (_of_machine(root), _of_container(root)) if room is not None]
    return min(rooms) if rooms else None


def _of_machine(root: Path) -> int | None:
    fields = _fields(root / "proc/meminfo")
    kib = fields.get("MemAvailable")
    return None if kib is None else (kib + fields.get("SwapFree", 0)) * 1024


def _of_container(root: Path) -> int | None:
    """Of the cgroup of this process and those around it, whichever version has the memory."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    rooms = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            group = top / own.strip("/")
            rooms += [_of_group(folder) for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return min((room for room in rooms if room is not None), default=None)


def _of_group(folder: Path) -> int | None:
    """What files have cached counts as used but is given back when it is wanted."""
    for limit_name, used_name, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
    ):
        try:
            limit = int((folder / limit_name).read_text())
            used = int((folder / used_name).read_text())
        except (OSError, ValueError):  # no such cgroup or version; or "max"
            continue
        return max(0, limit - used + _fields(folder / "memory.stat").get(cached, 0))
    return None


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    fields = {}
    for line in lines:
        name, _, value = line.replace(":", " ").partition(" ")
        number = value.split()[:1]
        if number and number[0].isdigit():
            fields[name] = int(number[0])
    return fields
