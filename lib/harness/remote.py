# SPDX-License-Identifier: GPL-2.0-only
"""A pytest session whose tests run in another kernel: it boots the kernel, and takes up the reports of the pytest in there."""

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
from runner.ending import End, Ending, is_emulators_fault, judge, kernel_log, reports_at_boot, reports_since_start
from runner.errors import CannotTest
from runner.guest_init import REPORTS
from runner.guest_session import GuestSession
from runner.qemu import Deadline, RunningMachine
from runner.target import Target

_MOST_BOOTS = 3
# Of pytest's plugins few are of use there, and each costs time.
_NEEDLESS = [
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
# How pytest says that it was stopped before its end, or could not begin (its exit statuses)
_STOPPED = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR)
_DONE = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
# Ends that say nothing about the test that was running
_NOT_THE_TESTS = (Ending.EMULATOR_FAULT, Ending.NOT_TESTED)


class RemoteSession:
    """A plugin that runs pytest with *options* and *tests* as its arguments in the kernel of *target*.

    :param repeat_with: the command that does so again
    :param tests_here: whether some tests of the session run on this host, before those
    :param results: where the files go
    :param report: takes the facts of the run from here
    :param planned: takes the tests from here
    """

    def __init__(
        self,
        target: Target,
        options: list[str],
        repeat_with: str,
        tests: list[str],
        tests_here: bool,
        results: Path,
        report: RunReport,
        planned: PlannedTests,
    ) -> None:
        self._target = target
        self._repeat_with = repeat_with
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
        self.end: End | None = None

    @pytest.hookimpl(tryfirst=True)  # before pytest says that it collects
    def pytest_collection(self) -> bool | None:
        """Nothing is collected here, unless tests run here too."""
        return None if self._tests_here else True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, bool, bool]:
        """After the tests of this host boot the kernel, as often as the emulator's faults make it necessary."""
        done = yield
        self._session = session
        self._config = session.config
        self._progress: Any = self._config.pluginmanager.get_plugin("progress")
        try:
            self.end = self._boot_until_done()
        except (CannotTest, OSError) as error:
            self.end = End(Ending.NOT_TESTED, str(error))
        finally:
            self._report.kept = True  # the console and the kernel's log are there in any case
        self._close(self.end)
        return done

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.end is None or session.exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR):
            return
        if self.end.ending is not Ending.FINISHED:
            # What failed before is no better for what came then.
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if session.testsfailed else self.end.ending.exit_status
        elif self._status in _STOPPED:
            session.exitstatus = self._status

    def _boot_until_done(self) -> End:
        for boot in range(1, _MOST_BOOTS + 1):
            end = self._boot(boot)
            if end.ending is not Ending.EMULATOR_FAULT:
                break
            if self._items and not self._left:
                return End(Ending.FINISHED, "")  # it came after the last test
            self._say(f"EMULATOR FAULT: {end.detail}" + ("; what is left runs again" if boot < _MOST_BOOTS else ""))
            self._report.remarks.append(f"emulator fault in boot {boot}: {end.detail}")
        return end

    def _boot(self, boot: int) -> End:
        """Boot once, and run what is left to run."""
        suffix = "" if boot == 1 else f"-{boot}"
        console = self._results / f"console{suffix}.log"
        self._running = None
        target = self._target
        how = "emulated" if target.qemu.emulated else "virtualized"
        self._progress.doing(f"booting Linux {target.kernel.release} in QEMU {target.qemu.emulator.version} ({how})")
        with initramfs.build(self._results, target.modules, self._orders()) as archive:
            machine = RunningMachine(target.qemu, target.booted_machine, target.kernel.image, archive.fileno(), console)
        try:
            return self._follow(machine)
        finally:
            machine.stop()
            (self._results / f"kernel{suffix}.log").write_text(kernel_log(machine.console()))

    def _orders(self) -> dict[str, Any]:
        tests = self._left if self._items else self._tests
        session = GuestSession(REPORTS, self._repeat_with, self._target.qemu.emulated)
        return {
            "parameters": self._target.parameters,
            "added_parameters": self._target.added,
            "keep_off_cpu_0": self._target.qemu.emulated,
            "command": [
                initramfs.PYTHON,
                "runner/guest_pytest.py",
                json.dumps(asdict(session)),
                *_NEEDLESS,
                *self._options,
                *tests,
            ],
            "environment": _ENVIRONMENT,
        }

    def _follow(self, machine: RunningMachine) -> End:
        """Take up the machine's messages, to its end."""
        booted, overdue = False, None
        try:
            for message in machine.messages(self._target.time_limit):
                if not booted:
                    booted = True
                    self._progress.doing(f"collecting the tests in Linux {self._target.kernel.release}")
                if "cannot" in message:
                    return End(Ending.NO_KVM, message["cannot"], tuple(machine.console().splitlines()[-12:]))
                if "ended" in message:
                    self._status, self._output = message["ended"], message["output"]
                    return self._finished(machine.console())
                self._take(message)
        except Deadline:
            overdue = f"no message for {self._target.time_limit:g} s (--time-limit)"
        except _EmulatorFault as fault:
            return End(Ending.EMULATOR_FAULT, str(fault))
        else:
            machine.check_emulator()
        return self._died(machine.console(), booted, overdue)

    def _finished(self, console: str) -> End:
        """How the kernel ended in which pytest came to its end."""
        if self._status < 0:
            return self._died(console, booted=True, overdue=None)  # by a signal: the kernel's, when it oopsed
        self.add_reports(console)
        if oops := next((one for one in self._report.kernel_reports if one.kind == "Oops"), None):
            return End(Ending.OOPS, oops.title, tuple(oops.lines))
        if self._status == pytest.ExitCode.TESTS_FAILED and not self._items:
            detail = "pytest ended in there before it had collected its tests"
            return End(Ending.NOT_TESTED, detail, tuple(self._output.splitlines()[-12:]))
        most = self._config.option.maxfail
        stopped_early = most and self._session.testsfailed >= most
        if self._status not in (*_DONE, *_STOPPED) or (self._status in _DONE and self._left and not stopped_early):
            detail = f"pytest ended with status {self._status}, with {counted(len(self._left), 'test')} left to run"
            return End(Ending.SUITE_DIED, detail, tuple(self._output.splitlines()[-12:]))
        return End(Ending.FINISHED, "")

    def _died(self, console: str, booted: bool, overdue: str | None) -> End:
        end = judge(console, booted, overdue, self._target.qemu.emulated)
        if end.ending is not Ending.EMULATOR_FAULT:
            self.add_reports(console)
        return end

    def add_reports(self, console: str) -> None:
        """Add what the kernel reported without a test having seen it: as KVM was loaded, at the end, or as it died."""
        known = {report.title for report in self._report.kernel_reports}
        tests = [] if self._running is None else [self._running]
        for splat in reports_since_start(console):
            if splat.title not in known:
                self._report.kernel_reports.append(
                    KernelReport(splat.kind.value, splat.title, splat.lines, None, tests)
                )
        for splat in reports_at_boot(console):
            self._report.remarks.append(f"the kernel reported while it booted, before KVM was loaded: {splat.title}")

    def _take(self, message: dict[str, Any]) -> None:
        """Take up one message of the session in the kernel."""
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
            self._take_report(message["report"])
        elif "kernel_log" in message:
            self._report.kernel_reports += [KernelReport(**report) for report in message["kernel_log"]]
        elif "step" in message and self._running is not None:
            self._progress.take(self._running, Step(*message["step"]))
        elif "failure" in message:
            write_failure(self._results, *message["failure"])
        elif "internal_error" in message:
            self._say(message["internal_error"])

    def _take_report(self, data: dict[str, Any]) -> None:
        report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
        if isinstance(report, pytest.CollectReport):
            self._config.hook.pytest_collectreport(report=report)
            return
        if isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)  # JSON has no tuples, and pytest recognises a skip by one
        for name, value in report.user_properties:
            if name == "kernel_log" and self._target.qemu.emulated and is_emulators_fault(str(value)):
                raise _EmulatorFault(str(value))
        self._config.hook.pytest_runtest_logreport(report=report)
        if report.when == "teardown":
            if report.nodeid in self._left:
                self._left.remove(report.nodeid)
            self._running = None
            self._config.hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)

    def _close(self, end: End) -> None:
        """Report how it ended, and what was not run for that."""
        report = self._report
        if end.ending is not Ending.FINISHED:
            if self._running is not None and end.ending not in _NOT_THE_TESTS:
                self._fail(
                    self._running, f"{end}, while this test ran (the last of the kernel's console is shown below)"
                )
            self._planned.why = end.ending.value
        elif self._status in _STOPPED:
            report.remarks += [
                "",
                f"pytest in the kernel ended with status {self._status}:",
                *self._output.splitlines(),
            ]
        report.end = {"ending": end.ending.name, "text": str(end), "console": list(end.console)}
        if end.ending is not Ending.FINISHED:
            report.remarks += ["", f"KERNEL {self._target.kernel.release}: {end}"]
            if end.console:
                report.remarks += ["the last of its console:", *(f"  {line}" for line in end.console)]

    def _fail(self, nodeid: str, text: str) -> None:
        """Report the failure of a test that cannot do so itself."""
        location, properties = self._items[nodeid]
        report = pytest.TestReport(
            nodeid, tuple(location), {}, "failed", text, "call", user_properties=[tuple(pair) for pair in properties]
        )
        self._config.hook.pytest_runtest_logreport(report=report)

    def _location(self, nodeid: str) -> Any:
        return tuple(self._items[nodeid][0])

    def _say(self, text: str) -> None:
        reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        reporter.ensure_newline()
        reporter.write_line(text)


class _EmulatorFault(Exception):
    """The kernel reported what only a fault of the emulator makes it report."""
