# SPDX-License-Identifier: GPL-2.0-only
"""How a machine ended, from its console and from how far it came."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from runner.guest_init import BEGINS
from runner.kernel_log import Kind, Splat, find_splats

_CONSOLE_LINES = 25
_REPORT_LINES = 40
# __oom_kill_process() in mm/oom_kill.c
_OUT_OF_MEMORY = re.compile(r"(Out of memory|Memory cgroup out of memory).*: Killed process \d+")
_TIMESTAMP = re.compile(r"\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ")


class Ending(Enum):
    """How a machine ended; the text is shown."""

    FINISHED = "finished"
    PANIC = "the kernel panicked"
    OOPS = "the kernel oopsed"
    HANG = "the kernel hung"
    NO_BOOT = "the kernel does not boot"
    NO_KVM = "KVM cannot be tested in this kernel"
    SUITE_DIED = "the suite died in the kernel"
    EMULATOR_FAULT = "the emulator failed"
    NOT_TESTED = "it cannot be tested"

    @property
    def exit_status(self) -> int:
        """0 good, 1 bad, 125 cannot be tested, as ``git bisect run`` takes them; finished ones are judged by their tests."""
        return {
            Ending.FINISHED: 0,
            Ending.NO_BOOT: 125,
            Ending.NO_KVM: 125,
            Ending.EMULATOR_FAULT: 125,
            Ending.NOT_TESTED: 125,
        }.get(self, 1)


@dataclass(frozen=True)
class End:
    """How a machine ended.

    :ivar detail: one line of why
    """

    ending: Ending
    detail: str
    console: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.ending.value}: {self.detail}" if self.detail else self.ending.value


def judge(console: str, booted: bool, overdue: str | None, emulated: bool) -> End:
    """How a machine ended in which the suite did not come to its end.

    :param booted: whether its first program ran
    :param overdue: for how long no message came, if it was given up
    """
    lines = console.splitlines()
    tail = tuple(line for line in lines[-_CONSOLE_LINES:] if line.strip())
    splats = find_splats(_without_timestamps(console))
    gravest = {kind: next((splat for splat in splats if splat.kind is kind), None) for kind in (Kind.PANIC, Kind.OOPS)}
    worst = gravest[Kind.PANIC] or gravest[Kind.OOPS]
    if emulated and (fault := next(filter(is_emulators_fault, _without_timestamps(console)), None)):
        return End(Ending.EMULATOR_FAULT, fault, tail)
    why = worst.title if worst else overdue or "it ended before its tests did"
    if not booted:
        return End(Ending.NO_BOOT, why, tail)
    if worst:
        ending = Ending.PANIC if worst.kind is Kind.PANIC else Ending.OOPS
        return End(ending, _panic_reason(worst.lines) or why, tuple(worst.lines[:_REPORT_LINES]))
    if not overdue and any(map(_OUT_OF_MEMORY.match, _without_timestamps(console))):
        return End(Ending.NOT_TESTED, "the kernel killed the suite for want of memory (a larger --vm-memory)", tail)
    return End(Ending.HANG if overdue else Ending.SUITE_DIED, why, tail)


def is_emulators_fault(line: str) -> bool:
    """Whether a line of the kernel's log tells of a fault of QEMU's emulation, which says nothing about the kernel.

    int3: a CPU runs into the breakpoint that another one puts where it switches a static key, and the kernel does not
    recognise it as its own any more; with multi-threaded TCG, never on hardware (emulator_faults.py has the causes).
    """
    return bool(re.search(r"^Oops: int3\b|^int3: 0000 \[#", line))


def reports_since_start(console: str) -> list[Splat]:
    """What the kernel reported since its first program began."""
    return find_splats(_without_timestamps(console.partition(BEGINS)[2]))


def reports_at_boot(console: str) -> list[Splat]:
    """What it reported before."""
    return find_splats(_without_timestamps(console.partition(BEGINS)[0]))


def _without_timestamps(console: str) -> list[str]:
    return [_TIMESTAMP.sub("", line, count=1) for line in console.splitlines()]


def _panic_reason(lines: Sequence[str]) -> str | None:
    return next((line for line in lines if line.startswith("Kernel panic")), None)


def kernel_log(console: str) -> str:
    """The kernel's own lines of a console: those with a timestamp."""
    return "".join(f"{line}\n" for line in console.splitlines() if _TIMESTAMP.match(line))
