# SPDX-License-Identifier: GPL-2.0-only
"""Limits of the host are reported as such, in one line with the remedy: never as a failure, and never as another limit.

Most tests run a small cell in a process under a real limit; test_limits_of_the_machine.py has those of the whole machine.
"""

import errno
import os
import re
import resource
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from dirty_tracking.vcpu_thread import VcpuHang
from harness.interruption import Interruption
from harness.limited_errors import explain_error
from harness.planned_tests import PlannedTests
from harness.worker_crashes import WorkerCrashes
from kvm_util import filtered_calls, host, host_limits, userfault
from kvm_util.arch import current as arch
from kvm_util.guest import GuestError
from kvm_util.host_limits import HostLimit, explain
from kvm_util.ioctl import KvmError
from kvm_util.kvm import Kvm
from kvm_util.memory import GIB, KIB, MIB
from kvm_util.userfault import MissingPages
from runner import ROOT
from selftests.unit import limits
from selftests.unit.commands import CELLS, ONE_CELL, QUICK, pytest_command
from selftests.unit.limits import Limit, rlimit
from selftests.unit.mutants.faults import LOSING_PLUGIN

ONE = [*ONE_CELL, *QUICK]
ALL_BACKINGS = [word for word in ONE if not word.startswith("--backing")]
USAGE_ERROR, NOTHING_RAN, FAILED = 4, 5, 1
SYS_MADVISE, SYS_MEMFD_CREATE = 28, 319
NOBODY = 54321

EITHER_VERDICT = pytest.mark.parametrize(
    ("plugin", "expected"), [("", 0), (LOSING_PLUGIN, FAILED)], ids=["sound", "broken"]
)


# A file of a control group, by its name in cgroup v2, and its value
Group = tuple[str, str]


class Suite:
    """Runs pytest in a child process under a limit.

    :ivar output: stdout and stderr of the last run
    """

    def __init__(self, folder: Path, device: str) -> None:
        self._folder = folder
        self._device = device
        self.output = ""

    def __call__(self, *arguments: str, limit: Limit | Group | None = None, plugin: str = "") -> int:
        """Run pytest with *plugin*, the text of a module; returns the exit status."""
        command, environment = pytest_command(self._folder, plugin)
        command += [f"--kvm-device={self._device}", *arguments]
        with limits.group(*limit) if isinstance(limit, tuple) else nullcontext(limit) as prepare:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                preexec_fn=prepare, check=False,
            )  # fmt: skip
        self.output = done.stdout
        assert "INTERNALERROR" not in self.output
        assert "Traceback" not in self.output
        assert "Warning" not in self.output  # such as ResourceWarning
        return done.returncode


@pytest.fixture
def suite(tmp_path: Path, settings: Settings) -> Suite:
    return Suite(tmp_path, settings.kvm_device)


def in_child(limit: Limit, body: Callable[[], object], folder: Path) -> str:
    """Call *body* in a forked child under *limit*; returns its result, or the exception, as text."""
    answer = folder / "answer"
    answer.touch()
    file = os.open(answer, os.O_WRONLY)
    child = os.fork()
    if not child:
        try:
            limit()
            os.write(file, str(body()).encode())
        except BaseException as error:  # noqa: BLE001 (the child must not go on as pytest)
            os.write(file, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(file)
    os.waitpid(child, 0)
    return answer.read_text()


# --- runs that are refused, or in which nothing can run ---------------------------------------------------------------


TOO_FEW_FILES = r"a test opens up to 64 files, but RLIMIT_NOFILE lets a process have {} files open \(ulimit -n 1024\)"
TOO_BIG = r"--test-mem: 1 GiB needs .*MiB of memory, but {}"


@pytest.mark.parametrize(
    ("options", "limit", "message"),
    [
        ([], rlimit(resource.RLIMIT_NOFILE, 10), TOO_FEW_FILES.format(10)),
        ([], rlimit(resource.RLIMIT_NOFILE, 60), TOO_FEW_FILES.format(60)),
        (["-n2"], rlimit(resource.RLIMIT_NOFILE, 20), TOO_FEW_FILES.format(20)),
        (["-n4"], ("pids.max", "40"),
         r"-n: 4 workers need 64 threads, but .*pids.max allows 40 threads, 39 of them free \(fewer workers, or docker"),
        (["--test-mem=1G"], rlimit(resource.RLIMIT_AS, 1000 * MIB), TOO_BIG.format("RLIMIT_AS lets a process map 1000 MiB, ")),
        (["--test-mem=1G"], rlimit(resource.RLIMIT_DATA, 1000 * MIB),
         TOO_BIG.format("RLIMIT_DATA lets a process map 1000 MiB, ")),
        (["--test-mem=1G"], ("memory.max", "300M"),
         TOO_BIG.format(r".* allows 300 MiB, .*\(a smaller --test-mem, or docker run --memory")),
        ([], rlimit(resource.RLIMIT_FSIZE, 100 * KIB),  # the results of a small run do not fit
         r"^ERROR: --results: \S+: File too large: RLIMIT_FSIZE lets a file have 102400 bytes \(ulimit -f unlimited\)$"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("kvm")
def test_run_refused_by_a_limit(
    suite: Suite, tmp_path: Path, options: list[str], limit: Limit | Group, message: str
) -> None:
    """A run that a limit does not allow is refused before it begins, in one line that names option and limit."""
    assert suite(*ONE, *options, limit=limit) == USAGE_ERROR, suite.output
    (line,) = [line for line in suite.output.splitlines() if line.strip()]
    assert re.search(message, line)
    assert not (tmp_path / "results").exists()


def small_address_space_for_a_stack() -> None:
    rlimit(resource.RLIMIT_STACK, 900 * MIB)()
    rlimit(resource.RLIMIT_AS, 1000 * MIB)()


OPENING_PLUGIN = """
import os
from kvm_util.vm import Vm
create_vcpu = Vm.create_vcpu
files = []
def after_opening(*arguments):
    try:
        while True:
            files.append(os.open("/", os.O_PATH))
    except OSError:
        return create_vcpu(*arguments)
Vm.create_vcpu = after_opening
"""
GREEDY_TEST = "def pytest_runtest_call(item):\n    bytearray(1500 << 20)\n"
HIDING_PLUGIN = "import kvm_util.host, pathlib\nkvm_util.host._MODULES = pathlib.Path('/nonexistent')\n"
BALANCING_PLUGIN = """
import kvm_util.host, pathlib
kvm_util.host._NUMA_BALANCING = pathlib.Path(__file__).with_name("numa_balancing")
kvm_util.host._NUMA_BALANCING.write_text("{}\\n")
"""
NO_THREADS = "no more threads can be started: "
PIDS = NO_THREADS + r"\S+/pids.max allows {} threads \(docker run --pids-limit, or TasksMax= of a systemd unit\)"
TOO_SMALL = r"RLIMIT_AS lets a process map 1000 MiB \(ulimit -v unlimited\)"


@pytest.mark.parametrize(
    ("options", "limit", "plugin", "reason"),
    [
        *[(options, ("pids.max", str(most)), "", PIDS.format(most)) for most, options in (
            (2, []), (3, []), (4, []),  # refused to a vCPU, to KVM at the first KVM_RUN, or to the collector
            (3, ["--vcpus=2"]), (4, ["--vcpus=2"]), (5, ["--vcpus=2"]),
            (3, ["-nauto"]),  # to any worker: the tests run in the main process
        )],
        ([], small_address_space_for_a_stack, "", NO_THREADS + TOO_SMALL),
        ([], rlimit(resource.RLIMIT_AS, 1000 * MIB), GREEDY_TEST, TOO_SMALL),  # by then the interpreter's memory is free again
        pytest.param(["-n1"], ("memory.max", "300M"), GREEDY_TEST,
         r"the kernel killed the test for want of memory: .* allows 300 MiB \(docker run --memory, or MemoryMax= of a",
         marks=pytest.mark.slow),
        ([], rlimit(resource.RLIMIT_NOFILE, 200), OPENING_PLUGIN,
         r"KVM_CREATE_VCPU\(id=0\): EMFILE \(Too many open files\): no more files can be opened: RLIMIT_NOFILE lets a"),
        ([], limits.refused(SYS_MADVISE), "", "madvise is refused: EPERM, which is the seccomp filter's answer"),
        ([], limits.refused(arch.SYS_SET_MEMPOLICY), BALANCING_PLUGIN.format(1),
         r"automatic NUMA balancing would make KVM report pages that were not written \(sysctl kernel.numa_balancing=0\),"
         " and set_mempolicy, which prevents that, is refused: EPERM, which is the seccomp filter's answer"),
        ([], None, HIDING_PLUGIN,
         r"KVM's parameters, which determine its correct behaviour, are not visible here: /nonexistent has no kvm_\*"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("kvm")
def test_reason_that_nothing_ran(
    suite: Suite, options: list[str], limit: Limit | Group | None, plugin: str, reason: str
) -> None:
    """A limit because of which no test can run on KVM is the reason in the last line, and no test fails."""
    assert suite(*ONE, *options, limit=limit, plugin=plugin) == NOTHING_RAN, suite.output
    assert "1 cell: 1 skipped" in suite.output
    (line,) = [line for line in suite.output.splitlines() if ": cannot be tested: no test ran on KVM" in line]
    assert re.search(reason, line)


def test_thread_limit_of_a_user(kvm: Kvm, tmp_path: Path) -> None:
    """RLIMIT_NPROC explains a thread that cannot be started; root is exempt, so the test changes to another user."""

    def limit() -> None:
        if os.getuid() == 0:
            os.setuid(NOBODY)
        rlimit(resource.RLIMIT_NPROC, 1)()

    def body() -> str | None:
        cell = Cell("dirty-log", "48bit-4k", "anonymous", "forced", "sparse", 1)
        with DirtyLogRun(kvm, cell, Settings(iterations=1, test_mem=MIB, ring_count=1024)) as run:
            try:
                run.run()
            except RuntimeError as error:
                return explain_error(error)
        return "no error"

    if os.getuid() == 0:
        limits.skip_without_user(NOBODY)
    expected = "no more threads can be started: RLIMIT_NPROC lets this user have 1 threads (ulimit -u unlimited)"
    assert in_child(limit, body, tmp_path) == expected


# --- limits that not every test needs to observe ----------------------------------------------------------------------

MANY_PAGES = ["selftests/memory/test_write_protection.py", *QUICK, "-k", "many_pages and dirty-log", "-rs"]
THP_TESTS = [*ALL_BACKINGS, "--backing=anonymous_thp,anonymous", "selftests/memory/test_huge_pages.py", "-rs"]
CANNOT_MAP = (
    r"cannot map 4194316 KiB of anonymous guest memory: {} lets a process map 3072 MiB \(ulimit -.*1 passed, 1 skipped"
)
NO_MEMFD = r"1 pass, 1 skipped.*: shmem: memfd_create: {}, which is the seccomp filter's answer \(allow the call"


@pytest.mark.parametrize(
    ("tests", "limit", "plugin", "output"),
    [
        (ALL_BACKINGS, rlimit(resource.RLIMIT_FSIZE, MIB), "",  # which includes memfds
         r"skipped.*: cannot create a file of 4108 KiB for shmem guest memory: RLIMIT_FSIZE lets a file have 1048576 bytes"
         r" \(ulimit -f unlimited\)"),
        (MANY_PAGES, rlimit(resource.RLIMIT_AS, 3 * GIB), "", CANNOT_MAP.format("RLIMIT_AS")),
        (MANY_PAGES, rlimit(resource.RLIMIT_DATA, 3 * GIB), "", CANNOT_MAP.format("RLIMIT_DATA")),
        (THP_TESTS, limits.no_thp, "", "anonymous_thp: transparent huge pages are off for this process.*PR_SET_THP_DISABLE"),
        ([*ALL_BACKINGS, "--backing=shmem,anonymous"], limits.refused(SYS_MEMFD_CREATE), "", NO_MEMFD.format("EPERM")),
        ([*ALL_BACKINGS, "--backing=shmem,anonymous"], limits.refused(SYS_MEMFD_CREATE, code=errno.ENOSYS), "",
         NO_MEMFD.format("ENOSYS")),
        # NUMA balancing is off, or the kernel has none
        (ONE, limits.refused(arch.SYS_SET_MEMPOLICY), BALANCING_PLUGIN.format(0), "1 cell: 1 pass"),
        (ONE, limits.refused(arch.SYS_SET_MEMPOLICY), BALANCING_PLUGIN + "kvm_util.host._NUMA_BALANCING.unlink()",
         "1 cell: 1 pass"),
        ([*ONE, "-nauto"], ("pids.max", "40"), "", "2/2 workers.*1 cell: 1 pass"),
        ([*ONE, "-nauto"], ("memory.max", "300M"), "", "1/1 worker.*1 cell: 1 pass"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("kvm")
def test_what_a_limit_allows_runs(
    suite: Suite, tests: list[str], limit: Limit | Group, plugin: str, output: str
) -> None:
    """Tests that a limit does not allow are skipped with it as the reason, and the others run, in as many workers as fit."""
    assert suite(*tests, limit=limit, plugin=plugin) == 0, suite.output
    assert re.search(output, suite.output, re.DOTALL), suite.output
    assert "fragmented" not in suite.output  # memory, which is the usual reason for missing huge pages


@pytest.mark.parametrize(
    ("kills", "died_of", "outcome"),
    [
        ((0, 1), signal.SIGKILL, "skipped"),
        ((0, 1), signal.SIGSEGV, "failed"),
        ((0, 1), signal.SIGXCPU, "failed"),
        ((1, 1), signal.SIGKILL, "failed"),  # before the test began
    ],
)
def test_oom_kill_explains_one_crash(
    monkeypatch: pytest.MonkeyPatch, kills: tuple[int, int], died_of: signal.Signals, outcome: str
) -> None:
    """An OOM kill explains one worker's death: one by SIGKILL, whose test began before the kill."""
    counts = iter([*kills[:1] * 2, *kills[1:] * 2])
    monkeypatch.setattr(host_limits, "oom_kills", lambda: next(counts))
    with subprocess.Popen(["sleep", "9"]) as process:
        process.send_signal(died_of)
    crashes = WorkerCrashes(PlannedTests({}, Interruption()), required=False)
    crashes.pytest_runtest_logstart("first")
    crashes.pytest_runtest_logstart("second")
    found = []
    for name in ("first", "second"):
        report = pytest.TestReport(name, (name, 0, name), {}, "failed", "crashed", "call")
        report.node = SimpleNamespace(gateway=SimpleNamespace(_io=SimpleNamespace(popen=process)))  # type: ignore[attr-defined]
        crashes.pytest_handlecrashitem(name, report)
        found.append(report.outcome)
    assert found == [outcome, "failed"]


# --- system calls that a container refuses ----------------------------------------------------------------------------


def test_memory_policy_allows_balancing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A memory policy exempts the process from NUMA balancing, so that the tests can run while it is enabled."""
    (tmp_path / "numa_balancing").write_text("1\n")
    monkeypatch.setattr(host, "_NUMA_BALANCING", tmp_path / "numa_balancing")
    reason = host.opt_out_of_numa_balancing()
    if reason is not None and ("ENOSYS" in reason or "seccomp" in reason):
        pytest.skip(reason)  # a kernel without NUMA, or a container that refuses the call, as Docker's do
    assert reason is None


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        (limits.refused(arch.SYS_USERFAULTFD), "EPERM, which is the seccomp filter's answer"),
        (limits.refused(arch.SYS_USERFAULTFD, code=errno.ENOSYS), "ENOSYS, which is the seccomp filter's answer"),
        (lambda: os.setuid(NOBODY), "EPERM, this user may not handle the kernel's page faults (sysctl vm.unprivileged"),
    ],
    ids=["filter", "filter-enosys", "user"],
)
def test_userfaultfd_refused(tmp_path: Path, limit: Limit, reason: str) -> None:
    """A refused userfaultfd names the seccomp filter or the sysctl, whichever refuses it."""
    switch = Path("/proc/sys/vm/unprivileged_userfaultfd")
    if os.geteuid() or not switch.exists():
        pytest.skip("needs root, and a kernel with userfaultfd")
    if "sysctl" in reason:
        limits.skip_without_user(NOBODY)
        if switch.read_text().strip() != "0":
            pytest.skip("every user may handle the kernel's page faults here (vm.unprivileged_userfaultfd=1)")
    error = in_child(limit, lambda: MissingPages(0, arch.PAGE_SIZE), tmp_path)
    assert error.startswith(f"HostLimit: userfaultfd: {reason}")


@pytest.mark.parametrize("call", ["memfd_create", "madvise", "set_mempolicy", "userfaultfd"])
def test_only_refused_calls_are_excused(tmp_path: Path, call: str) -> None:
    """A seccomp filter explains only the errors of the calls that it refuses, with the errno that it returns."""
    numbers = {
        "memfd_create": SYS_MEMFD_CREATE,
        "madvise": SYS_MADVISE,
        "set_mempolicy": arch.SYS_SET_MEMPOLICY,
        "userfaultfd": arch.SYS_USERFAULTFD,
    }

    def refused() -> set[tuple[str, str]]:
        codes = (errno.EPERM, errno.ENOSYS, errno.EACCES)
        return {
            (call, errno.errorcode[code])
            for call in numbers
            for code in codes
            if filtered_calls.why_refused(call, code)
        }

    if os.geteuid():
        pytest.skip("needs root: others may be refused a userfaultfd by the kernel")
    before = {answer for answer in refused() if answer[0] != call}  # a container may already have a filter
    answers = in_child(limits.refused(numbers[call]), lambda: refused() - before, tmp_path)
    assert answers == str({(call, "EPERM")})


# --- files that cannot be read or written -----------------------------------------------------------------------------


VANISHING_FOLDER_PLUGIN = """
import pathlib, shutil
def pytest_runtest_call(item):
    folder = pathlib.Path(item.config.option.results)
    shutil.rmtree(folder)
    folder.touch()
"""


@EITHER_VERDICT
@pytest.mark.usefixtures("kvm")
def test_results_folder_vanishes(suite: Suite, tmp_path: Path, plugin: str, expected: int) -> None:
    """A results folder that vanishes during the run is reported, and does not change the verdict."""
    assert suite(*ONE, plugin=plugin + VANISHING_FOLDER_PLUGIN) == expected, suite.output
    start = f"THE RESULTS ARE NOT KEPT: {tmp_path}/results: "
    assert sum(line.startswith(start) for line in suite.output.splitlines()) == (2 if expected else 1)
    assert ("LOST [R" in suite.output) == bool(expected)


@EITHER_VERDICT
@pytest.mark.usefixtures("kvm")
def test_junit_file_on_a_full_disk(suite: Suite, plugin: str, expected: int) -> None:
    """A JUnit file that cannot be written is one line, and does not change the verdict."""
    assert suite(*ONE, "--junitxml=/dev/full", plugin=plugin) == expected, suite.output
    (line,) = [line for line in suite.output.splitlines() if line.startswith("THE RESULTS ARE NOT KEPT")]
    assert line == "THE RESULTS ARE NOT KEPT: /dev/full: No space left on device (--junitxml FILE puts them elsewhere)"
    assert "generated xml file" not in suite.output


@EITHER_VERDICT
@pytest.mark.usefixtures("kvm")
def test_one_cpu_for_all_threads(suite: Suite, plugin: str, expected: int) -> None:
    """Two vCPUs and a collector that share a CPU get the same verdict."""
    cpu = min(os.sched_getaffinity(0))
    cells = [*CELLS, *QUICK, "--log-mode=dirty-log,clear-log,dirty-ring", "--vcpus=2"]
    assert suite(*cells, limit=lambda: os.sched_setaffinity(0, {cpu}), plugin=plugin) == expected, suite.output


@pytest.mark.usefixtures("kvm")
def test_signals_blocked_by_the_parent(suite: Suite) -> None:
    """A signal mask inherited from the parent does not keep vCPUs from being kicked."""
    plugin = "import dirty_tracking.writers\ndirty_tracking.writers.HANG_TIMEOUT = 3\n"
    status = suite(
        *[*ONE, "--log-mode=dirty-log,dirty-ring"],
        limit=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()),
        plugin=plugin,
    )
    assert status == 0, suite.output


# --- errors that no limit explains ------------------------------------------------------------------------------------


FAILING_IOCTL = """
import errno, kvm_util.ioctl, kvm_util.vcpu
from kvm_util import uapi
honest = kvm_util.ioctl.raw_ioctl
def raw_ioctl(fd, request, arg=None):
    return (-1, errno.{code}) if request == uapi.{request} else honest(fd, request, arg)
kvm_util.ioctl.raw_ioctl = kvm_util.vcpu.raw_ioctl = raw_ioctl
"""


KILLED_TEST = "import os\ndef pytest_runtest_call(item):\n    os.kill(os.getpid(), 9)\n"
SEGFAULT_AFTER_AN_OOM_KILL = """
import os, signal
def pytest_runtest_call(item):
    if not os.fork():
        open("/proc/self/oom_score_adj", "w").write("1000")
        bytearray(1 << 30)
    assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
    os.kill(os.getpid(), signal.SIGSEGV)
"""


REFUSING_KVM_PLUGIN = """
import mmap, os
import {module}
from {module} import {name}
honest = {name}.{method}
def refuses(*arguments, **options):
    raise PermissionError(1, "Operation not permitted")
def on_kvm(*arguments, **options):
    {call}, kept = refuses, {call}
    try:
        return honest(*arguments, **options)
    finally:
        {call} = kept
{name}.{method} = on_kvm
"""
STATISTICS_TEST = ["selftests/unit/test_binary_stats.py", "-k", "test_kvm_page_size"]


def failing(request: str, code: str) -> str:
    return FAILING_IOCTL.format(request=request, code=code)


def refusing(module: str, name: str, method: str, call: str) -> str:
    return REFUSING_KVM_PLUGIN.format(module=module, name=name, method=method, call=call)


@pytest.mark.parametrize(
    ("tests", "limit", "plugin", "error"),
    [
        *[(ONE, None, failing("KVM_RUN", code), rf"KVM_RUN\(.*: {code} \(") for code in ("EAGAIN", "ENOMEM", "EMFILE")],
        *[(ONE, None, failing("KVM_CREATE_VCPU", code), rf"KVM_CREATE_VCPU\(.*: {code} \(") for code in ("ENOMEM", "ENFILE")],
        (ONE, None, failing("KVM_GET_DIRTY_LOG", "EAGAIN"), r"KVM_GET_DIRTY_LOG\(.*: EAGAIN \("),
        # close to a limit on threads; at the limit, but the ioctl starts no thread
        *[(ONE, ("pids.max", "17"), failing("KVM_RUN", code), rf"KVM_RUN\(.*: {code} \(") for code in ("EAGAIN", "ENOMEM")],
        (ONE, ("pids.max", "1"), failing("KVM_CREATE_VCPU", "EAGAIN"), r"KVM_CREATE_VCPU\(id=0\): EAGAIN"),
        # a limit, but KVM is required
        ([*ONE, "--require-kvm"], ("pids.max", "3"), "", r"required by --require-kvm: KVM_RUN\(vCPU 0\): EAGAIN"),
        pytest.param([*ONE, "-n1", "--require-kvm"], ("memory.max", "300M"), GREEDY_TEST,
         "required by --require-kvm: the kernel killed the test", marks=pytest.mark.slow),
        # SIGKILL without an OOM kill may come from the kernel; SIGSEGV does not come from the OOM killer
        ([*ONE, "-n1"], None, KILLED_TEST, "crashed while running"),
        ([*ONE, "-n1"], ("memory.max", "300M"), SEGFAULT_AFTER_AN_OOM_KILL, "crashed while running"),
        # a filter refuses another call than the one on a file of KVM
        *[(tests, limits.refused(arch.SYS_USERFAULTFD), refusing(*where), error) for where, tests, error in (
            (("kvm_util.vcpu", "Vcpu", "__init__", "mmap.mmap"), ONE, r"mmap\(struct kvm_run of vCPU 0\): EPERM"),
            (("dirty_tracking.ring", "DirtyRing", "of", "mmap.mmap"), [*ONE, "--log-mode=dirty-ring"],
             r"mmap\(dirty ring of 1024 entries\): EPERM"),
            (("kvm_util.binary_stats", "BinaryStats", "__init__", "os.pread"), STATISTICS_TEST,
             r"pread\(statistics file, 24 bytes at 0\): EPERM"),
        )],
    ],
)  # fmt: skip
@pytest.mark.usefixtures("kvm")
def test_error_that_nothing_excuses(
    suite: Suite, tests: list[str], limit: Limit | Group | None, plugin: str, error: str
) -> None:
    """An error that no limit explains is a failure, whatever limits there are; so is any with --require-kvm."""
    assert suite(*tests, limit=limit, plugin=plugin) == FAILED, suite.output
    assert re.search(error, suite.output), suite.output
    assert re.search("1 cell: 1 FAIL|1 failed", suite.output)


def test_one_file_left_explains_no_emfile(tmp_path: Path) -> None:
    """RLIMIT_NOFILE explains EMFILE only if no more file can be opened."""

    def body() -> str:
        number = 0
        while number < 98:
            number = os.open("/", os.O_PATH)
        return f"{number} {explain(errno.EMFILE)} {os.open('/', os.O_PATH)} {explain(errno.EMFILE)}"

    expected = "RLIMIT_NOFILE lets a process have 100 files open (ulimit -n 1024)"
    answer = in_child(rlimit(resource.RLIMIT_NOFILE, 100), body, tmp_path)
    assert answer == f"98 None 99 no more files can be opened: {expected}"


def test_no_file_left_for_the_device(tmp_path: Path, settings: Settings, kvm: Kvm) -> None:
    """EMFILE when opening /dev/kvm is a limit of the host, not an unavailable KVM."""
    error = in_child(rlimit(resource.RLIMIT_NOFILE, 3), lambda: Kvm(settings.kvm_device), tmp_path)
    expected = "cannot be opened: no more files can be opened: RLIMIT_NOFILE lets a process have 3"
    assert error.startswith(f"HostLimit: {settings.kvm_device} {expected}")


def test_userfaultfd_closed_on_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A userfaultfd is closed if its set-up fails."""
    fd = os.open("/", os.O_PATH)
    monkeypatch.setattr(userfault, "_syscall", lambda *_: fd)

    def limited(*_arguments: object) -> NoReturn:
        raise HostLimit("no memory")

    monkeypatch.setattr(userfault, "ioctl", limited)
    with pytest.raises(HostLimit, match="no memory"):
        MissingPages(0, arch.PAGE_SIZE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def raised(
    error: Exception, *, cause: Exception | None = None, context: Exception | None = None, suppress: bool = False
) -> Exception:
    """*error* as if it had been raised from *cause*, or while *context* was being handled."""
    error.__cause__, error.__context__, error.__suppress_context__ = cause, context, suppress
    return error


THREADS = HostLimit("no threads")
FINDINGS: Sequence[type[Exception]] = (AssertionError, GuestError, VcpuHang)


@pytest.mark.parametrize(
    ("error", "explanation"),
    [
        (raised(ValueError(), context=THREADS), "no threads"),
        (raised(ValueError(), context=THREADS, suppress=True), None),
        (raised(ValueError(), cause=HostLimit("no files"), context=THREADS, suppress=True), "no files"),
        (raised(ValueError(), context=raised(KeyError(), context=THREADS)), None),
        (raised(KvmError(errno.ENOMEM, "KVM_CREATE_VM"), context=THREADS), None),
        (KvmError(errno.ENOMEM, "KVM_CREATE_VM"), None),
        (RuntimeError("anything"), None),
        (MemoryError("slot 0 has no room"), None),
        *[(raised(finding("lost"), context=THREADS), None) for finding in FINDINGS],
        *[(raised(finding("lost"), cause=THREADS), None) for finding in FINDINGS],
        *[(raised(HostLimit("no threads"), context=finding("lost")), None) for finding in FINDINGS],
        *[(raised(HostLimit("a limit"), context=finding("lost"), suppress=True), None) for finding in FINDINGS],
    ],
)
def test_limit_that_explains_an_error(error: Exception, explanation: str | None) -> None:
    """An error is explained by its cause, or by a limit that was being handled; a finding about KVM by no limit at all."""
    assert explain_error(error) == explanation


def test_other_errors_are_unexplained() -> None:
    """An errno that no limit leads to has no explanation."""
    assert explain(errno.EINVAL) is None
