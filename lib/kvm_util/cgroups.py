# SPDX-License-Identifier: GPL-2.0-only
"""Limits that this process's control groups set, and how much of each is used (cgroup v1 and v2, also mixed)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
# cgroup v1 reports "no limit" as the largest page-aligned number below 2^63
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class GroupLimit:
    """A limit of one control group, and its usage, in the same unit; *file* is the one that sets the limit."""

    file: Path
    limit: int
    usage: int


def pids() -> list[GroupLimit]:
    """The limits on tasks (threads and processes), innermost group first."""
    return [
        GroupLimit(folder / "pids.max", limit, _number(folder / "pids.current") or 0)
        for folder in _folders("pids")
        if (limit := _number(folder / "pids.max")) is not None
    ]


def memory() -> list[GroupLimit]:
    """The limits on memory in bytes, innermost group first.

    memory.high is included: a group above it is throttled so hard that a test looks hung. Inactive page cache is
    reclaimed on demand and not counted as used.
    """
    found = []
    for folder in _folders("memory"):
        v1 = (folder / "memory.limit_in_bytes").exists()
        usage = _number(folder / ("memory.usage_in_bytes" if v1 else "memory.current")) or 0
        usage -= min(usage, _statistic(folder / "memory.stat", "total_inactive_file" if v1 else "inactive_file"))
        files = [folder / name for name in (("memory.limit_in_bytes",) if v1 else ("memory.max", "memory.high"))]
        limits = [(file, limit) for file in files if (limit := _number(file)) is not None and limit < _UNLIMITED]
        found += [GroupLimit(file, limit, usage) for file, limit in limits]
    return found


def refused_threads() -> int:
    """How many forks these groups have refused so far because of pids.max."""
    return sum(_statistic(folder / "pids.events", "max") for folder in _folders("pids"))


def huge_pages(page_size: int) -> list[GroupLimit]:
    """The limits on used and on reserved hugetlb memory of one page size, in bytes.

    A Kubernetes pod that requests no huge pages has a limit of 0, however many the host has free.

    :param page_size: in bytes
    """
    unit = "GB" if page_size >= 1 << 30 else "MB"
    name = f"hugetlb.{page_size >> (30 if unit == 'GB' else 20)}{unit}"
    return [
        GroupLimit(folder / f"{name}{part}.{file}", limit, _number(folder / f"{name}{part}.{usage}") or 0)
        for folder in _folders("hugetlb")
        for part in ("", ".rsvd")
        for file, usage in (("max", "current"), ("limit_in_bytes", "usage_in_bytes"))
        if (limit := _number(folder / f"{name}{part}.{file}")) is not None and limit < _UNLIMITED
    ]


def oom_kills() -> int | None:
    """How many processes of this process's group the OOM killer has killed so far; None if the kernel does not count them.

    The kernel counts a kill in the victim's group, not in the group whose limit was hit (memcg_memory_event_mm() in
    __oom_kill_process(), mm/oom_kill.c). memory.events also counts the kills of child groups, memory.events.local does not.
    """
    for folder in _folders("memory"):
        for name in ("memory.events.local", "memory.events", "memory.oom_control"):
            if (folder / name).exists():
                return _statistic(folder / name, "oom_kill")
    return None


def _folders(controller: str) -> Iterator[Path]:
    """The directory of this process's group for a controller, then those of its visible ancestors."""
    try:
        groups = [line.split(":", 2) for line in (PROC / "self/cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (PROC / "self/mountinfo").read_text().splitlines()]
    except OSError:
        return
    of_v1 = next((path for _, controllers, path in groups if controller in controllers.split(",")), None)
    of_v2 = next((path for number, _, path in groups if number == "0"), None)
    for fields in mounts:
        root, mountpoint = fields[3], Path(fields[4])
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        if kind == "cgroup" and of_v1 is not None and controller in options.split(","):
            path = of_v1
        elif kind == "cgroup2" and of_v1 is None and of_v2 is not None:
            path = of_v2
        else:
            continue
        # In a container the mount may begin at its own group although /proc/self/cgroup shows the path on the host.
        group = Path(path)
        below = group.relative_to(root) if group.is_relative_to(root) and ".." not in group.parts else Path()
        for part in (below, *below.parents):
            if (mountpoint / part).is_dir():
                yield mountpoint / part
        return


def _number(file: Path) -> int | None:
    """The number in *file*; None if it holds ``max`` or cannot be read."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _statistic(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(value) for key, value in (line.split() for line in lines) if key == name), 0)
