# SPDX-License-Identifier: GPL-2.0-only
"""Plugins that write the journal: each test's start and end where it runs, and the end of the run in its controller."""

import hashlib
import os
from collections.abc import Callable, Generator
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from harness.journal import Journal, boot_id
from harness.kernel_options import OWN_TESTS
from harness.known_bugs import on_host
from harness.planned_tests import NOT_RUN
from harness.resume import Replay, check_same, settle
from harness.run_report import RunReport
from harness.run_state import JOURNAL, PLAN, RESUMED, TARGET
from harness.stored_reports import to_data
from harness.version import suite_version
from kvm_util.host import this_host
from runner.store import say, shown
from runner.taint import taint_flags

if TYPE_CHECKING:
    from runner.target import Target

_CRASH = "???"  # the phase in the report of a test with which its xdist worker died


def begin(config: pytest.Config, report: RunReport) -> None:
    """Write the first line of a run's journal, or go on with that of the run that is resumed; register the plugins.

    :raises pytest.UsageError: the kernel is not that of the run to resume
    """
    if JOURNAL not in config.stash:
        return
    journal, run = config.stash[JOURNAL], config.stash.get(RESUMED, None)
    local, workers = TARGET not in config.stash, bool(config.getoption("numprocesses", None))
    uname = os.uname()
    host = {name: report.facts.host[name] for name in ("kernel", "backend", "parameters")}
    # Kernels that were built anew have the same release.
    host["build"] = uname.version if local else kernel_digest(config.stash[TARGET])
    if run is None:
        head = {
            "label": uname.release if local else config.stash[TARGET].label,
            "suite": suite_version(),
            "host": host,
            "folder": str(shown(config.invocation_params.dir)),
            "arguments": [str(word) for word in config.invocation_params.args],
            "addopts": os.environ.get("PYTEST_ADDOPTS", ""),
            "seed": config.option.seed,
            "plan": [(asdict(planned.cell), planned.missing) for planned in config.stash[PLAN]],
        }
        journal.write(run=head)
        journal.write(boot=boot_id(), taint=taint_flags())
    else:
        check_same(run, host)
        bugs = on_host(this_host()) if local and not config.option.no_known_bugs else []
        say(settle(journal, run, on_this_kernel=local, known_warn=any(bug.log for bug in bugs)))
    # A booted kernel does not take this host down; what is lost with the host runs again, and each fsync would delay tests.
    journal.synced = local
    ended = run.ended if run is not None else {}
    plugins = config.pluginmanager
    plugins.register(RunJournal(config, journal, report, {*ended}), "run-journal")
    if not workers:
        plugins.register(Replay(ended), "replay")
    if not (workers and local):  # workers write about the tests of this host
        plugins.register(TestJournal(config, journal, lambda test: test in ended or (workers and _is_own(test))))


def kernel_digest(target: "Target") -> str:
    """A digest of a kernel's image and of the modules that are loaded."""
    digest = hashlib.sha256(target.kernel.image.read_bytes())
    for module in target.modules:
        digest.update(module.data)
    return digest.hexdigest()[:16]


def _is_own(test: str) -> bool:
    return test.startswith(OWN_TESTS)


class TestJournal:
    """A pytest plugin that writes a test's start before it touches KVM, and its end before the next one begins.

    :param skips: whether not to write about the test with this id
    """

    def __init__(self, config: pytest.Config, journal: Journal, skips: Callable[[str], bool]) -> None:
        self._config = config
        self._journal = journal
        self._skips = skips
        self._reports: dict[str, list[dict[str, object]]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if not self._skips(nodeid):
            self._reports[nodeid] = []
            self._journal.write(start=nodeid, taint=taint_flags())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self._reports:
            self._reports[report.nodeid].append(to_data(self._config, report))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if nodeid in self._reports:
            self._journal.write(end=nodeid, reports=self._reports.pop(nodeid))


class RunJournal:
    """A pytest plugin for the controller that writes what no test's process can: crashes of workers, and the run's end.

    :param before: ids of the tests that ended in the run that is resumed
    """

    def __init__(self, config: pytest.Config, journal: Journal, report: RunReport, before: set[str]) -> None:
        self._config = config
        self._journal = journal
        self._report = report
        self._unseen = before

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._unseen.discard(report.nodeid)
        if report.when == _CRASH:
            # One that was ended from outside has to run again.
            ended = NOT_RUN not in report.user_properties
            self._journal.write(end=report.nodeid, reports=[to_data(self._config, report)] if ended else [])

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        if self._unseen and not session.shouldstop and not session.shouldfail:
            self._report.notes.append(
                f"not selected any more, though they had ended: {', '.join(sorted(self._unseen))}"
            )
        yield
        self._journal.kept |= self._report.kept
        self._journal.write(finished=int(session.exitstatus))
        if not self._journal.path.exists():
            self._report.notes.append(f"THE JOURNAL IS NOT KEPT: {self._journal.path} could not be written")
