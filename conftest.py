# SPDX-License-Identifier: GPL-2.0-only
"""pytest's side of the suite: the command line, the matrix, what a test may need, and what a run leaves behind."""

import fcntl
import os
import random
import shlex
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from runner.unmet import leave, unmet

if reason := unmet():  # before it shows as an import that fails
    leave(reason, pytest.ExitCode.USAGE_ERROR)

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.modes import LOG_MODES
from dirty_tracking.violations import ContractViolation
from harness import known_bugs
from harness.command_line import (
    SETTING_PARSERS,
    add_options,
    check_options,
    dimensions_of,
    only_shows,
    seen_from,
    settings_of,
    soak_of,
    vcpus_of,
)
from harness.early_collection import any_test_matches, no_test_matches
from harness.failure_report import (
    column,
    environment_lines,
    reproduce_line,
    suite_line,
    this_pytest,
)
from harness.interruption import Interruption, heed_once_in_worker
from harness.kernel_log_watch import RunWatch, TestWatch
from harness.kernel_options import (
    AUTO,
    LONGEST,
    for_another_kernel,
    kernel_options,
    machine_numbers,
    options_given,
    options_in_kernel,
    split_tests,
)
from harness.limited_errors import explain_error, was_interrupted
from harness.outcome import Outcome, command_of, in_short
from harness.output_paths import OutputError, make_folder, remove_if_empty
from harness.planned_tests import PlannedTests
from harness.progress import Progress, WorkerProgress
from harness.report_stream import ReportStream
from harness.results import new_folder
from harness.run_report import Facts, RunReport, verdict
from harness.selection import (
    DIMENSIONS,
    PlannedCell,
    SelectionError,
    check_settings,
    check_with_kvm,
    plan,
    workers_here,
)
from harness.static_keys import StaticKeys
from harness.toml_file import TomlError
from harness.worker_crashes import WorkerCrashes
from kvm_util import guest_program
from kvm_util.host import EMULATING_BACKENDS, Host, keep_memory_in_place, let_signals_in, missing_facts, this_host
from kvm_util.host_limits import FILES, HostLimit, file_limits, tightest
from kvm_util.ioctl import KvmError
from kvm_util.kvm import DEFAULT_DEVICE, Kvm, KvmUnavailable
from kvm_util.memory import BACKINGS, size_text
from runner.errors import CANNOT_TEST, CannotTest
from runner.guest_session import guest_session
from runner.kernel_log import KernelLog, Splat
from runner.store import say

if TYPE_CHECKING:
    from runner.target import Target

_MAX_WORKERS = 8

_plan_key = pytest.StashKey[list[PlannedCell]]()
_settings_key = pytest.StashKey[Settings]()
_target_key: "pytest.StashKey[Target]" = pytest.StashKey()
_remote_tests_key = pytest.StashKey[list[str]]()
_made_key = pytest.StashKey[list[Path]]()
_hint_key = pytest.StashKey[str]()
_interruption_key = pytest.StashKey[Interruption]()


# --- the command line -------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    add_options(parser, pluginmanager)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Find the kernel to run the tests in, if it is another one: before xdist and junitxml look at the options."""
    option = config.option
    _read_known_bugs(option)
    if _is_worker(config):
        heed_once_in_worker()
        config.args = config.workerinput["args"]  # type: ignore[attr-defined]
        return None
    interruption = config.stash[_interruption_key] = Interruption()
    if only_shows(option) and not option.collectonly:
        if option.kernel not in (None, AUTO):
            raise pytest.UsageError("an option that only shows something tests no kernel: leave out --kernel")
        return None
    interruption.heed()
    config.pluginmanager.register(interruption, "interruption")
    try:
        check_options(config)
        elsewhere = option.kernel is not None and _needs_kernel(config)
    except KeyboardInterrupt:
        return _nothing_tested()
    except (SelectionError, OutputError) as error:
        raise pytest.UsageError(str(error)) from None
    except HostLimit as limit:
        raise pytest.UsageError(f"nothing can run here: {limit}") from None
    if not elsewhere:
        if option.kvm_params:
            raise pytest.UsageError(
                "--kvm-params is for another kernel (--kernel); here, load KVM with these parameters"
            )
        return None
    tests, here = split_tests(config)
    try:
        if tests and not any_test_matches(option, [*DIMENSIONS, "vcpus"], tests):
            if not here:
                raise pytest.UsageError(no_test_matches(option, tests))
            tests = []
        if not tests:
            config.args = here
            return None
        target = _find_target(config)
    except (CannotTest, HostLimit, OSError, RuntimeError) as error:
        if option.kernel == AUTO:
            config.stash[_hint_key] = f"to run under emulation instead: {error}"
            return None
        print(f"cannot be tested: {error}", file=sys.stderr)
        return CANNOT_TEST
    except KeyboardInterrupt:
        return _nothing_tested()
    config.args = here
    if not here:
        # One process in the kernel: emulated, two only get in each other's way.
        if getattr(option, "numprocesses", None) and option.kernel != AUTO:
            say("-n is not used: one process runs the tests in the kernel")
        option.numprocesses, option.dist, option.tx = 0, "no", []
    _make_results(config, target.label)
    if option.xmlpath is None:
        option.xmlpath = f"{option.results}/junit.xml"
    config.stash[_target_key] = target
    config.stash[_remote_tests_key] = tests
    return None


def _nothing_tested() -> int:
    print("interrupted: nothing was tested", file=sys.stderr)
    return pytest.ExitCode.INTERRUPTED


def _read_known_bugs(option: Any) -> None:
    """Read the list of known bugs while a mistake in it costs nothing yet; it stays in memory."""
    if not option.no_known_bugs:
        try:
            known_bugs.load()
        except TomlError as error:
            raise pytest.UsageError(str(error)) from None


def _needs_kernel(config: pytest.Config) -> bool:
    """Whether the tests on KVM run in another kernel: one that is named, or a local one if this host has no usable KVM."""
    if config.option.kernel != AUTO:
        return True
    why = _why_not_here(config.option)
    if why is not None:
        say(f"KVM cannot be used on this host ({why}): the tests that need it run in a kernel of their own, in QEMU")
    return why is not None


def _find_target(config: pytest.Config) -> "Target":
    """Find the kernel and the machine to run in, and take the sizes of emulation where none are given.

    :raises CannotTest: something is missing or does not fit
    """
    # Imported here: in the other kernel, where this file is loaded too, it would cost a second or two of emulated time.
    from runner.qemu import Machine
    from runner.target import EMULATION_SIZES, find_target

    option = config.option
    numbers = machine_numbers(option)
    machine = Machine(numbers["vm_memory"], numbers["vm_cpus"], option.append or "")
    limit = min(numbers["time_limit"] + (soak_of(option) or 0), LONGEST)
    parameters = option.kvm_params or ""
    kernel = None if option.kernel == AUTO else option.kernel
    target = find_target(kernel, parameters, option.accel, option.cpu_model, option.qemu, machine, limit)
    if target.qemu.emulated:
        for name, size in EMULATION_SIZES.items():
            if getattr(option, name) is None:
                setattr(option, name, size)
    return target


def _why_not_here(option: Any) -> str | None:
    """Why this host's own KVM cannot be used."""
    try:
        with Kvm(option.kvm_device or DEFAULT_DEVICE) as kvm:
            kvm.create_vm().close()
    except (KvmUnavailable, KvmError) as error:
        return str(error)
    return None


def _make_results(config: pytest.Config, label: str) -> None:
    """Settle where the result files go, and make the folder."""
    given = config.option.results
    folder = new_folder(label) if given is None else seen_from(config, given)
    config.option.results = str(folder)
    if not only_shows(config.option):
        config.stash[_made_key] = make_folder("--results", folder)


def pytest_unconfigure(config: pytest.Config) -> None:
    remove_if_empty(config.stash.get(_made_key, []))


def pytest_configure(config: pytest.Config) -> None:
    try:
        _prepare(config)
    except (SelectionError, OutputError, guest_program.GuestProgramError) as error:
        raise pytest.UsageError(str(error)) from None
    except Exception as error:
        if limit := explain_error(error):
            raise pytest.UsageError(f"nothing can run here: {limit}") from None
        raise


def _prepare(config: pytest.Config) -> None:
    option = config.option
    if limit := tightest(file_limits(), FILES):
        raise HostLimit(f"a test opens up to {FILES} files, but {limit}")
    if _is_worker(config):
        # A worker runs the controller's plan: what is free on the host may have changed since, and all must agree.
        controller = config.workerinput  # type: ignore[attr-defined]
        option.seed, option.results = controller["seed"], controller["results"]
        config.stash[_settings_key] = settings_of(option)
        config.stash[_plan_key] = [PlannedCell(Cell(**cell), missing) for cell, missing in controller["plan"]]
        _watch_kernel_log(config, None)
        with suppress(KeyError, OSError):  # a controller that is elsewhere does without
            config.pluginmanager.register(WorkerProgress(*controller["progress"]), "progress")
        return
    if not option.collectonly and guest_session(config) is None:
        config.pluginmanager.register(Progress(config), "progress")
    if option.seed is None:
        option.seed = str(random.SystemRandom().randrange(1 << 32))
    settings = config.stash[_settings_key] = settings_of(option)
    dimensions = dimensions_of(option)
    guest_program.assemble_all()
    if _target_key in config.stash:
        config.stash[_plan_key] = []
        _prepare_remote(config)
        return
    guest = guest_session(config)
    _make_results(config, os.uname().release)
    if guest is not None and guest.emulated:
        keys = StaticKeys(settings.kvm_device)
        keys.hold()
        config.pluginmanager.register(keys, "static-keys")
    check_settings(settings, dimensions["vcpus"][-1], config.getoption("numprocesses", None) or 1)
    try:
        with Kvm(settings.kvm_device) as kvm:
            check_with_kvm(kvm, settings, dimensions)
            planned = plan(kvm, settings, dimensions, option.full)
    except KvmUnavailable:
        planned = plan(None, settings, dimensions, option.full)  # the kvm fixture will say why, test by test
    config.stash[_plan_key] = planned
    facts = Facts(asdict(this_host()), asdict(settings), [asdict(one.cell) for one in planned])
    report = RunReport(Path(option.results), facts)
    if _hint_key in config.stash:
        report.remarks.append(config.stash[_hint_key])
    facts.kernel_log = _watch_kernel_log(config, report)
    config.pluginmanager.register(report, "run-report")
    by_id = {str(one.cell): asdict(one.cell) for one in planned}
    planned_tests = PlannedTests(by_id, config.stash[_interruption_key])
    config.pluginmanager.register(planned_tests, "planned-tests")
    config.pluginmanager.register(WorkerCrashes(planned_tests, option.require_kvm), "worker-crashes")
    if guest is not None:
        config.pluginmanager.register(ReportStream(config, guest.report_path, report), "report-stream")


def _prepare_remote(config: pytest.Config) -> None:
    """Have the tests run by a session in the kernel that was found."""
    from harness.remote import RemoteSession  # see _find_target()

    target = config.stash[_target_key]
    results = Path(config.option.results)
    # What is known of it before it was booted; the session in there will tell more.
    host = {"kernel": target.kernel.release, "backend": target.qemu.vendor, "parameters": target.parameters}
    facts = Facts(host, asdict(config.stash[_settings_key]), [], str(target.qemu), machine=target.data)
    report = RunReport(results, facts)
    option = config.option
    # With auto the tests of this host may be all that was asked for.
    report.must_test, report.nothing_ran_status = option.kernel != AUTO, CANNOT_TEST
    options = options_in_kernel(
        option, [*DIMENSIONS, "vcpus", "soak", *SETTING_PARSERS], ["full", "thorough", "require_kvm", "no_known_bugs"]
    )
    reproduce_command = f"{this_pytest()} {shlex.join(kernel_options(option, target.kernel.image))}"
    tests = config.stash[_remote_tests_key]
    config.pluginmanager.register(report, "run-report")
    planned = PlannedTests({}, config.stash[_interruption_key])
    config.pluginmanager.register(planned, "planned-tests")
    session = RemoteSession(target, options, reproduce_command, tests, bool(config.args), results, report, planned)
    config.pluginmanager.register(session, "remote-session")


def _watch_kernel_log(config: pytest.Config, report: RunReport | None) -> str | None:
    """Watch the kernel's log: in each process for its tests, and in the first for the whole run.

    :returns: why it cannot be watched; None when it is
    """
    host = this_host()
    bugs = [] if config.option.no_known_bugs else [bug for bug in known_bugs.load() if bug.on(host)]

    def explain(splat: Splat) -> str | None:
        return next((bug.id for bug in bugs if bug.explains_log(splat.titles)), None)

    try:
        if report is not None:
            config.pluginmanager.register(RunWatch(KernelLog(), explain, report), "run-watch")
        if _is_worker(config) or not config.getoption("numprocesses", None):
            config.pluginmanager.register(TestWatch(KernelLog(), explain), "test-watch")
    except OSError as error:
        return f"not watched: {error.filename}: {error.strerror} (sysctl kernel.dmesg_restrict=0, or run as root)"
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a new xdist worker what the controller decided."""
    config = node.config
    plan_data = [(asdict(planned.cell), planned.missing) for planned in config.stash[_plan_key]]
    node.workerinput |= {"seed": config.option.seed, "results": config.option.results, "plan": plan_data}
    node.workerinput["args"] = config.args  # without the tests that run in another kernel


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """``-n auto``: a worker per CPU, but no more than there are memory and threads for; 0 is none but this process."""
    try:
        most = workers_here(settings_of(config.option), max(vcpus_of(config.option)))
        return min(len(os.sched_getaffinity(0)), _MAX_WORKERS, most)
    except (SelectionError, HostLimit, OSError):
        return 0  # pytest_configure will say what is wrong


def pytest_report_header(config: pytest.Config) -> list[str]:
    seed = f"seed     {config.option.seed}"
    if _target_key in config.stash:
        target = config.stash[_target_key]
        settings = config.stash[_settings_key]
        memory = f"{size_text(settings.test_mem)} of test memory (--test-mem), {settings.iterations} iterations (--iterations)"
        chosen = f"sizes    {memory}, rings of {settings.ring_count} entries (--ring-count)"
        remote_tests = config.stash[_remote_tests_key]
        tests = f"tests    {' '.join(remote_tests)}"
        here = [f"         and on this host {' '.join(config.args)}"] if config.args else []
        return [part for line in (suite_line(), *target.lines, chosen, tests, *here, seed) for part in column(line)]
    report: RunReport | None = config.pluginmanager.get_plugin("run-report")  # a worker has none
    unwatched = report.facts.kernel_log if report is not None else None
    unused = for_another_kernel(config.option)
    return [
        *environment_lines(this_host()),
        seed,
        *([f"kernel log {unwatched}"] if unwatched else []),
        *([f"not used {', '.join(unused)}: the tests run on this host"] if unused else []),
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    report: RunReport | None = session.config.pluginmanager.get_plugin("run-report")
    if report is not None and getattr(session.config.option, "xmlpath", None):
        from harness.junit_file import keep_errors_out  # see _find_target()

        keep_errors_out(session.config, report)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A selection that selects nothing is a mistake in it, and no verdict."""
    report: RunReport | None = session.config.pluginmanager.get_plugin("run-report")
    elsewhere = _target_key in session.config.stash
    if report is not None and not elsewhere and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.USAGE_ERROR
        report.remarks.append(no_test_matches(session.config.option, session.config.args))


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
    return partial(_lacks, pytestconfig)


def _lacks(config: pytest.Config, reason: str) -> NoReturn:
    if config.option.require_kvm:
        pytest.fail(f"required by --require-kvm: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    with _host_limits_excused(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    with _host_limits_excused(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    with _host_limits_excused(item):
        return (yield)


@contextmanager
def _host_limits_excused(item: pytest.Item) -> Iterator[None]:
    """Where the host withholds what a test on KVM needs, the host lacks it: that says nothing about KVM.

    Nor does an error that came as a signal ended the test.
    """
    try:
        yield
    except Exception as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from error
        if "kvm" in getattr(item, "fixturenames", ()) and (limit := explain_error(error)):
            _lacks(item.config, limit)
        raise


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
def thorough(pytestconfig: pytest.Config) -> bool:
    """Whether tests that have a long form take it."""
    return bool(pytestconfig.option.thorough)


@pytest.fixture(scope="session")
def throwaway_kernel(lacks: Lacks, pytestconfig: pytest.Config) -> None:
    """For what may harm the kernel it runs on, if that has a bug: skips unless the kernel was booted for the test."""
    if guest_session(pytestconfig) is None:
        lacks(
            "could corrupt the memory of a kernel with this bug: only in one that is booted for it (make check-kernel)"
        )


@pytest.fixture(scope="session")
def emulated_cpu(pytestconfig: pytest.Config) -> bool:
    """Whether QEMU's TCG emulates the CPU of this kernel, and everything takes long."""
    session = guest_session(pytestconfig)
    return session is not None and session.emulated


@pytest.fixture(scope="session")
def repeat_with(pytestconfig: pytest.Config) -> str:
    """The command that runs pytest as it runs now, without the tests and their settings."""
    return command_of(pytestconfig)


@pytest.fixture(scope="session")
def soak(pytestconfig: pytest.Config) -> int | None:
    """For how many seconds a test that makes up what it does goes on; None for its usual number of rounds."""
    return soak_of(pytestconfig.option)


@pytest.fixture(scope="session")
def emulates(host: Host) -> bool:
    """Whether this backend emulates each of a guest's instructions."""
    return host.backend in EMULATING_BACKENDS


@pytest.fixture(scope="session")
def kvm(lacks: Lacks, settings: Settings, host: Host) -> Iterator[Kvm]:
    """The open KVM device; a test that uses it counts as one that ran on KVM."""
    try:
        device = Kvm(settings.kvm_device)
    except KvmUnavailable as error:
        lacks(str(error))
    let_signals_in()
    with device:
        if reason := missing_facts(host) or keep_memory_in_place():
            lacks(reason)
        yield device


@pytest.fixture
def cell(lacks: Lacks, kvm: Kvm, planned_cell: PlannedCell) -> Iterator[Cell]:
    """The cell to test; skips when the host lacks something for it."""
    if planned_cell.missing:
        lacks(planned_cell.missing)
    backing = BACKINGS[planned_cell.cell.backing]
    with _huge_page_pool() if backing.hugetlb else nullcontext():
        yield planned_cell.cell


@pytest.fixture(scope="session")
def huge_page_pool() -> Callable[[], AbstractContextManager[None]]:
    """Call it for a context in which no other test takes pages from the pools of huge pages."""
    return _huge_page_pool


@contextmanager
def _huge_page_pool() -> Iterator[None]:
    """One test at a time: the pool holds enough for one, and xdist's workers share it."""
    lock = os.open("/sys/kernel/mm/hugepages", os.O_RDONLY)
    try:
        # Without a deadline: whoever holds it ends, for each of its waits has one, and a dead process holds nothing. To try
        # again and again instead would be unfair to those who wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


# --- what a run leaves behind -----------------------------------------------------------------------------------------


@pytest.fixture
def outcome(request: pytest.FixtureRequest, host: Host, settings: Settings) -> Outcome:
    """How a KVM test ends; see :class:`Outcome`."""
    return Outcome(request, host, settings)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure tells where it was, and the command that reproduces it; the report of a cell does by itself."""
    option = item.config.option
    brief = option.tbstyle == "auto" and not option.showlocals and not option.fulltrace
    if brief and call.excinfo is not None and call.excinfo.errisinstance(ContractViolation):
        call.excinfo = in_short(call.excinfo)
    report = yield
    fixtures = getattr(item, "fixturenames", ())
    if report.failed and "kvm" in fixtures and "planned_cell" not in fixtures:
        arguments = [item.nodeid, *options_given(item.config.option, [*SETTING_PARSERS, "kvm_device", "soak"])]
        command = reproduce_line(f"{command_of(item.config)} {shlex.join(arguments)}")
        report.sections.append(
            ("where, and how to reproduce it", "\n".join([*environment_lines(this_host()), command]))
        )
    return report


def pytest_report_teststatus(
    report: pytest.CollectReport | pytest.TestReport,
) -> tuple[str, str, tuple[str, dict[str, bool]]] | None:
    """Known bugs by their name, in the progress lines and the count at the end."""
    if isinstance(report, pytest.TestReport) and report.when == "call":
        outcome, _ = verdict(report, dict(report.user_properties))
        if outcome.startswith("known bug"):
            # pytest's count at the end has commas of its own, and no plurals.
            return f"with a {outcome.replace(',', '')}", "k", (outcome.upper(), {"yellow": True})
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> Generator[None, None, None]:
    """After all that there is to say comes the verdict on the kernel."""
    yield
    report: RunReport | None = config.pluginmanager.get_plugin("run-report")
    if report is not None and not config.option.collectonly:
        report.show_verdict(terminalreporter, exitstatus)
