# SPDX-License-Identifier: GPL-2.0-only
"""How a booted kernel ended, diagnosed from its console."""

import re
from dataclasses import dataclass
from enum import Enum

from runner.arch import this_arch
from runner.errors import CANNOT_TEST
from runner.guest_init import INIT_MARKER
from runner.kernel_log import Kind, Splat, find_splats

_CONSOLE_LINES = 25
_SPLAT_LINES = 40
# __oom_kill_process() in mm/oom_kill.c
_OUT_OF_MEMORY = re.compile(r"(Out of memory|Memory cgroup out of memory).*: Killed process \d+")
_TIMESTAMP = re.compile(r"\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ")


class BootOutcome(Enum):
    """How a booted kernel ended; the value is what users see."""

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
        """0 good, 1 bad, 125 cannot be tested, as ``git bisect run`` takes them; the tests of a FINISHED one decide."""
        bad = {BootOutcome.PANIC, BootOutcome.OOPS, BootOutcome.HANG, BootOutcome.SUITE_DIED}
        return 0 if self is BootOutcome.FINISHED else 1 if self in bad else CANNOT_TEST


@dataclass(frozen=True)
class Diagnosis:
    """How a booted kernel ended, and why.

    :ivar detail: the reason in one line, if there is one
    :ivar console: the lines of the console that show it
    """

    outcome: BootOutcome
    detail: str
    console: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.outcome.value}: {self.detail}" if self.detail else self.outcome.value


def diagnose_console(console: str, booted: bool, timeout: str | None, emulated: bool) -> Diagnosis:
    """Diagnose a kernel in which the suite did not finish.

    :param booted: whether init started
    :param timeout: the exceeded time limit, if it was killed for that
    :param emulated: whether TCG emulated its CPUs
    """
    log = _without_timestamps(console)
    tail = tuple(line for line in console.splitlines()[-_CONSOLE_LINES:] if line.strip())
    if emulated and (fault := next(filter(is_emulator_fault, log), None)):
        return Diagnosis(BootOutcome.EMULATOR_FAULT, fault, tail)
    splats = find_splats(log)
    worst = next((splat for kind in (Kind.PANIC, Kind.OOPS) for splat in splats if splat.kind is kind), None)
    why = worst.title if worst else timeout or "it ended before its tests did"
    if not booted:
        return Diagnosis(BootOutcome.NO_BOOT, why, tail)
    if worst:
        outcome = BootOutcome.PANIC if worst.kind is Kind.PANIC else BootOutcome.OOPS
        panic = next((line for line in worst.lines if line.startswith("Kernel panic")), why)
        return Diagnosis(outcome, panic, tuple(worst.lines[:_SPLAT_LINES]))
    if timeout:
        return Diagnosis(BootOutcome.HANG, why, tail)
    if any(map(_OUT_OF_MEMORY.match, log)):
        short = "the kernel killed the suite for want of memory (a larger --vm-memory)"
        return Diagnosis(BootOutcome.NOT_TESTED, short, tail)
    return Diagnosis(BootOutcome.SUITE_DIED, why, tail)


def is_emulator_fault(line: str) -> bool:
    """Whether a line of the kernel's log reports a fault of QEMU's emulation, which says nothing about the kernel."""
    return bool(this_arch().emulator_oops.match(line))


def splats_since_init(console: str) -> list[Splat]:
    """The kernel's reports since init started."""
    return find_splats(_without_timestamps(console.partition(INIT_MARKER)[2]))


def splats_before_init(console: str) -> list[Splat]:
    """The kernel's reports while it booted."""
    return find_splats(_without_timestamps(console.partition(INIT_MARKER)[0]))


def kernel_log(console: str) -> str:
    """The kernel's own lines of a console: those with a timestamp."""
    return "".join(f"{line}\n" for line in console.splitlines() if _TIMESTAMP.match(line))


def _without_timestamps(console: str) -> list[str]:
    return [_TIMESTAMP.sub("", line, count=1) for line in console.splitlines()]
