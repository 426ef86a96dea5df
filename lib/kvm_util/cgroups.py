# SPDX-License-Identifier: GPL-2.0-only
"""What the control groups that this process is in let it have (cgroup v1 and v2, each controller for itself)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
# Without a limit v1 shows the largest number of pages that fits into 63 bits
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Allowance:
    """What a group may have, and has taken; *file* is the one that sets it."""

    file: Path
    most: int
    taken: int


def pids() -> list[Allowance]:
    """How many threads and processes there may be, for each group that limits them."""
    return [
        Allowance(folder / "pids.max", most, _number(folder / "pids.current") or 0)
        for folder in _folders("pids")
        if (most := _number(folder / "pids.max")) is not None
    ]


def memory() -> list[Allowance]:
    """How many bytes of memory there may be, for each group that limits them.

    Beyond memory.high a group is not killed but slowed down, until a test looks as if it hung: it counts as a limit too.
    Cached files that are in no recent use are given back on demand, and do not count as taken.
    """
    found = []
    for folder in _folders("memory"):
        v1 = (folder / "memory.limit_in_bytes").exists()
        taken = _number(folder / ("memory.usage_in_bytes" if v1 else "memory.current")) or 0
        taken -= min(taken, _statistic(folder / "memory.stat", "total_inactive_file" if v1 else "inactive_file"))
        files = [folder / name for name in (("memory.limit_in_bytes",) if v1 else ("memory.max", "memory.high"))]
        limits = [(file, most) for file in files if (most := _number(file)) is not None and most < _UNLIMITED]
        found += [Allowance(file, most, taken) for file, most in limits]
    return found


def refused_threads() -> int:
    """How many threads and processes have been refused so far for one of these limits."""
    return sum(_statistic(folder / "pids.events", "max") for folder in _folders("pids"))


def huge_pages(page_size: int) -> list[Allowance]:
    """How many bytes there may be in hugetlb pages of a size, used or reserved, for each group that limits them.

    A pod of Kubernetes that asks for none may have none, however many the host has free.
    """
    unit = "GB" if page_size >= 1 << 30 else "MB"
    name = f"hugetlb.{page_size >> (30 if unit == 'GB' else 20)}{unit}"
    return [
        Allowance(folder / f"{name}{part}.{limit}", most, _number(folder / f"{name}{part}.{usage}") or 0)
        for folder in _folders("hugetlb")
        for part in ("", ".rsvd")
        for limit, usage in (("max", "current"), ("limit_in_bytes", "usage_in_bytes"))
        if (most := _number(folder / f"{name}{part}.{limit}")) is not None and most < _UNLIMITED
    ]


def oom_kills() -> int | None:
    """How many processes of this process's group the kernel has killed so far for want of memory; None if it does not say.

    It is the group of who was killed that counts it, not the one whose limit was reached (memcg_memory_event_mm() in
    __oom_kill_process(), mm/oom_kill.c); memory.events alone has those of the groups below too.
    """
    for folder in _folders("memory"):
        for name in ("memory.events.local", "memory.events", "memory.oom_control"):
            if (folder / name).exists():
                return _statistic(folder / name, "oom_kill")
    return None


def _folders(controller: str) -> Iterator[Path]:
    """The folder of this process's group for a controller, and of each group above that can be seen here."""
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
        # A container may see its own group as the root of the mount, and still its path from the host's.
        group = Path(path)
        below = group.relative_to(root) if group.is_relative_to(root) and ".." not in group.parts else Path()
        for part in (below, *below.parents):
            if (mountpoint / part).is_dir():
                yield mountpoint / part
        return


def _number(file: Path) -> int | None:
    """The number in *file*; None when there is none: ``max``, or no such file."""
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
