# SPDX-License-Identifier: GPL-2.0-only
"""Runs the tests in another kernel: boots it, in one machine or several that share the tests, and replays their reports."""

import json
import select
import shutil
import time
from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from dirty_tracking.progress import Step
from harness.boot import STOPPED, Boot
from harness.planned_tests import PlannedTests
from harness.run_report import Facts, KernelReport, RunReport, write_failure
from harness.stored_reports import from_data
from runner import gcov, initramfs
from runner.arch import this_arch
from runner.boot_outcome import BootOutcome, Diagnosis, is_emulator_fault, splats_before_init
from runner.errors import CANNOT_TEST, CannotTest
from runner.guest_init import Job
from runner.guest_session import GuestSession
from runner.target import Target

_MORE_BOOTS = 2  # after faults of the emulator, and for tests that no machine is left to run
# pytest plugins that the session in the kernel does not need; loading each one takes time
_UNUSED_PLUGINS = [
    f"-pno:{name}"
    for name in ("cacheprovider", "doctest", "legacypath", "logging", "unittest", "subtests", "junitxml", "pastebin")
]
_ENVIRONMENT = {
    "PYTHONPATH": f"{initramfs.SITE}:/suite:/suite/lib",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
}
# Only what Python prints is captured there: to read the files that get the output of all else takes time in each test.
_CAPTURE = "--capture=sys"
# Exit statuses of this session that the kernel does not change
_KEPT = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)
# Outcomes that are not the fault of the test that was running
_UNRELATED_TO_TEST = (BootOutcome.EMULATOR_FAULT, BootOutcome.NOT_TESTED)
# Exit statuses of BootOutcome, the best one first
_STATUSES = (0, CANNOT_TEST, 1)


class RemoteSession:
    """A pytest plugin that boots the kernel of *target* and runs a pytest session there, or one in each of several machines.

    Each of them collects the same tests. This session gives them out one by one.

    :param options: of the session there
    :param reproduce_command: the command that reproduces the run
    :param tests: arguments of the session there
    :param tests_here: whether this session runs tests on this host first
    :param results: the run's folder
    :param report: gets the facts of the run
    :param planned: gets the collected tests
    :ivar diagnosis: how the kernel ended; None until then
    """

    def __init__(
        self,
        target: Target,
        options: list[str],
        reproduce_command: str,
        tests: list[str],
        tests_here: bool,
        results: Path,
        report: RunReport,
        planned: PlannedTests,
    ) -> None:
        self._target = target
        self._reproduce_command = reproduce_command
        self._options = options
        self._tests = tests
        self._tests_here = tests_here
        self._results = results
        self._report = report
        self._planned = planned
        self._items: dict[str, tuple[Any, Any]] | None = None
        self._waiting: deque[str] = deque()  # tests that no machine was given, those in _threads first
        self._threads: set[str] = set()  # tests that start threads, where machines differ in CPUs
        self._boots: list[Boot] = []  # those that run
        self._booted = 0
        self._collects = False
        self._ends: list[tuple[str, Diagnosis]] = []  # with the name of the boot's log
        self._stopped = ""  # output of a session that was stopped early or could not begin
        self._status: int = pytest.ExitCode.OK
        self._ended: Mapping[str, list[dict[str, Any]] | str] = {}  # before the run was resumed
        self._earlier_boots = 0
        self.diagnosis: Diagnosis | None = None

    @property
    def collected(self) -> bool:
        """Whether the tests in the kernel are known."""
        return self._items is not None

    def resume(self, ended: Mapping[str, list[dict[str, Any]] | str]) -> None:
        """Go on with a run in which tests have ended: they do not run again, and the logs of its boots stay.

        :param ended: as in ``PastRun``
        """
        self._ended = ended
        self._earlier_boots = len([*self._results.glob("console*.log")])

    @pytest.hookimpl(tryfirst=True)  # before pytest announces the collection
    def pytest_collection(self) -> bool | None:
        """Skip the collection, unless tests run on this host too."""
        return None if self._tests_here else True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, bool, bool]:
        """Run the tests of this host, then boot the kernel."""
        done = yield
        self._session = session
        self._config = session.config
        self._progress: Any = self._config.pluginmanager.get_plugin("progress")
        self._terminal: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        try:
            self._run_machines()
        except (CannotTest, OSError) as error:
            self._ends.append(("", Diagnosis(BootOutcome.NOT_TESTED, str(error))))
        finally:
            self._report.kept = True  # the console and the kernel log are written in any case
        self.diagnosis = self._worst_end()
        self._finish_report(self.diagnosis)
        return done

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.diagnosis is None or session.exitstatus in _KEPT:
            return
        outcome = self.diagnosis.outcome
        if outcome is not BootOutcome.FINISHED:
            # A failure outweighs how the kernel ended later.
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if session.testsfailed else outcome.exit_status
        elif self._status in STOPPED:
            session.exitstatus = self._status

    # --- machines

    def _run_machines(self) -> None:
        """Boot the kernel, in each machine, and handle their messages until all have ended."""
        target = self._target
        shutil.rmtree(self._results / gcov.FOLDER, ignore_errors=True)  # of an earlier run
        how = "emulated" if target.qemu.emulated else "virtualized"
        self._progress.announce(f"booting Linux {target.kernel.release} in QEMU {target.qemu.emulator.version} ({how})")
        with initramfs.build(self._results, target.modules, self._job()) as archive:
            try:
                for number in range(target.machines):
                    self._boot(archive, from_end=number % 2 == 1)
                while self._boots:
                    self._wait(archive)
            finally:
                for boot in self._boots:
                    boot.close()

    def _boot(self, archive: BinaryIO, from_end: bool) -> None:
        self._booted += 1
        number = self._earlier_boots + self._booted
        self._boots.append(Boot(self._target, archive.fileno(), self._results, number, from_end))

    def _job(self) -> Job:
        """What the kernel is to do after booting."""
        target, port = self._target, this_arch().report_port
        session = GuestSession(port, self._reproduce_command, target.qemu.emulated, self._config.option.gcov)
        program = [initramfs.PYTHON, "runner/guest_pytest.py", json.dumps(asdict(session))]
        parameters = target.added | target.parameters
        return Job(
            report_port=port,
            modules=[(module.guest_path, module.arguments(parameters), module.optional) for module in target.modules],
            parameters=target.parameters,
            keep_off_cpu_0=target.qemu.keeps_off_cpu_0,
            command=[*program, *_UNUSED_PLUGINS, _CAPTURE, *self._options, *self._tests],
            environment=_ENVIRONMENT,
        )

    def _wait(self, archive: BinaryIO) -> None:
        """Wait until a machine has sent something, or has been silent for too long."""
        now = time.monotonic()
        left = min(boot.deadline for boot in self._boots) - now
        ready = select.select(self._boots, [], [], max(left, 0))[0]
        # As of before select(): on a busy host, messages may wait while this process does not run.
        silent = [boot for boot in self._boots if boot not in ready and boot.deadline <= now]
        for boot in ready:
            if end := self._receive(boot):
                self._end(boot, end, archive)
        for boot in silent:
            limit = f"no message for {self._target.time_limit:g} s (--time-limit)"
            self._end(boot, boot.diagnose_death(limit), archive)

    def _receive(self, boot: Boot) -> Diagnosis | None:
        """Handle what a machine has sent; returns how it ended, if it has."""
        try:
            messages = boot.receive()
            if messages is None:
                return boot.diagnose_death(None)
            for message in messages:
                if "cannot_test" in message:
                    return Diagnosis(BootOutcome.NO_KVM, message["cannot_test"], boot.last_lines())
                if "exit_status" in message:
                    boot.status, boot.output = message["exit_status"], message["output"]
                    return boot.diagnose_exit(self._stops_early, len(self._waiting))
                self.handle_message(boot, message)
        except _EmulatorFault as fault:
            return Diagnosis(BootOutcome.EMULATOR_FAULT, str(fault))
        except CannotTest as error:
            return Diagnosis(BootOutcome.NOT_TESTED, str(error))
        return None

    def _end(self, boot: Boot, end: Diagnosis, archive: BinaryIO) -> None:
        """Handle the end of a machine: its tests, and its kernel log; boot again after a fault of the emulator."""
        self._boots.remove(boot)
        boot.close()
        for splat in splats_before_init(boot.console()):
            note = f"the kernel reported while it booted, before KVM was loaded: {splat.title}"
            if note not in self._report.notes:
                self._report.notes.append(note)
        self._report.kernel_reports += boot.reports
        if boot.status in STOPPED:
            self._status, self._stopped = boot.status, boot.output
        if boot.running is not None:
            self._progress.forget(boot.running)
        if end.outcome is BootOutcome.EMULATOR_FAULT:
            self._put_back(boot)
            if self._items is None or self._waiting:
                self._handle_emulator_fault(boot, end, archive)
                return
        elif end.outcome is not BootOutcome.FINISHED:
            if boot.running is not None:
                boot.given.remove(boot.running)
                if end.outcome not in _UNRELATED_TO_TEST:
                    self._fail(boot.running, f"{end}, while this test ran (the end of the kernel's console is below)")
            self._put_back(boot)
        self._ends.append((boot.log, end))
        self._stop_early()
        left = any(not any(self._can_run(other, test) for other in self._boots) for test in self._waiting)
        if left and self._target.machines > 1:
            self._boot_again(archive, from_end=False)  # such a machine can run all tests

    def _handle_emulator_fault(self, boot: Boot, end: Diagnosis, archive: BinaryIO) -> None:
        """Report a fault of the emulator in *boot*, and boot once more."""
        again = self._boot_again(archive, boot.from_end)
        self._print_line(f"EMULATOR FAULT: {end.detail}{'; the remaining tests run in another boot' if again else ''}")
        self._report.notes.append(f"emulator fault ({boot.log}): {end.detail}")
        if not again:
            self._ends.append((boot.log, end))

    def _boot_again(self, archive: BinaryIO, from_end: bool) -> bool:
        """Boot once more, if that has not happened too often; returns whether it has not."""
        again = self._booted < self._target.machines + _MORE_BOOTS
        if again:
            self._boot(archive, from_end)
        return again

    def _can_run(self, boot: Boot, test: str) -> bool:
        """Whether a machine may be given *test*."""
        return not boot.ending and not (boot.from_end and test in self._threads)

    # --- messages

    def handle_message(self, boot: Boot, message: dict[str, Any]) -> None:
        """Handle a message of the session in a kernel (``ReportStream``).

        :raises CannotTest: it has collected other tests than that in another machine
        """
        if "booted" in message and not self._collects:
            self._collects = True
            self._progress.announce(f"collecting the tests in Linux {self._target.kernel.release}")
        elif "environment" in message:
            # The number of CPUs has to be the same in each run: the first kind of machine counts, the other until it tells.
            if not boot.from_end or "cpus" not in self._report.facts.host:
                facts = Facts(**message["environment"])
                facts.place, facts.machine = str(self._target.qemu), self._target.data
                self._report.facts = facts
        elif "items" in message:
            self._begin(boot, message["items"], message["threads"])
        elif "start" in message:
            boot.running = message["start"]
            self._call_logstart(boot.running, but=self._terminal)
        elif "report" in message:
            self._handle_report(boot, message["report"])
        elif "collect_report" in message and self._items is None:  # the other machines' are the same
            report = from_data(self._config, message["collect_report"])
            self._config.hook.pytest_collectreport(report=report)
        elif "kernel_log" in message:
            boot.reports = [KernelReport(**report | {"log": boot.log}) for report in message["kernel_log"]]
        elif "step" in message and boot.running is not None:
            self._progress.update(boot.running, Step(*message["step"]))
        elif "failure" in message:
            write_failure(self._results, *message["failure"])
        elif "gcov" in message:
            try:
                gcov.save(self._results, Path(boot.log).stem, *message["gcov"])
            except OSError as error:
                self._print_line(f"--gcov: {error.filename}: {error.strerror}")
        elif "internal_error" in message:
            self._print_line(message["internal_error"])

    def _begin(self, boot: Boot, items: dict[str, tuple[Any, Any]], threads: list[str]) -> None:
        """Begin with the tests in a machine that has collected them: one to run, and one to wait there.

        :param threads: which of them start threads
        """
        if self._items is None:
            self._items = items
            self._planned.plan({nodeid: map(tuple, properties) for nodeid, (_, properties) in items.items()})
            self._session.testscollected += len(items)
            if self._target.machine_without_threads is not None:
                self._threads.update(threads)
            for nodeid in sorted(items, key=lambda nodeid: nodeid not in self._threads):
                if nodeid in self._ended:
                    self._show_again(nodeid)
                else:
                    self._waiting.append(nodeid)
        elif list(items) != list(self._items):
            raise CannotTest("the machines have collected different tests")
        boot.tests = list(items)
        for _ in range(2):
            self._give_next(boot)

    def _give_next(self, boot: Boot) -> None:
        if self._waiting and self._can_run(boot, self._waiting[-1 if boot.from_end else 0]):
            boot.give(self._waiting.pop() if boot.from_end else self._waiting.popleft())
        else:
            boot.finish()

    def _handle_report(self, boot: Boot, data: dict[str, Any]) -> None:
        assert self._items is not None
        assert boot.running is not None
        report = from_data(self._config, data | {"nodeid": boot.running, "location": self._items[boot.running][0]})
        assert isinstance(report, pytest.TestReport)
        for name, value in report.user_properties:
            if name == "kernel_log" and self._target.qemu.emulated and is_emulator_fault(str(value)):
                raise _EmulatorFault(str(value))
        self._show(report)
        if report.when == "teardown":
            boot.given.remove(report.nodeid)
            boot.running = None
            self._config.hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)
            self._stop_early()
            self._give_next(boot)

    # --- the run

    @property
    def _stops_early(self) -> bool:
        """Whether so many tests have failed that the run ends."""
        most = self._config.option.maxfail
        return bool(most) and self._session.testsfailed >= most

    def _stop_early(self) -> None:
        """Have all machines end after the test that is running, if so many tests have failed."""
        if self._stops_early:
            self._waiting.clear()
            for boot in self._boots:
                boot.stop()

    def _put_back(self, boot: Boot) -> None:
        """Have another machine run the tests that one that has ended did not begin."""
        if not self._stops_early:
            (self._waiting.extend if boot.from_end else self._waiting.extendleft)(reversed(boot.given))

    def _worst_end(self) -> Diagnosis:
        """How the kernel ended in the machine in which it ended worst."""
        # A fault of the emulator that cost no test does not count.
        ends = [
            end
            for _, end in self._ends
            if end.outcome is not BootOutcome.EMULATOR_FAULT or self._items is None or self._waiting
        ]
        done = Diagnosis(BootOutcome.FINISHED, "")
        return max([*ends, done], key=lambda end: _STATUSES.index(end.outcome.exit_status))

    def _finish_report(self, worst: Diagnosis) -> None:
        """Report how the kernel ended, and why the remaining tests did not run."""
        report = self._report
        report.end = {"ending": worst.outcome.name, "text": str(worst), "console": list(worst.console)}
        if self._stopped:
            report.notes += ["", f"pytest in the kernel ended with status {self._status}:", *self._stopped.splitlines()]
        if worst.outcome is BootOutcome.FINISHED:
            return
        self._planned.why = worst.outcome.value
        for log, end in self._ends:
            if end.outcome is not BootOutcome.FINISHED:
                where = f" ({log})" if self._target.machines > 1 else ""
                report.notes += ["", f"KERNEL {self._target.kernel.release}{where}: {end}"]
                if end.console:
                    report.notes += ["the end of its console:", *(f"  {line}" for line in end.console)]

    def _fail(self, nodeid: str, text: str) -> None:
        """Report as failed a test that died with its kernel."""
        assert self._items is not None
        location, properties = self._items[nodeid]
        self._show(
            pytest.TestReport(
                nodeid,
                tuple(location),
                {},
                "failed",
                text,
                "call",
                user_properties=[tuple(pair) for pair in properties],
            )
        )
        self._config.hook.pytest_runtest_logfinish(nodeid=nodeid, location=tuple(location))

    def _show_again(self, nodeid: str) -> None:
        """Report a test that ended before the run was resumed."""
        reports = self._ended[nodeid]
        assert not isinstance(reports, str)  # that this host died is no failure of another kernel's test
        for data in reports:
            report = from_data(self._config, data)
            assert isinstance(report, pytest.TestReport)
            self._show(report)

    def _show(self, report: pytest.TestReport) -> None:
        """Pass on a report. For the terminal a test begins here: it names one test at a time, before its outcome."""
        if report.when == "call" or not report.passed:
            self._terminal.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
        self._config.hook.pytest_runtest_logreport(report=report)

    def _call_logstart(self, nodeid: str, but: Any) -> None:
        assert self._items is not None
        hook = self._config.pluginmanager.subset_hook_caller("pytest_runtest_logstart", [but])
        hook(nodeid=nodeid, location=tuple(self._items[nodeid][0]))

    def _print_line(self, text: str) -> None:
        self._terminal.ensure_newline()
        self._terminal.write_line(text)


class _EmulatorFault(Exception):
    """The kernel log has a report that only a fault of the emulator causes."""
