# SPDX-License-Identifier: GPL-2.0-only
"""Plugin: prepares a session before collection: settings, the plan of the matrix, and the plugins that observe the run."""

import os
import random
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dirty_tracking.cell import Cell
from harness import known_bugs
from harness.assigned_tests import AssignedTests
from harness.command_line import dimensions_of, settings_of, vcpus_of
from harness.elsewhere import prepare_remote
from harness.journal import Journal, read
from harness.journal_writer import TestJournal, begin
from harness.kernel_log_watch import KernelWatch, RunWatch, TestWatch
from harness.limited_errors import explain_error
from harness.planned_tests import PlannedTests
from harness.progress import Progress, WorkerProgress
from harness.report_stream import ReportStream
from harness.resume import Replay
from harness.run_report import Facts, RunReport
from harness.run_state import INTERRUPTION, JOURNAL, NO_LOCAL_KERNEL, PLAN, RESUMED, SETTINGS, TARGET, is_worker
from harness.selection import PlannedCell, check_settings, check_with_kvm, plan, workers_here
from harness.startup import make_results
from harness.static_keys import StaticKeys
from harness.worker_crashes import WorkerCrashes
from kvm_util import guest_program
from kvm_util.host import this_host
from kvm_util.host_limits import FILES, HostLimit, file_limits, tightest
from kvm_util.kvm import Kvm, KvmUnavailable
from runner.guest_session import guest_session
from runner.kernel_log import KernelLog, Kind, Splat
from runner.taint import WARN_TITLE, describe_set

_MAX_WORKERS = 8


def pytest_configure(config: pytest.Config) -> None:
    try:
        _prepare(config)
    except guest_program.GuestProgramError as error:
        raise pytest.UsageError(str(error)) from None
    except Exception as error:
        if limit := explain_error(error):
            raise pytest.UsageError(f"nothing can run here: {limit}") from None
        raise


def _prepare(config: pytest.Config) -> None:
    option = config.option
    if limit := tightest(file_limits(), FILES):
        raise HostLimit(f"a test opens up to {FILES} files, but {limit}")
    if is_worker(config):
        _prepare_worker(config)
        return
    if not option.collectonly and guest_session(config) is None:
        config.pluginmanager.register(Progress(config), "progress")
    if option.seed is None:
        option.seed = str(random.SystemRandom().randrange(1 << 32))
    config.stash[SETTINGS] = settings_of(option)
    guest_program.assemble_all()
    if TARGET in config.stash:
        config.stash[PLAN] = []
        prepare_remote(config)
    else:
        _prepare_here(config)


def _prepare_worker(config: pytest.Config) -> None:
    """A worker uses the controller's plan: free memory may have changed since, and all workers need the same plan."""
    option, controller = config.option, config.workerinput  # type: ignore[attr-defined]
    option.seed, option.results = controller["seed"], controller["results"]
    config.stash[SETTINGS] = settings_of(option)
    config.stash[PLAN] = _planned(controller["plan"])
    with suppress(FileNotFoundError):  # not where the controller is on another machine
        journal = Journal(Path(option.results))
        config.add_cleanup(journal.close)
        ended = read(Path(option.results)).ended if option.resumed else {}
        config.pluginmanager.register(Replay(ended), "replay")
        config.pluginmanager.register(TestJournal(config, journal, ended.__contains__), "test-journal")
    _watch_kernel(config, None)
    with suppress(KeyError, OSError):  # not where the controller is on another machine
        config.pluginmanager.register(WorkerProgress(*controller["progress"]), "progress")


def _planned(data: list[tuple[dict[str, Any], str]]) -> list[PlannedCell]:
    """The plan that a controller sent, or a journal has."""
    return [PlannedCell(Cell(**cell), missing) for cell, missing in data]


def _prepare_here(config: pytest.Config) -> None:
    option, settings = config.option, config.stash[SETTINGS]
    dimensions = dimensions_of(option)
    guest = guest_session(config)
    make_results(config, os.uname().release)
    if guest is not None and guest.emulated:
        keys = StaticKeys(settings.kvm_device)
        keys.hold()
        config.pluginmanager.register(keys, "static-keys")  # unflushed_kernel.py releases them for a while
    check_settings(settings, dimensions["vcpus"][-1], config.getoption("numprocesses", None) or 1)
    try:
        with Kvm(settings.kvm_device) as kvm:
            check_with_kvm(kvm, settings, dimensions)
            planned = plan(kvm, settings, dimensions, option.full)
    except KvmUnavailable:
        planned = plan(None, settings, dimensions, option.full)  # each test skips with the reason, by the fixture kvm
    if RESUMED in config.stash:  # the same cells, also if free memory has changed
        try:
            planned = _planned(config.stash[RESUMED].head["plan"])
        except (TypeError, ValueError):
            raise pytest.UsageError("--resume: the run's cells are of another version of the suite") from None
    config.stash[PLAN] = planned
    cells = {str(planned_cell.cell): asdict(planned_cell.cell) for planned_cell in planned}
    facts = Facts(asdict(this_host()), asdict(settings), [*cells.values()])
    report = RunReport(Path(option.results), facts)
    if NO_LOCAL_KERNEL in config.stash:
        report.notes.append(config.stash[NO_LOCAL_KERNEL])
    facts.taint = describe_set()
    facts.kernel_log = _watch_kernel(config, report)
    config.pluginmanager.register(report, "run-report")
    begin(config, report)
    if guest is None:
        planned_tests = PlannedTests(cells, config.stash[INTERRUPTION])
        config.pluginmanager.register(planned_tests, "planned-tests")
        config.pluginmanager.register(WorkerCrashes(planned_tests, option.require_kvm), "worker-crashes")
    else:  # the host knows which tests this kernel was not given
        config.pluginmanager.register(ReportStream(config, guest.report_path, report), "report-stream")
        config.pluginmanager.register(AssignedTests(guest.report_path), "assigned-tests")


def _watch_kernel(config: pytest.Config, report: RunReport | None) -> str | None:
    """Watch the kernel's log and taint flags: in each process for its tests, and in the controller for the whole run.

    :returns: why the log cannot be watched; None if it is
    """
    bugs = [] if config.option.no_known_bugs else known_bugs.on_host(this_host())
    unwatched: str | None = None

    def explain(splat: Splat) -> str | None:
        if splat.kind is Kind.TAINT:  # without the log, a known WARN shows as its flag only
            return next((bug.id for bug in bugs if unwatched and splat.title.startswith(WARN_TITLE) and bug.log), None)
        return next((bug.id for bug in bugs if bug.explains_log(splat.titles)), None)

    def watch() -> KernelWatch:
        if unwatched:
            return KernelWatch(None)
        log = KernelLog()
        config.add_cleanup(log.close)
        return KernelWatch(log)

    try:
        KernelLog().close()
    except OSError as error:
        unwatched = f"not watched: {error.filename}: {error.strerror} (sysctl kernel.dmesg_restrict=0, or run as root)"
    if report is not None:
        resumed = config.stash.get(RESUMED, None)
        earlier = resumed.reports if resumed is not None else []
        config.pluginmanager.register(RunWatch(watch(), explain, report, config.stash.get(JOURNAL, None), earlier))
    if is_worker(config) or not config.getoption("numprocesses", None):
        config.pluginmanager.register(TestWatch(watch(), explain))
    return unwatched


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Pass the controller's decisions to a new xdist worker."""
    config = node.config
    plan_data = [(asdict(planned.cell), planned.missing) for planned in config.stash[PLAN]]
    node.workerinput |= {"seed": config.option.seed, "results": config.option.results, "plan": plan_data}
    node.workerinput["args"] = config.args  # without the tests that run in another kernel


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """``-n auto``: a worker per CPU, limited by memory and threads; 0 for no workers, only this process."""
    try:
        most = workers_here(settings_of(config.option), max(vcpus_of(config.option)))
        return min(len(os.sched_getaffinity(0)), _MAX_WORKERS, most)
    except (pytest.UsageError, HostLimit, OSError):
        return 0  # pytest_configure reports what is wrong
