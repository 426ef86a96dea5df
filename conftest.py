# SPDX-License-Identifier: GPL-2.0-only
"""pytest's side of the suite: the command line, the matrix, what a test may need, and what a run leaves behind."""

import argparse
import fcntl
import os
import random
import shlex
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from runner.unmet import leave, unmet

if reason := unmet():  # before it shows as an import that fails
    leave(reason, pytest.ExitCode.USAGE_ERROR)

from lib import guest_program, known_bugs
from lib.cell import Cell, Settings
from lib.dirty_log_run import DirtyTrackingError
from lib.host import EMULATING_BACKENDS, Host, keep_memory_in_place, let_signals_in, missing_facts, this_host
from lib.host_limits import FILES, MIB, HostLimit, Limit, file_limits, tightest
from lib.ioctl import KvmError
from lib.kernel_log import KernelLog, Splat
from lib.kvm import DEFAULT_DEVICE, Kvm, KvmUnavailable
from lib.limited_errors import explain_error, was_interrupted
from lib.log_modes import LOG_MODES
from lib.memory import BACKINGS, size_text
from lib.report import (
    Context,
    column,
    context_lines,
    environment_lines,
    failure_data,
    failure_text,
    reproduce_line,
    this_pytest,
)
from lib.selection import (
    DEFAULT_VCPUS,
    DIMENSIONS,
    PlannedCell,
    SelectionError,
    check_memory,
    check_settings,
    check_values,
    check_with_kvm,
    parse_milliseconds,
    parse_names,
    parse_number,
    parse_size,
    plan,
    workers_here,
)
from lib.toml_file import TomlError
from lib.tracked_vm import ContractBroken
from lib.wording import wrapped
from runner.early_collection import any_test_matches, no_test_matches
from runner.errors import CANNOT_TEST, CannotTest
from runner.guest_session import guest_session
from runner.interruption import Interruption, heed_once_in_worker
from runner.kernel_log_watch import RunWatch, TestWatch
from runner.kernel_options import (
    AT_HAND,
    LONGEST,
    add_kernel_options,
    flags_given,
    for_another_kernel,
    kernel_options,
    machine_numbers,
    option_name,
    options_given,
    options_in_kernel,
    split_tests,
)
from runner.output_paths import OutputError, check_file, check_folder, make_folder, remove_if_empty
from runner.planned_tests import PlannedTests
from runner.progress import Progress, WorkerProgress
from runner.report_stream import ReportStream
from runner.results import new_folder
from runner.run_report import FILES_OF_A_RUN, Facts, RunReport, not_kept, verdict, write_failure
from runner.static_keys import StaticKeys
from runner.store import say
from runner.worker_crashes import WorkerCrashes

if TYPE_CHECKING:
    from runner.target import Target

ROOT = Path(__file__).resolve().parent
_MAX_WORKERS = 8
_MOST_WORKERS = 1024  # that anyone may ask for
_MOST_ITERATIONS = 1_000_000  # some days
# Options of pytest's that show something and run no tests
_ONLY_SHOW = ("help", "version", "collectonly", "showfixtures", "show_fixtures_per_test", "markers", "cacheshow")

_plan_key = pytest.StashKey[list[PlannedCell]]()
_settings_key = pytest.StashKey[Settings]()
_target_key: "pytest.StashKey[Target]" = pytest.StashKey()
_remote_tests_key = pytest.StashKey[list[str]]()
_made_key = pytest.StashKey[list[Path]]()
_hint_key = pytest.StashKey[str]()
_interruption_key = pytest.StashKey[Interruption]()


# --- the command line -------------------------------------------------------------------------------------------------


class _NoWorkers(argparse.Action):
    """Option -n where xdist, which has it, was not loaded: pytest would call it an unrecognized argument."""

    def __call__(self, *_: object) -> NoReturn:
        loads = "it is not loaded (add -p xdist, or unset PYTEST_DISABLE_PLUGIN_AUTOLOAD)"
        why = loads if find_spec("xdist") else "it is not installed"
        raise pytest.UsageError(f"-n needs pytest-xdist: {why}")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
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
    group.addoption(
        "--iterations",
        metavar="N",
        help=f"how often to verify, up to {_MOST_ITERATIONS}; default {default.iterations} [-i]",
    )
    group.addoption(
        "--interval",
        metavar="MS",
        help=f"for how many milliseconds the guest writes in each, up to an hour; default {default.interval:g} [-I]",
    )
    group.addoption(
        "--ring-count",
        metavar="N",
        help=f"entries of a dirty ring, a power of two that this KVM takes; default {default.ring_count} [-c]",
    )
    group.addoption("--phys-offset", metavar="GPA", help="where the test memory begins; default: at the top [-p]")
    group.addoption(
        "--test-mem",
        metavar="SIZE",
        help="test memory in bytes, or with a unit: K, M, G or T (1024, its square, ...), whole pages; 3 pages are added;"
        " default 1G",
    )
    group.addoption(
        "--seed", metavar="N", help="decides what is written and when it is collected, 0 or more; default: a new one"
    )
    group.addoption("--thorough", action="store_true", help="the long form of each test that has one")
    group.addoption(
        "--soak",
        metavar="S",
        help="make up random histories for so many seconds in each log mode, up to a week (test_histories.py)",
    )
    group.addoption("--kvm-device", metavar="PATH", help=f"this host's KVM; default {DEFAULT_DEVICE}")
    group.addoption("--require-kvm", action="store_true", help="fail where a missing capability would skip")
    group.addoption(
        "--no-known-bugs", action="store_true", help="known kernel bugs (known_bugs.toml) are plain failures"
    )
    group.addoption("--results", metavar="DIR", help="where to put result files; default results/<kernel>-<time>")
    if not pluginmanager.hasplugin("xdist") and (
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD" in os.environ or not find_spec("xdist")
    ):
        # Only this method takes lowercase letters, of which -n is one; xdist calls it too.
        group._addoption("-n", action=_NoWorkers, help="(xdist is not loaded)")
    add_kernel_options(parser.getgroup("kernel", "KVM dirty-page tracking: another kernel, booted in QEMU"))


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
    if _only_shows(option) and not option.collectonly:
        if option.kernel not in (None, AT_HAND):
            raise pytest.UsageError("an option that only shows something tests no kernel: leave out --kernel")
        return None
    interruption.heed()
    config.pluginmanager.register(interruption, "interruption")
    try:
        _check_options(config)
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
        if option.kernel == AT_HAND:
            config.stash[_hint_key] = f"to run under emulation instead: {error}"
            return None
        print(f"cannot be tested: {error}", file=sys.stderr)
        return CANNOT_TEST
    except KeyboardInterrupt:
        return _nothing_tested()
    config.args = here
    if not here:
        # One process in the kernel: emulated, two only get in each other's way.
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


def _check_options(config: pytest.Config) -> None:
    """Check all that can be checked of the options before anything else is done.

    :raises SelectionError: a value is wrong, or an option does not go with the others
    :raises OutputError: a file or folder of the run cannot be written
    """
    option = config.option
    texts = {
        "--kernel": (option.kernel, "kernel"),
        "--qemu": (option.qemu, "program"),
        "--cpu-model": (option.cpu_model, "CPU model"),
        "--kvm-device": (option.kvm_device, "device"),
        "--results": (option.results, "folder"),
        **{name: (path, "file") for name, path in _files(option).items()},
    }
    for name, (text, what) in texts.items():
        if text == "":
            raise SelectionError(f"{name}: '' names no {what}")
    if option.kernel is None and (unused := for_another_kernel(option)):
        raise SelectionError(
            f"{', '.join(unused)}: only for tests in another kernel (--kernel NAME, or make check-kernel)"
        )
    if option.kernel not in (None, AT_HAND) and option.kvm_device is not None:
        raise SelectionError(
            "--kvm-device: is this host's KVM, and the tests run in another kernel (--kernel), with its own"
        )
    workers = getattr(option, "numprocesses", None)
    if isinstance(workers, int) and not 0 <= workers <= _MOST_WORKERS:
        raise SelectionError(f"-n: {workers} is out of range, it must be from 0 to {_MOST_WORKERS}")
    numbers = machine_numbers(option)
    if option.kernel is not None and option.kvm_params:
        _check_form(option.kvm_params)
    settings = _settings(option)
    check_values(settings, _vcpus(option)[-1])
    _soak(option)
    _dimensions(option)
    if option.kernel is not None and option.test_mem is not None:
        memory = numbers["vm_memory"]
        limit = Limit(f"the machine has {memory} MiB", memory * MIB, "a larger --vm-memory")
        check_memory(settings, _vcpus(option)[-1], 1, [limit])
    if not _only_shows(option):
        check_folder("--results", ROOT / "results" if option.results is None else _seen_from(config, option.results))
        for name, path in _files(option).items():
            if path is not None:
                _check_apart(option, config, name, path)
                check_file(name, _seen_from(config, path))


def _check_apart(option: Any, config: pytest.Config, name: str, path: str) -> None:
    """Check that pytest's file is none of the run's."""
    if option.results is not None:
        folder, file = _seen_from(config, option.results), _seen_from(config, path)
        if file in (folder, *(folder / taken for taken in FILES_OF_A_RUN)):
            raise SelectionError(f"{name}: {path} is what the run's own results are written to (--results)")


def _check_form(parameters: str) -> None:
    from runner.modules import parse_parameters  # see _find_target()

    try:
        parse_parameters(parameters)
    except CannotTest as error:
        raise SelectionError(f"--kvm-params: {error}") from None


def _files(option: Any) -> dict[str, str | None]:
    """By option, the files that pytest itself will write; its plugins for them may be off."""
    return {"--junitxml": getattr(option, "xmlpath", None), "--log-file": getattr(option, "log_file", None)}


def _seen_from(config: pytest.Config, path: str) -> Path:
    return config.invocation_params.dir / Path(path).expanduser()


def _only_shows(option: Any) -> bool:
    return any(getattr(option, name, None) for name in _ONLY_SHOW)


def _read_known_bugs(option: Any) -> None:
    """Read the list of known bugs while a mistake in it costs nothing yet; it stays in memory."""
    if not option.no_known_bugs:
        try:
            known_bugs.load()
        except TomlError as error:
            raise pytest.UsageError(str(error)) from None


def _needs_kernel(config: pytest.Config) -> bool:
    """Whether the tests on KVM run in another kernel: one that is named, or one at hand as this host has no usable KVM."""
    if config.option.kernel != AT_HAND:
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
    limit = min(numbers["time_limit"] + (_soak(option) or 0), LONGEST)
    parameters = option.kvm_params or ""
    target = find_target(option.kernel, parameters, option.accel, option.cpu_model, option.qemu, machine, limit)
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
    folder = new_folder(label) if given is None else _seen_from(config, given)
    config.option.results = str(folder)
    if not _only_shows(config.option):
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
        config.stash[_settings_key] = _settings(option)
        config.stash[_plan_key] = [PlannedCell(Cell(**cell), missing) for cell, missing in controller["plan"]]
        _watch_kernel_log(config, None)
        with suppress(KeyError, OSError):  # a controller that is elsewhere does without
            config.pluginmanager.register(WorkerProgress(*controller["progress"]), "progress")
        return
    if not option.collectonly and guest_session(config) is None:
        config.pluginmanager.register(Progress(config), "progress")
    if option.seed is None:
        option.seed = str(random.SystemRandom().randrange(1 << 32))
    settings = config.stash[_settings_key] = _settings(option)
    dimensions = _dimensions(option)
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
        config.pluginmanager.register(ReportStream(config, guest.report_to, report), "report-stream")


def _prepare_remote(config: pytest.Config) -> None:
    """Have the tests run by a session in the kernel that was found."""
    from runner.remote import RemoteSession  # see pytest_cmdline_main()

    target = config.stash[_target_key]
    results = Path(config.option.results)
    # What is known of it before it was booted; the session in there will tell more.
    host = {"kernel": target.kernel.release, "backend": target.qemu.vendor, "parameters": target.parameters}
    facts = Facts(host, asdict(config.stash[_settings_key]), [], str(target.qemu), machine=target.data)
    report = RunReport(results, facts)
    option = config.option
    # With auto the tests of this host may be all that was asked for.
    report.must_test, report.nothing_ran_status = option.kernel != AT_HAND, CANNOT_TEST
    options = options_in_kernel(
        option, [*DIMENSIONS, "vcpus", "soak", *_SETTING_PARSERS], ["full", "thorough", "require_kvm", "no_known_bugs"]
    )
    repeat_with = f"{this_pytest()} {shlex.join(kernel_options(option, target.kernel.image))}"
    tests = config.stash[_remote_tests_key]
    config.pluginmanager.register(report, "run-report")
    planned = PlannedTests({}, config.stash[_interruption_key])
    config.pluginmanager.register(planned, "planned-tests")
    session = RemoteSession(target, options, repeat_with, tests, bool(config.args), results, report, planned)
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


def _dimensions(option: Any) -> dict[str, tuple[Any, ...]]:
    dimensions: dict[str, tuple[Any, ...]] = {
        name: values if (text := getattr(option, name)) is None else parse_names(option_name(name), text, values)
        for name, values in DIMENSIONS.items()
    }
    dimensions["vcpus"] = _vcpus(option)
    return dimensions


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a new xdist worker what the controller decided."""
    config = node.config
    plan_data = [(asdict(planned.cell), planned.missing) for planned in config.stash[_plan_key]]
    node.workerinput |= {"seed": config.option.seed, "results": config.option.results, "plan": plan_data}
    node.workerinput["args"] = config.args  # without the tests that run in another kernel


def _vcpus(option: Any) -> tuple[int, ...]:
    return DEFAULT_VCPUS if option.vcpus is None else (parse_number("--vcpus", option.vcpus, 1),)


def _soak(option: Any) -> int | None:
    return None if option.soak is None else parse_number("--soak", option.soak, 1, LONGEST)


_SETTING_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "seed": lambda option, text: parse_number(option, text, 0),
    "iterations": lambda option, text: parse_number(option, text, 1, _MOST_ITERATIONS),
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
    return Settings(kvm_device=option.kvm_device or DEFAULT_DEVICE, **given)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """``-n auto``: a worker per CPU, but no more than there are memory and threads for; 0 is none but this process."""
    try:
        most = workers_here(_settings(config.option), max(_vcpus(config.option)))
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
        return [part for line in (*target.lines, chosen, tests, *here, seed) for part in column(line)]
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
        from runner.junit_file import keep_errors_out  # see _find_target()

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
    return _command(pytestconfig)


@pytest.fixture(scope="session")
def soak(pytestconfig: pytest.Config) -> int | None:
    """For how many seconds a test that makes up what it does goes on; None for its usual number of rounds."""
    return _soak(pytestconfig.option)


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


def _command(config: pytest.Config) -> str:
    session = guest_session(config)
    command = this_pytest() if session is None else session.repeat_with
    return " ".join([command, *flags_given(config.option, ["thorough", "require_kvm", "no_known_bugs"])])


class Outcome:
    """Runs the body of a KVM test, and turns its outcome into pytest's terms.

    A broken contract is a failure with the whole report, unless a known bug explains all of it; other errors get the
    context and the command that reproduces them.
    """

    def __init__(self, request: pytest.FixtureRequest, host: Host, settings: Settings) -> None:
        self._node = request.node
        self._config = request.config
        self._host = host
        self._settings = settings

    @contextmanager
    def expected(self, cell: Cell, settings: Settings | None = None) -> Iterator[None]:
        """Run the body; *settings* are those of the run, when they are not the command line's."""
        context = Context(self._host, settings or self._settings, _command(self._config))
        bug = self._known_bug(cell)
        try:
            yield
        except DirtyTrackingError as error:
            text = failure_text(error, context)
            try:
                self._keep(failure_data(error, context))
            except OSError as why_not:
                text += f"\n{not_kept(self._config.option.results, why_not)}"
            self.record(error.run.figures)
            if bug is not None and bug.explains(error.findings):
                self._node.user_properties.append(("findings", "\n".join(map(str, error.findings[:4]))))
                pytest.xfail(bug.id)
            raise pytest.fail.Exception(text, pytrace=False) from None  # the report says all that the error does
        except Exception as error:
            error.add_note("\n".join(context_lines(cell, context)))
            raise
        self._passed(bug)

    @contextmanager
    def contract(self) -> Iterator[None]:
        """Run the body of a test that is no cell, and that a known bug may concern."""
        bug = self._known_bug(None)
        try:
            yield
        except ContractBroken as error:
            if bug is not None and bug.explains_kinds(error.kinds):
                self._node.user_properties.append(("findings", str(error)))
                pytest.xfail(bug.id)
            raise
        self._passed(bug)

    def _passed(self, bug: known_bugs.KnownBug | None) -> None:
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

    def _known_bug(self, cell: Cell | None) -> known_bugs.KnownBug | None:
        if self._config.option.no_known_bugs:
            return None
        matrix = "planned_cell" in self._node.fixturenames
        for bug in known_bugs.load():
            if bug.on(self._host) and (
                bug.concerns_cell(cell) if matrix and cell else self._node.originalname in bug.tests
            ):
                return bug
        return None

    def _keep(self, data: dict[str, Any]) -> None:
        name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in self._node.name)
        stream: ReportStream | None = self._config.pluginmanager.get_plugin("report-stream")
        if stream is not None:
            stream.send(failure=[name, data])
        else:
            write_failure(Path(self._config.option.results), name, data)


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
    if brief and call.excinfo is not None and call.excinfo.errisinstance(ContractBroken):
        call.excinfo = _in_short(call.excinfo)
    report = yield
    fixtures = getattr(item, "fixturenames", ())
    if report.failed and "kvm" in fixtures and "planned_cell" not in fixtures:
        arguments = [item.nodeid, *options_given(item.config.option, [*_SETTING_PARSERS, "kvm_device", "soak"])]
        command = reproduce_line(f"{_command(item.config)} {shlex.join(arguments)}")
        report.sections.append(
            ("where, and how to reproduce it", "\n".join([*environment_lines(this_host()), command]))
        )
    return report


def _in_short(broken: pytest.ExceptionInfo[BaseException]) -> pytest.ExceptionInfo[BaseException]:
    """What KVM did wrong, and the test's own lines that found it; ``--tb=long`` shows the suite's lines too."""
    trace = broken.value.__traceback__
    frames = [
        f"{os.path.relpath(frame.filename, ROOT)}:{frame.lineno}: in {frame.name}\n    {frame.line}"
        for frame in traceback.extract_tb(trace)
        if Path(frame.filename).is_relative_to(ROOT / "selftests")
    ]
    message = [part for line in str(broken.value).splitlines() for part in wrapped(line)]
    text = "\n".join([*message, *getattr(broken.value, "__notes__", []), "", *frames])
    return pytest.ExceptionInfo.from_exception(pytest.fail.Exception(text, pytrace=False).with_traceback(trace))


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
