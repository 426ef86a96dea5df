# SPDX-License-Identifier: GPL-2.0-only
"""pytest's side of the suite: the command line, the matrix, what a test may need, and what a run leaves behind."""

import fcntl
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lib import guest_program, known_bugs
from lib.cell import Cell, Settings
from lib.dirty_log_run import DirtyTrackingError
from lib.host import Host, this_host
from lib.kvm import DEFAULT_DEVICE, Kvm, KvmUnavailable
from lib.log_modes import LOG_MODES
from lib.memory import BACKINGS, HugePagesMissing
from lib.report import context_lines, environment_lines, failure_data, failure_text
from lib.selection import (
    DEFAULT_VCPUS,
    DIMENSIONS,
    PlannedCell,
    SelectionError,
    check_settings,
    check_with_kvm,
    parse_milliseconds,
    parse_names,
    parse_number,
    parse_size,
    plan,
    workers_in_memory,
)
from runner import table

ROOT = Path(__file__).resolve().parent
_MAX_WORKERS = 8

_plan_key = pytest.StashKey[list[PlannedCell]]()
_settings_key = pytest.StashKey[Settings]()


# --- the command line -------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup(
        "dirty", "KVM dirty-page tracking (letters in brackets: the option of the C dirty_log_test)"
    )
    for name, values in DIMENSIONS.items():
        letter = {"log_mode": " [-M]", "guest_mode": " [-m]"}.get(name, "")
        group.addoption(
            option_name(name), metavar="NAME,...", help=f"which of {', '.join(values)}; default all{letter}"
        )
    group.addoption("--vcpus", metavar="N", help="vCPUs of each VM; default both 1 and 2")
    group.addoption("--full", action="store_true", help="every combination of these; default: every pair of values")
    default = Settings()
    group.addoption("--iterations", metavar="N", help=f"how often to verify; default {default.iterations} [-i]")
    group.addoption(
        "--interval", metavar="MS", help=f"how long the guest writes in each; default {default.interval:g} ms [-I]"
    )
    group.addoption("--ring-count", metavar="N", help=f"entries of a dirty ring; default {default.ring_count} [-c]")
    group.addoption("--phys-offset", metavar="GPA", help="where the test memory begins; default: at the top [-p]")
    group.addoption("--test-mem", metavar="SIZE", help="test memory, with K, M or G; 3 pages are added; default 1G")
    group.addoption("--seed", metavar="N", help="decides what is written and when it is collected; default: a new one")
    group.addoption("--kvm-device", metavar="PATH", default=DEFAULT_DEVICE, help=f"default {DEFAULT_DEVICE}")
    group.addoption("--require-kvm", action="store_true", help="fail where a missing capability would skip")
    group.addoption(
        "--no-known-bugs", action="store_true", help="known kernel bugs (known_bugs.toml) are plain failures"
    )
    group.addoption("--results", metavar="DIR", help="where to put result files; default results/<kernel>-<time>")


def option_name(field: str) -> str:
    """The command line's name of a dimension or a setting."""
    return f"--{field.replace('_', '-')}"


def pytest_configure(config: pytest.Config) -> None:
    try:
        _prepare(config)
    except (SelectionError, guest_program.GuestProgramError, known_bugs.KnownBugsError) as error:
        raise pytest.UsageError(str(error)) from None


def _prepare(config: pytest.Config) -> None:
    if _is_worker(config):
        # A worker runs the controller's plan: what is free on the host may have changed since, and all must agree.
        controller = config.workerinput  # type: ignore[attr-defined]
        config.option.seed, config.option.results = controller["seed"], controller["results"]
        config.stash[_settings_key] = _settings(config.option)
        config.stash[_plan_key] = [PlannedCell(Cell(**cell), missing) for cell, missing in controller["plan"]]
        return
    if config.option.seed is None:
        config.option.seed = str(random.SystemRandom().randrange(1 << 32))
    if config.option.results is None:
        config.option.results = f"results/{os.uname().release}-{time.strftime('%Y%m%d-%H%M%S')}"
    else:
        config.option.results = str(config.invocation_params.dir / config.option.results)
    settings = _settings(config.option)
    dimensions: dict[str, tuple[Any, ...]] = {
        name: values if (text := config.getoption(name)) is None else parse_names(option_name(name), text, values)
        for name, values in DIMENSIONS.items()
    }
    dimensions["vcpus"] = _vcpus(config.option)
    check_settings(settings, dimensions["vcpus"], config.getoption("numprocesses", None) or 1)
    try:
        with Kvm(settings.kvm_device) as kvm:
            check_with_kvm(kvm, settings, dimensions)
            planned = plan(kvm, settings, dimensions, config.option.full)
    except KvmUnavailable:
        planned = plan(None, settings, dimensions, config.option.full)  # the kvm fixture will say why, test by test
    guest_program.assemble_all()
    config.stash[_settings_key] = settings
    config.stash[_plan_key] = planned
    config.pluginmanager.register(RunReport(config), "run-report")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a new xdist worker what the controller decided."""
    config = node.config
    plan_data = [(asdict(planned.cell), planned.missing) for planned in config.stash[_plan_key]]
    node.workerinput |= {"seed": config.option.seed, "results": config.option.results, "plan": plan_data}


def _vcpus(option: Any) -> tuple[int, ...]:
    return DEFAULT_VCPUS if option.vcpus is None else (parse_number("--vcpus", option.vcpus, 1),)


_SETTING_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "seed": lambda option, text: parse_number(option, text, 0),
    "iterations": lambda option, text: parse_number(option, text, 1),
    "interval": parse_milliseconds,
    "ring_count": lambda option, text: parse_number(option, text, 1),
    "phys_offset": lambda option, text: parse_number(option, text, 0),
    "test_mem": parse_size,
}


def _settings(option: Any) -> Settings:
    given = {
        name: parse(option_name(name), text)
        for name, parse in _SETTING_PARSERS.items()
        if (text := getattr(option, name)) is not None
    }
    return Settings(kvm_device=option.kvm_device, **given)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """``-n auto``: a worker per CPU, but no more than there is memory for."""
    try:
        settings, vcpus = _settings(config.option), max(_vcpus(config.option))
    except SelectionError:
        return 1  # pytest_configure will say what is wrong
    return max(1, min(os.cpu_count() or 1, _MAX_WORKERS, workers_in_memory(settings, vcpus)))


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [*environment_lines(this_host()), f"seed     {config.option.seed}"]


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


# --- the matrix -------------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "planned_cell" in metafunc.fixturenames:
        planned = metafunc.config.stash[_plan_key]
        metafunc.parametrize("planned_cell", planned, ids=[str(one.cell) for one in planned])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            item.user_properties.append(("kvm", "kvm" in item.fixturenames))
            if hasattr(item, "callspec") and "planned_cell" in item.callspec.params:
                planned: Any = item.callspec.params["planned_cell"]
                item.user_properties += asdict(planned.cell).items()


# --- what a test may need ---------------------------------------------------------------------------------------------


Lacks = Callable[[str], NoReturn]


@pytest.fixture(scope="session")
def lacks(pytestconfig: pytest.Config) -> Lacks:
    """Call it with what the host lacks to end the test: with a skip, or a failure with --require-kvm."""

    def lacks(reason: str) -> NoReturn:
        if pytestconfig.option.require_kvm:
            pytest.fail(f"required by --require-kvm: {reason}", pytrace=False)
        pytest.skip(reason)

    return lacks


@pytest.fixture
def needs_log_mode(kvm: Kvm, lacks: Lacks) -> Callable[[str], None]:
    """Call it with a log mode's name to end the test when KVM does not have the mode."""

    def needs(name: str) -> None:
        if reason := LOG_MODES[name].supported(kvm):
            lacks(reason)

    return needs


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    """The run's settings, from the command line."""
    return pytestconfig.stash[_settings_key]


@pytest.fixture(scope="session")
def host() -> Host:
    """The facts of this host."""
    return this_host()


@pytest.fixture(scope="session")
def kvm(lacks: Lacks, settings: Settings) -> Iterator[Kvm]:
    """The open KVM device; a test that uses it counts as one that ran on KVM."""
    try:
        device = Kvm(settings.kvm_device)
    except KvmUnavailable as error:
        lacks(str(error))
    with device:
        yield device


@pytest.fixture
def cell(lacks: Lacks, kvm: Kvm, planned_cell: PlannedCell) -> Iterator[Cell]:
    """The cell to test; skips when the host lacks something for it."""
    if planned_cell.missing:
        lacks(planned_cell.missing)
    backing = BACKINGS[planned_cell.cell.backing]
    with _huge_page_pool() if backing.hugetlb else nullcontext():
        yield planned_cell.cell


@contextmanager
def _huge_page_pool() -> Iterator[None]:
    """One test at a time: the pool holds enough for one, and xdist's workers share it."""
    lock = os.open("/sys/kernel/mm/hugepages", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


# --- what a run leaves behind -----------------------------------------------------------------------------------------


class Outcome:
    """Runs the body of a KVM test, and turns what came of it into pytest's terms.

    A broken contract is a failure with the whole report, unless a known bug explains all of it; other errors get the
    context and the command that repeats them.
    """

    def __init__(self, request: pytest.FixtureRequest, host: Host, settings: Settings, lacks: Lacks) -> None:
        self._lacks = lacks
        self._node = request.node
        self._config = request.config
        self._host = host
        self._settings = settings

    @contextmanager
    def expected(self, cell: Cell, settings: Settings | None = None) -> Iterator[None]:
        """Run the body; *settings* are those of the run, when they are not the command line's."""
        used = settings or self._settings
        bug = self._known_bug(cell)
        try:
            yield
        except DirtyTrackingError as error:
            self._keep(failure_data(error, self._host, used))
            self.record(error.run.figures)
            text = failure_text(error, self._host, used)
            if bug is not None and bug.explains(error.findings):
                self._node.user_properties.append(("findings", "\n".join(map(str, error.findings[:4]))))
                pytest.xfail(bug.id)
            pytest.fail(text, pytrace=False)
        except HugePagesMissing as error:
            self._lacks(str(error))
        except Exception as error:
            error.add_note("\n".join(context_lines(self._host, cell, used)))
            raise
        if bug is not None and bug.always:
            pytest.fail(
                f"known bug {bug.id} did not show: is it fixed? Then its entry in known_bugs.toml has to go",
                pytrace=False,
            )
        if bug is not None:
            self._node.user_properties.append(("verdict", "known bug, not seen"))

    def record(self, figures: Any) -> None:
        """Put a run's figures into the results: the table, and JUnit's properties."""
        self._node.user_properties += asdict(figures).items()

    def _known_bug(self, cell: Cell) -> known_bugs.KnownBug | None:
        if self._config.option.no_known_bugs:
            return None
        matrix = "planned_cell" in self._node.fixturenames
        for bug in known_bugs.load():
            if bug.on(self._host) and (bug.concerns_cell(cell) if matrix else self._node.originalname in bug.tests):
                return bug
        return None

    def _keep(self, data: dict[str, Any]) -> None:
        folder = ROOT / self._config.option.results
        folder.mkdir(parents=True, exist_ok=True)
        name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in self._node.name)
        (folder / f"{name}.json").write_text(json.dumps(data, indent=1))


@pytest.fixture
def outcome(request: pytest.FixtureRequest, host: Host, settings: Settings, lacks: Lacks) -> Outcome:
    """How a KVM test ends; see :class:`Outcome`."""
    return Outcome(request, host, settings, lacks)


class RunReport:
    """Follows a run on the controller: the table, the results file, and a verdict on runs that tested nothing."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._rows: dict[str, dict[str, Any]] = {}
        self._on_kvm = 0
        self._not_on_kvm: list[str] = []
        self._caught: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        properties: dict[str, Any] = dict(report.user_properties)
        verdict, reason = _verdict(report, properties)
        if properties.get("kvm"):
            if verdict == "skipped":
                self._not_on_kvm.append(reason)
            else:
                self._on_kvm += 1
        if "fault" in properties:
            within = f"{properties['fault_in']} {properties['caught_within']}"
            self._caught.setdefault(properties["fault"], []).append(within)
        if "log_mode" in properties:
            row = properties | {"verdict": verdict, "reason": reason}
            if report.when == "call" or report.nodeid not in self._rows or verdict == "FAIL":
                self._rows[report.nodeid] = row

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._rows:
            folder = ROOT / self._config.option.results
            folder.mkdir(parents=True, exist_ok=True)
            data = {
                "host": asdict(this_host()),
                "settings": asdict(self._config.stash[_settings_key]),
                "cells": self._ordered_rows(),
            }
            (folder / "results.json").write_text(json.dumps(data, indent=1))
        if self._nothing_ran and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        rows = self._ordered_rows()
        if rows:
            where = this_host()
            terminalreporter.section(f"dirty tracking on host kernel {where.kernel}, {where.backend}")
            for line in table.format_table(rows):
                terminalreporter.line(line)
            terminalreporter.line("")
            for row in rows:
                if row["verdict"] == "known bug":
                    cell = " ".join(str(row[name]) for name in table.DIMENSIONS)
                    terminalreporter.line(f"{row['reason']} in {cell}:")
                    for finding in row["findings"].splitlines():
                        terminalreporter.line(f"  {finding}")
            terminalreporter.line(table.summary(rows))
            terminalreporter.line(f"files: {self._config.option.results}")
        if self._caught:
            terminalreporter.section("planted faults: within how many iterations each was caught")
            for fault, within in sorted(self._caught.items()):
                terminalreporter.line(f"{fault}: {', '.join(sorted(within))}")
        if self._nothing_ran:
            reasons = "; ".join(dict.fromkeys(self._not_on_kvm))
            terminalreporter.line(f"NOTHING WAS TESTED: no test ran on KVM: {reasons}", red=True)

    @property
    def _nothing_ran(self) -> bool:
        return bool(self._not_on_kvm) and not self._on_kvm

    def _ordered_rows(self) -> list[dict[str, Any]]:
        """The rows in the order of the plan: workers finish in any."""
        planned_cells: list[PlannedCell] = self._config.stash[_plan_key]
        order = {str(planned.cell): index for index, planned in enumerate(planned_cells)}
        names = [field.name for field in fields(Cell)]
        return sorted(
            self._rows.values(), key=lambda row: order.get(str(Cell(*(row[name] for name in names))), len(order))
        )


def pytest_report_teststatus(report: pytest.CollectReport | pytest.TestReport) -> tuple[str, str, str] | None:
    """Known bugs by their name, in the progress lines and the count at the end."""
    if isinstance(report, pytest.TestReport) and report.when == "call":
        verdict, _ = _verdict(report, dict(report.user_properties))
        if verdict.startswith("known bug"):
            return verdict.replace(",", ""), "k", verdict.upper()  # pytest's count at the end has commas of its own
    return None


def _verdict(report: pytest.TestReport, properties: dict[str, Any]) -> tuple[str, str]:
    """A test's verdict as the table shows it, and the reason where there is one."""
    if hasattr(report, "wasxfail"):
        return "known bug", report.wasxfail.removeprefix("reason: ")
    if report.outcome == "skipped":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return "skipped", reason.removeprefix("Skipped: ")
    if report.outcome == "failed":
        return "FAIL", ""
    return properties.get("verdict", "pass"), ""
