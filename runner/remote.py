# SPDX-License-Identifier: GPL-2.0-only
"""A pytest session whose tests run in another kernel: it boots the kernel, and takes up the reports of the pytest in there."""

import sys
from pathlib import Path
from typing import Any

import pytest

from runner import initramfs
from runner.ending import End, Ending, judge, kernel_log
from runner.errors import CannotTest
from runner.guest_init import REPORTS
from runner.qemu import Deadline, RunningMachine
from runner.run_report import Facts, KernelReport, RunReport, write_failure
from runner.target import Target

CANNOT_TEST = 125
# Time for a kernel to come up and start its first program
_BOOT_LIMIT = 120.0
# A fault of the emulator strikes at random, one of the kernel again and again: what fails so often in a row is the kernel's.
_MOST_TRIES = 3
SUSPECT = "emulator_suspect"


class RemoteSession:
    """A plugin that runs pytest with *options* and *tests* as its arguments in the kernel of *target*.

    :param results: where the files go
    :param report: takes the facts of the run from here
    """

    def __init__(self, target: Target, options: list[str], tests: list[str], results: Path, report: RunReport) -> None:
        self._target = target
        self._options = options
        self._tests = tests
        self._results = results
        self._report = report
        self._items: dict[str, tuple[Any, Any]] = {}
        self._left: list[str] = []
        self._tries: dict[str, int] = {}
        self._running: str | None = None
        self._again: list[str] = []
        self._status: int | None = None
        self._output = ""
        self.end = End(Ending.NO_BOOT, "it was not tried")

    def pytest_collection(self) -> bool:
        """Nothing is collected here."""
        return True

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Boot the kernel, as often as the emulator's faults make it necessary."""
        self._session = session
        self._config = session.config
        try:
            self._results.mkdir(parents=True, exist_ok=True)
            self._boot_until_done()
        except (CannotTest, OSError) as error:
            raise pytest.exit.Exception(f"cannot test: {error}", CANNOT_TEST) from None
        self._close()
        return True

    def _boot_until_done(self) -> None:
        for boot in range(1, _MOST_TRIES + 1):
            self._again = []
            self.end = self._boot(boot)
            if self.end.ending is Ending.EMULATOR_FAULT:
                self._say(
                    f"EMULATOR FAULT: {self.end.detail}" + ("; what is left runs again" if boot < _MOST_TRIES else "")
                )
            elif self._again:
                self._left = self._again
            else:
                break

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.end.ending is not Ending.FINISHED and session.exitstatus != pytest.ExitCode.INTERRUPTED:
            session.exitstatus = self.end.ending.exit_status
        elif self._status in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.INTERRUPTED):
            session.exitstatus = self._status

    def _boot(self, boot: int) -> End:
        """Boot once, and run what is left to run."""
        suffix = "" if boot == 1 else f"-{boot}"
        console = self._results / f"console{suffix}.log"
        archive = self._results / "initramfs.cpio"
        self._running = None
        try:
            initramfs.build(archive, self._target.modules, self._orders())
            machine = RunningMachine(
                self._target.qemu, self._target.machine, self._target.kernel.image, archive, console
            )
        except BaseException:
            archive.unlink(missing_ok=True)
            raise
        try:
            return self._follow(machine)
        finally:
            machine.stop()
            archive.unlink(missing_ok=True)
            (self._results / f"kernel{suffix}.log").write_text(kernel_log(machine.console()))

    def _orders(self) -> dict[str, Any]:
        tests = self._left or self._tests
        return {
            "parameters": self._target.parameters,
            "keep_off_cpu_0": self._target.qemu.emulated,
            "command": [initramfs.PYTHON, "-m", "pytest", f"--report-to={REPORTS}", *self._options, *tests],
            "environment": {"PYTHONPATH": initramfs.SITE, "PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"},
        }

    def _follow(self, machine: RunningMachine) -> End:
        """Take up what the machine tells, to its end."""
        booted, ended, overdue = False, False, None
        boot_limit = min(_BOOT_LIMIT, self._target.time_limit)
        machine.deadline = boot_limit
        try:
            for message in machine.messages():
                if "cannot" in message:
                    return End(Ending.NO_KVM, message["cannot"], tuple(machine.console().splitlines()[-12:]))
                booted, machine.deadline = True, self._target.time_limit
                if "ended" in message:
                    self._status, self._output = message["ended"], message["output"]
                    ended = message["ended"] >= 0  # else a signal ended it: the kernel's, when it oopsed
                    break
                self._take(message)
        except Deadline:
            overdue = (
                f"no end after {self._target.time_limit:g} s (--time-limit)"
                if booted
                else f"nothing after {boot_limit:g} s"
            )
        end = judge(machine.console(), booted, ended, overdue, self._target.qemu.emulated)
        if not booted and (errors := machine.errors()):
            raise CannotTest(f"QEMU: {errors.splitlines()[-1]}")
        return end

    def _take(self, message: dict[str, Any]) -> None:
        """Take up one message of the session in the kernel."""
        if "environment" in message:
            facts = Facts(**message["environment"])
            facts.place = str(self._target.qemu)
            facts.machine = self._target.data
            self._report.facts = facts
        elif "items" in message and not self._items:
            self._items = message["items"]
            self._left = list(self._items)
            self._session.testscollected = len(self._items)
        elif "start" in message:
            self._running = message["start"]
            self._config.hook.pytest_runtest_logstart(nodeid=self._running, location=self._location(self._running))
        elif "report" in message:
            self._take_report(message["report"])
        elif "kernel_log" in message:
            self._report.kernel_reports += [KernelReport(**report) for report in message["kernel_log"]]
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
            report.longrepr = tuple(report.longrepr)  # JSON has no tuples, and pytest's skips are told by one
        if self._is_emulators(report):
            return
        self._config.hook.pytest_runtest_logreport(report=report)
        if report.when == "teardown":
            if report.nodeid not in self._again and report.nodeid in self._left:
                self._left.remove(report.nodeid)
            self._running = None
            self._config.hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)

    def _is_emulators(self, report: pytest.TestReport) -> bool:
        """Whether a failure looks like the emulator's, and its test is run again for that."""
        suspicion = dict(report.user_properties).get(SUSPECT)
        if not report.failed or suspicion is None or not self._target.qemu.emulated:
            return False
        tries = self._tries[report.nodeid] = self._tries.get(report.nodeid, 0) + 1
        if tries >= _MOST_TRIES:
            return False
        self._again.append(report.nodeid)
        self._report.remarks.append(f"emulator fault in {report.nodeid}: {suspicion}; it ran again")
        self._say(f"EMULATOR FAULT: {suspicion}; the test runs again")
        return True

    def _close(self) -> None:
        """Tell how it ended, and what was not run for that."""
        report = self._report
        if self.end.ending is Ending.FINISHED and (oops := self._oops()):
            self.end = End(Ending.OOPS, oops.title, tuple(oops.lines))
        if self.end.ending is not Ending.FINISHED:
            if self._running is not None:
                self._fail_running()
            for nodeid in self._left:
                self._forward(nodeid, "setup", "skipped", (nodeid, 0, f"Skipped: not run: {self.end.ending.value}"))
        elif self._status not in (0, 1, pytest.ExitCode.NO_TESTS_COLLECTED):
            report.remarks += [
                "",
                f"pytest in the kernel ended with status {self._status}:",
                *self._output.splitlines(),
            ]
        report.end = {"ending": self.end.ending.name, "text": str(self.end), "console": list(self.end.console)}
        report.remarks += self._closing_lines()

    def _oops(self) -> KernelReport | None:
        return next((one for one in self._report.kernel_reports if one.kind == "Oops"), None)

    def _closing_lines(self) -> list[str]:
        lines = [f"console and kernel log: {self._report.shown_results}"]
        if self.end.ending is not Ending.FINISHED:
            lines += ["", f"KERNEL {self._target.kernel.release}: {self.end}"]
            if self.end.console:
                lines += ["the last of its console:", *(f"  {line}" for line in self.end.console)]
        return lines

    def _fail_running(self) -> None:
        assert self._running is not None
        nodeid = self._running
        if nodeid in self._left:
            self._left.remove(nodeid)
        self._forward(nodeid, "call", "failed", f"{self.end}, while this test ran (its console is shown below)")

    def _forward(self, nodeid: str, when: Any, outcome: Any, longrepr: Any) -> None:
        """Report a test that cannot do so itself."""
        location, properties = self._items[nodeid]
        report = pytest.TestReport(
            nodeid, tuple(location), {}, outcome, longrepr, when, user_properties=[tuple(pair) for pair in properties]
        )
        self._config.hook.pytest_runtest_logreport(report=report)

    def _location(self, nodeid: str) -> Any:
        return tuple(self._items[nodeid][0])

    def _say(self, text: str) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(text)
        else:
            print(text, file=sys.stderr)
