# SPDX-License-Identifier: GPL-2.0-only
"""One boot of the kernel under test in a machine: the tests that it was given, and how it ended."""

import time
from pathlib import Path
from typing import Any

import pytest

from harness.assigned_tests import NO_MORE, STOP
from harness.run_report import KernelReport
from kvm_util.wording import counted
from runner.boot_outcome import BootOutcome, Diagnosis, diagnose_console, kernel_log, splats_since_init
from runner.qemu import RunningMachine
from runner.target import Target

# pytest's exit statuses for a session that was stopped early or could not begin, and for one that ran to its end
STOPPED = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR)
_DONE = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
_DETAIL_LINES = 12  # of a console or of pytest's output


class Boot:
    """A machine with the kernel under test.

    :param initramfs: a file descriptor
    :param number: of this boot in the run, from 1; from the second on it is part of the names of the boot's files
    :ivar from_end: whether it is given the last of the tests that wait, which start no threads, and not the first
    :ivar log: the name of the file that gets the kernel's log
    :ivar tests: the collected tests, in the order in which the session there numbers them; None until they are known
    :ivar given: the tests that it was given and that have not ended, in the order in which they run
    :ivar running: the first of them, once it has begun
    :ivar ending: whether the session there was told to end
    :ivar status: the exit status of pytest there
    :ivar output: the end of pytest's output there
    :ivar reports: the reports in the kernel's log, once the machine has ended
    """

    def __init__(self, target: Target, initramfs: int, results: Path, number: int, from_end: bool) -> None:
        suffix = "" if number == 1 else f"-{number}"
        self.from_end = from_end
        self.log = f"kernel{suffix}.log"
        self.tests: list[str] | None = None
        self.given: list[str] = []
        self.running: str | None = None
        self.ending = False
        self.status: int = pytest.ExitCode.OK
        self.output = ""
        self.reports: list[KernelReport] = []
        self._target = target
        self._log_path = results / self.log
        console, errors = results / f"console{suffix}.log", results / f"qemu{suffix}.log"
        self._machine = RunningMachine(
            target.qemu, target.booted_machine(not from_end), target.kernel.image, initramfs, console, errors
        )
        self._booted = False
        self._last_message = time.monotonic()

    @property
    def deadline(self) -> float:
        """When the next message has to be there, in seconds of the monotonic clock."""
        return self._last_message + self._target.time_limit

    def fileno(self) -> int:
        """The file descriptor that is readable when :meth:`receive` has something to return."""
        return self._machine.fileno()

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; None if the machine has ended.

        :raises CannotTest: one is garbled, or QEMU failed
        """
        messages = self._machine.receive()
        if messages is None:
            self._machine.check_exit()
        elif messages:
            self._booted, self._last_message = True, time.monotonic()
        return messages

    def give(self, test: str) -> None:
        """Have it run *test* after those that it was given."""
        assert self.tests is not None
        self.given.append(test)
        self._machine.order(str(self.tests.index(test)))

    def finish(self) -> None:
        """Have the session there end after the tests that it was given."""
        self._end(NO_MORE)

    def stop(self) -> None:
        """Have the session there end after the test that is running."""
        self._end(STOP)

    def _end(self, order: str) -> None:
        if not self.ending:
            self.ending = True
            self._machine.order(order)

    def close(self) -> None:
        """End the machine, and write the kernel's log."""
        self._machine.close()
        self._log_path.write_text(kernel_log(self.console()))

    def console(self) -> str:
        """The output of the console so far."""
        return self._machine.console()

    def last_lines(self) -> tuple[str, ...]:
        """The last lines of the console."""
        return tuple(self.console().splitlines()[-_DETAIL_LINES:])

    def diagnose_exit(self, stopped_early: bool, waiting: int) -> Diagnosis:
        """How the kernel ended, if pytest there has exited.

        :param stopped_early: whether the run ends before all tests have run (--maxfail)
        :param waiting: how many tests have not been given to any machine
        """
        if self.status < 0:  # killed by a signal, as after an oops
            return self.diagnose_death(None)
        self._add_reports()
        if oops := next((report for report in self.reports if report.kind == "Oops"), None):
            return Diagnosis(BootOutcome.OOPS, oops.title, tuple(oops.lines))
        output = tuple(self.output.splitlines()[-_DETAIL_LINES:])
        if self.status == pytest.ExitCode.TESTS_FAILED and not self.tests:
            return Diagnosis(
                BootOutcome.NOT_TESTED, "pytest failed in the kernel before it collected the tests", output
            )
        too_early = self.given or not self.ending
        if self.status not in (*_DONE, *STOPPED) or (self.status in _DONE and too_early and not stopped_early):
            left = counted(len(self.given) + waiting, "test")
            return Diagnosis(
                BootOutcome.SUITE_DIED, f"pytest ended with status {self.status}, with {left} left to run", output
            )
        return Diagnosis(BootOutcome.FINISHED, "")

    def diagnose_death(self, timeout: str | None) -> Diagnosis:
        """How the kernel ended, if the suite there has not finished.

        :param timeout: which time limit has expired; None if the machine ended
        """
        diagnosis = diagnose_console(self.console(), self._booted, timeout, self._target.qemu.emulated)
        if diagnosis.outcome is not BootOutcome.EMULATOR_FAULT:
            self._add_reports()
        return diagnosis

    def _add_reports(self) -> None:
        tests = [] if self.running is None else [self.running]
        self.reports += unseen_reports(self.console(), self.reports, tests, self.log)


def unseen_reports(console: str, seen: list[KernelReport], tests: list[str], log: str) -> list[KernelReport]:
    """The kernel log reports that no test has seen: while KVM was loaded, after the tests, or while dying.

    :param seen: those that the session in the kernel has sent
    :param tests: the tests that were running at the end
    :param log: the name of the file with the kernel's log
    """
    known = {report.title for report in seen}
    return [
        KernelReport(splat.kind.value, splat.title, splat.lines, None, tests, log)
        for splat in splats_since_init(console)
        if splat.title not in known
    ]
