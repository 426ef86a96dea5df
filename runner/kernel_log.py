# SPDX-License-Identifier: GPL-2.0-only
"""The kernel log: reading it while tests run, and finding the reports in it (WARN, BUG, Oops, lockdep ...)."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

DEVICE = "/dev/kmsg"

_MOST_LINES = 80  # a report without an end marker is cut off here
_RECORD = 8192  # the kernel writes no larger record (Documentation/ABI/testing/dev-kmsg)


class Kind(Enum):
    """Kinds of reports."""

    LOST = "lost records"
    WARN = "WARN"
    LOCKDEP = "lockdep"
    STALL = "stall"
    UBSAN = "UBSAN"
    KASAN = "sanitizer"
    BUG = "BUG"
    OOPS = "Oops"
    PANIC = "panic"
    # Not in the log:
    TAINT = "taint"  # a flag in /proc/sys/kernel/tainted
    DEATH = "death"  # the host went down


# First lines of reports; the first pattern that matches decides. From lib/{bug,ubsan}.c,
# kernel/{panic,watchdog,hung_task}.c, kernel/locking/lockdep.c, kernel/rcu/tree_stall.h, mm/{kasan,kfence}/report.c,
# arch/x86/kernel/{dumpstack,traps}.c and arch/x86/mm/fault.c.
_TITLES = [
    (kind, re.compile(pattern))
    for kind, pattern in (
        (Kind.PANIC, r"Kernel panic - not syncing"),
        (Kind.OOPS, r"Oops\b"),
        (Kind.OOPS, r"(?!Modules|CPU).*: [0-9a-f]{4} \[#\d+\]"),  # such as "general protection fault: 0000 [#1]"
        (Kind.OOPS, r"Internal error: "),  # arm64's Oops
        (Kind.STALL, r"(?:watchdog: )?BUG: soft lockup"),
        (Kind.STALL, r"BUG: workqueue lockup"),
        (Kind.STALL, r"(?:NMI watchdog|watchdog): .*hard LOCKUP"),
        (Kind.STALL, r"(?:rcu: )?INFO: \S+ (?:self-)?detected (?:expedited )?stall"),
        (Kind.STALL, r"rcu: \S+ kthread (?:starved|timer wakeup didn't happen)"),
        (Kind.STALL, r"INFO: task .* blocked (?:on|for more than)"),
        (Kind.KASAN, r"BUG: K(?:ASAN|FENCE|MSAN|CSAN): "),
        (Kind.UBSAN, r"UBSAN: "),
        (
            Kind.LOCKDEP,
            r"WARNING: (?:possible|inconsistent|suspicious|bad unlock|held lock|lock held|nested lock|Nested lock)",
        ),
        (Kind.LOCKDEP, r"INFO: trying to register non-static key|INFO: lockdep is turned off"),
        (Kind.LOCKDEP, r"\[ BUG: "),  # some lockdep reports, such as "[ BUG: Invalid wait context ]"
        (Kind.BUG, r"kernel BUG at "),
        (Kind.BUG, r"BUG: "),
        (Kind.WARN, r"WARNING: "),
        (Kind.WARN, r"unchecked MSR access error"),
    )
]
_END = re.compile(r"---\[ end (?:trace|Kernel panic)")


@dataclass
class Splat:
    """One report in the kernel log.

    :ivar kind: of the last title in the report: a BUG that ends in an Oops is an Oops
    """

    kind: Kind
    lines: list[str]

    @property
    def title(self) -> str:
        """The report's first line."""
        return self.lines[0]

    @property
    def titles(self) -> list[str]:
        """All title lines of the report: an oops has one for the cause and one for the oops itself."""
        return [line for line in self.lines if _kind(line) is not None]


def find_splats(lines: Iterable[str]) -> list[Splat]:
    """Find the reports in *lines* of the log, which must be without timestamps."""
    splats: list[Splat] = []
    current: Splat | None = None
    for line in lines:
        kind = _kind(line)
        if kind is not None and (current is None or not _continues(current.kind, kind)):
            current = Splat(kind, [])
            splats.append(current)
        if current is None:
            continue
        current.lines.append(line)
        if kind is not None:
            current.kind = kind
        if _END.match(line) or len(current.lines) >= _MOST_LINES:
            current = None
    return splats


def _continues(current: Kind, kind: Kind) -> bool:
    """Whether a title continues the current report: "BUG: ...", "Oops: ..." and "Kernel panic" form one report."""
    return kind in (Kind.OOPS, Kind.PANIC) and current in (Kind.BUG, Kind.OOPS)


def _kind(line: str) -> Kind | None:
    return next((kind for kind, pattern in _TITLES if pattern.match(line)), None)


class KernelLog:
    """The kernel log from now on.

    :raises OSError: this user may not read it (``kernel.dmesg_restrict``), or there is no such device
    """

    def __init__(self, path: str = DEVICE) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._file, 0, os.SEEK_END)

    def new_splats(self) -> list[Splat]:
        """The reports since the last call.

        Records that were overwritten before they were read count as a report of kind LOST.
        """
        lines: list[str] = []
        lost = False
        while True:
            try:
                record = os.read(self._file, _RECORD)
            except BlockingIOError:
                break
            except BrokenPipeError:  # the next record was overwritten; the next read returns the oldest left (dev-kmsg)
                lost = True
                continue
            if not record:
                break
            lines += kernel_lines(record.decode(errors="replace"))
        overrun = [Splat(Kind.LOST, ["the kernel's log overran before it could be read"])] if lost else []
        return overrun + find_splats(lines)

    def close(self) -> None:
        """Close the device."""
        os.close(self._file)


def kernel_lines(records: str) -> list[str]:
    """The text in records of ``/dev/kmsg``, without records that user space wrote."""
    lines: list[str] = []
    for record in records.splitlines():
        header, _, text = record.partition(";")
        # LOG_KERN is facility 0, which user space cannot use. A line that begins with a space continues the previous record
        # (Documentation/ABI/testing/dev-kmsg).
        if record[:1] != " " and int(header.partition(",")[0]) >> 3 == 0:
            lines += re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), text).splitlines()
    return lines
