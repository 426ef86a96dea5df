# SPDX-License-Identifier: GPL-2.0-only
"""How a machine ended, from its console and from how far it came."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from lib.kernel_log import Kind, find_splats

_CONSOLE_LINES = 25
_REPORT_LINES = 40
_TIMESTAMP = re.compile(r"\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ")

# Faults of QEMU's emulation, which say nothing about the kernel.
# int3: a CPU runs into the breakpoint that another one puts where it switches a static key, and the trap is then not
# recognised as such; with multi-threaded TCG (QEMU 7.2: 3 of 25 boots), never on hardware.
_EMULATOR_FAULTS = (re.compile(r"Oops: int3|int3: 0000 \[#"),)


class Ending(Enum):
    """What came of a machine; the text is shown."""

    FINISHED = "finished"
    PANIC = "the kernel panicked"
    OOPS = "the kernel oopsed"
    HANG = "the kernel hung"
    NO_BOOT = "the kernel does not boot"
    NO_KVM = "KVM cannot be tested in this kernel"
    SUITE_DIED = "the suite died in the kernel"
    EMULATOR_FAULT = "the emulator failed"

    @property
    def exit_status(self) -> int:
        """0 good, 1 bad, 125 cannot be tested, as ``git bisect run`` takes them; finished ones are judged by their tests."""
        return {
            Ending.FINISHED: 0,
            Ending.NO_BOOT: 125,
            Ending.NO_KVM: 125,
            Ending.EMULATOR_FAULT: 125,
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


def judge(console: str, booted: bool, ended: bool, overdue: str | None, emulated: bool) -> End:
    """How a machine ended that did not say so itself.

    :param booted: whether its first program ran
    :param ended: whether the suite in it came to its end
    :param overdue: the time limit that it reached, if it did
    """
    lines = console.splitlines()
    tail = tuple(line for line in lines[-_CONSOLE_LINES:] if line.strip())
    splats = find_splats(_TIMESTAMP.sub("", line, count=1) for line in lines)
    gravest = {kind: next((splat for splat in splats if splat.kind is kind), None) for kind in (Kind.PANIC, Kind.OOPS)}
    worst = gravest[Kind.PANIC] or gravest[Kind.OOPS]
    if emulated and any(fault.search(line) for fault in _EMULATOR_FAULTS for line in lines):
        return End(
            Ending.EMULATOR_FAULT, "Oops: int3 at a static key, a known fault of QEMU's multi-threaded TCG", tail
        )
    if ended:
        return End(Ending.FINISHED, "")
    why = worst.title if worst else overdue or "it ended before its tests did"
    if not booted:
        return End(Ending.NO_BOOT, why, tail)
    if worst:
        ending = Ending.PANIC if worst.kind is Kind.PANIC else Ending.OOPS
        return End(ending, _panic_reason(worst.lines) or why, tuple(worst.lines[:_REPORT_LINES]))
    return End(Ending.HANG if overdue else Ending.SUITE_DIED, why, tail)


def _panic_reason(lines: Sequence[str]) -> str | None:
    return next((line for line in lines if line.startswith("Kernel panic")), None)


def kernel_log(console: str) -> str:
    """The kernel's own lines of a console: those with a timestamp."""
    return "".join(f"{line}\n" for line in console.splitlines() if _TIMESTAMP.match(line))
