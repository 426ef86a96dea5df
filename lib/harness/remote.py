# SPDX-License-Identifier: GPL-2.0-only
"""Runs the tests in another kernel: boots it, and replays the test reports of the pytest session in it."""

import json
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dirty_tracking.progress import Step
from harness.planned_tests import PlannedTests
from harness.run_report import Facts, KernelReport, RunReport, write_failure
from kvm_util.wording import counted
from runner import initramfs
from runner.arch import this_arch
from runner.boot_outcome import (
    BootOutcome,
    Diagnosis,
    diagnose_console,
    is_emulator_fault,
    kernel_log,
    splats_before_init,
    splats_since_init,
)
from runner.errors import CannotTest
from runner.guest_init import Job
from runner.guest_session import GuestSession
from runner.qemu import NoOutputTimeout, RunningMachine
from runner.target import Target

_MAX_BOOTS = 3
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
# pytest's exit statuses for a session that was stopped early or could not begin, and for one that ran to its end
_STOPPED = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR)
_DONE = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
# Exit statuses of this session that the kernel does not change
_KEPT = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)
# Outcomes that are not the fault of the test that was running
_UNRELATED_TO_TEST = (BootOutcome.EMULATOR_FAULT, BootOutcome.NOT_TESTED)
_DETAIL_LINES = 12  # of a console or of pytest's output


class RemoteSession:
    """A pytest plugin that boots the kernel of *target* and runs a pytest session there.

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
        self._items: dict[str, tuple[Any, Any]] = {}
        self._left: list[str] = []
        self._running: str | None = None
        self._status: int = pytest.ExitCode.OK
        self._output = ""
        self.diagnosis: Diagnosis | None = None

    @pytest.hookimpl(tryfirst=True)  # before pytest announces the collection
    def pytest_collection(self) -> bool | None:
        """Skip the collection, unless tests run on this host too."""
        return None if self._tests_here else True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, bool, bool]:
        """Run the tests of this host, then boot the kernel; boot again after a fault of the emulator."""
        done = yield
        self._session = session
        self._config = session.config
        self._progress: Any = self._config.pluginmanager.get_plugin("progress")
        try:
            self.diagnosis = self._boot_until_done()
        except (CannotTest, OSError) as error:
            self.diagnosis = Diagnosis(BootOutcome.NOT_TESTED, str(error))
        finally:
            self._report.kept = True  # the console and the kernel log are written in any case
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
        elif self._status in _STOPPED:
            session.exitstatus = self._status

    def _boot_until_done(self) -> Diagnosis:
        """Boot the kernel; after a fault of the emulator once more, for the tests that are left."""
        for boot in range(1, _MAX_BOOTS + 1):
            diagnosis = self._boot(boot)
            if diagnosis.outcome is not BootOutcome.EMULATOR_FAULT:
                break
            if self._items and not self._left:
                return Diagnosis(BootOutcome.FINISHED, "")  # the fault came after the last test
            again = "; the remaining tests run in another boot" if boot < _MAX_BOOTS else ""
            self._print_line(f"EMULATOR FAULT: {diagnosis.detail}{again}")
            self._report.notes.append(f"emulator fault in boot {boot}: {diagnosis.detail}")
        return diagnosis

    def _boot(self, boot: int) -> Diagnosis:
        """Boot once, and run the remaining tests."""
        suffix = "" if boot == 1 else f"-{boot}"
        console = self._results / f"console{suffix}.log"
        self._running = None
        target = self._target
        how = "emulated" if target.qemu.emulated else "virtualized"
        self._progress.announce(f"booting Linux {target.kernel.release} in QEMU {target.qemu.emulator.version} ({how})")
        with initramfs.build(self._results, target.modules, self._job()) as archive:
            machine = RunningMachine(target.qemu, target.booted_machine, target.kernel.image, archive.fileno(), console)
        try:
            with machine:
                return self._handle_messages(machine)
        finally:
            (self._results / f"kernel{suffix}.log").write_text(kernel_log(machine.console()))

    def _job(self) -> Job:
        """What the kernel is to do after booting."""
        target, port = self._target, this_arch().report_port
        session = GuestSession(port, self._reproduce_command, target.qemu.emulated)
        tests = self._left if self._items else self._tests
        program = [initramfs.PYTHON, "runner/guest_pytest.py", json.dumps(asdict(session))]
        parameters = target.added | target.parameters
        return Job(
            report_port=port,
            modules=[(module.guest_path, module.arguments(parameters)) for module in target.modules],
            parameters=target.parameters,
            keep_off_cpu_0=target.qemu.keeps_off_cpu_0,
            command=[*program, *_UNUSED_PLUGINS, *self._options, *tests],
            environment=_ENVIRONMENT,
        )

    def _handle_messages(self, machine: RunningMachine) -> Diagnosis:
        """Handle the machine's messages until the kernel ends; returns how it ended."""
        booted, timeout = False, None
        try:
            for message in machine.messages(self._target.time_limit):
                if not booted:
                    booted = True
                    self._progress.announce(f"collecting the tests in Linux {self._target.kernel.release}")
                if "cannot_test" in message:
                    console = machine.console().splitlines()[-_DETAIL_LINES:]
                    return Diagnosis(BootOutcome.NO_KVM, message["cannot_test"], tuple(console))
                if "exit_status" in message:
                    self._status, self._output = message["exit_status"], message["output"]
                    return self._diagnose_exit(machine.console())
                self.handle_message(message)
        except NoOutputTimeout:
            timeout = f"no message for {self._target.time_limit:g} s (--time-limit)"
        except _EmulatorFault as fault:
            return Diagnosis(BootOutcome.EMULATOR_FAULT, str(fault))
        else:
            machine.check_exit()
        return self._diagnose_death(machine.console(), booted, timeout)

    def _diagnose_exit(self, console: str) -> Diagnosis:
        """How the kernel ended, if pytest in it has exited."""
        if self._status < 0:  # killed by a signal, as after an oops
            return self._diagnose_death(console, booted=True, timeout=None)
        self.add_splats(console)
        if oops := next((one for one in self._report.kernel_reports if one.kind == "Oops"), None):
            return Diagnosis(BootOutcome.OOPS, oops.title, tuple(oops.lines))
        output = tuple(self._output.splitlines()[-_DETAIL_LINES:])
        if self._status == pytest.ExitCode.TESTS_FAILED and not self._items:
            return Diagnosis(
                BootOutcome.NOT_TESTED, "pytest failed in the kernel before it collected the tests", output
            )
        most = self._config.option.maxfail
        stopped_early = most and self._session.testsfailed >= most
        if self._status not in (*_DONE, *_STOPPED) or (self._status in _DONE and self._left and not stopped_early):
            detail = f"pytest ended with status {self._status}, with {counted(len(self._left), 'test')} left to run"
            return Diagnosis(BootOutcome.SUITE_DIED, detail, output)
        return Diagnosis(BootOutcome.FINISHED, "")

    def _diagnose_death(self, console: str, booted: bool, timeout: str | None) -> Diagnosis:
        """How the kernel ended, if the suite in it has not finished.

        :param booted: whether there was any message from it
        :param timeout: which time limit has expired; None if the machine ended
        """
        diagnosis = diagnose_console(console, booted, timeout, self._target.qemu.emulated)
        if diagnosis.outcome is not BootOutcome.EMULATOR_FAULT:
            self.add_splats(console)
        return diagnosis

    def add_splats(self, console: str) -> None:
        """Add the kernel log reports that no test has seen: while KVM was loaded, after the tests, or while dying."""
        known = {report.title for report in self._report.kernel_reports}
        tests = [] if self._running is None else [self._running]
        for splat in splats_since_init(console):
            if splat.title not in known:
                self._report.kernel_reports.append(
                    KernelReport(splat.kind.value, splat.title, splat.lines, None, tests)
                )
        for splat in splats_before_init(console):
            self._report.notes.append(f"the kernel reported while it booted, before KVM was loaded: {splat.title}")

    def handle_message(self, message: dict[str, Any]) -> None:
        """Handle a message of the session in the kernel (``ReportStream``)."""
        if "environment" in message:
            facts = Facts(**message["environment"])
            facts.place, facts.machine = str(self._target.qemu), self._target.data
            self._report.facts = facts
        elif "items" in message and not self._items:
            self._items = message["items"]
            self._left = list(self._items)
            self._planned.plan({nodeid: map(tuple, properties) for nodeid, (_, properties) in self._items.items()})
            self._session.testscollected += len(self._items)
        elif "start" in message:
            self._running = message["start"]
            self._config.hook.pytest_runtest_logstart(nodeid=self._running, location=self._location(self._running))
        elif "report" in message:
            self._handle_report(message["report"])
        elif "kernel_log" in message:
            self._report.kernel_reports += [KernelReport(**report) for report in message["kernel_log"]]
        elif "step" in message and self._running is not None:
            self._progress.update(self._running, Step(*message["step"]))
        elif "failure" in message:
            write_failure(self._results, *message["failure"])
        elif "internal_error" in message:
            self._print_line(message["internal_error"])

    def _handle_report(self, data: dict[str, Any]) -> None:
        report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
        if isinstance(report, pytest.CollectReport):
            self._config.hook.pytest_collectreport(report=report)
            return
        if isinstance(report.longrepr, list):
            # pytest recognizes a skip by the tuple, which JSON turns into a list
            report.longrepr = tuple(report.longrepr)
        for name, value in report.user_properties:
            if name == "kernel_log" and self._target.qemu.emulated and is_emulator_fault(str(value)):
                raise _EmulatorFault(str(value))
        self._config.hook.pytest_runtest_logreport(report=report)
        if report.when == "teardown":
            if report.nodeid in self._left:
                self._left.remove(report.nodeid)
            self._running = None
            self._config.hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)

    def _finish_report(self, diagnosis: Diagnosis) -> None:
        """Report how the kernel ended, and why the remaining tests did not run."""
        report, outcome, console = self._report, diagnosis.outcome, list(diagnosis.console)
        report.end = {"ending": outcome.name, "text": str(diagnosis), "console": console}
        if outcome is BootOutcome.FINISHED:
            if self._status in _STOPPED:
                title = f"pytest in the kernel ended with status {self._status}:"
                report.notes += ["", title, *self._output.splitlines()]
            return
        if self._running is not None and outcome not in _UNRELATED_TO_TEST:
            self._fail(self._running, f"{diagnosis}, while this test ran (the end of the kernel's console is below)")
        self._planned.why = outcome.value
        report.notes += ["", f"KERNEL {self._target.kernel.release}: {diagnosis}"]
        if console:
            report.notes += ["the end of its console:", *(f"  {line}" for line in console)]

    def _fail(self, nodeid: str, text: str) -> None:
        """Report as failed a test that died with its kernel."""
        location, properties = self._items[nodeid]
        report = pytest.TestReport(
            nodeid, tuple(location), {}, "failed", text, "call", user_properties=[tuple(pair) for pair in properties]
        )
        self._config.hook.pytest_runtest_logreport(report=report)

    def _location(self, nodeid: str) -> Any:
        return tuple(self._items[nodeid][0])

    def _print_line(self, text: str) -> None:
        reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        reporter.ensure_newline()
        reporter.write_line(text)


class _EmulatorFault(Exception):
    """The kernel log has a report that only a fault of the emulator causes."""
