# SPDX-License-Identifier: GPL-2.0-only
"""Limits of the host are reported as such, in one line with the remedy: never as a failure, and never as another limit.

Most tests run a small cell in a process under a real limit. For limits of the whole machine, files of /proc or /sys are faked.
"""

import errno
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
from kvm_util import cgroups, filtered_calls, host, host_limits, memory, userfault
from kvm_util.arch import current as arch
from kvm_util.guest import GuestError
from kvm_util.host_limits import HostLimit, explain
from kvm_util.ioctl import KvmError
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS, GIB, KIB, MIB, GuestMemory, HugePagesMissing
from kvm_util.userfault import MissingPages
from runner import ROOT
from selftests.unit import limits
from selftests.unit.limits import Limit, rlimit
from selftests.unit.mutants.faults import LOSING_PLUGIN

SIZES = ["--test-mem=4M", "--iterations=2", "--interval=1", "--ring-count=1024"]
CELL = ["selftests/matrix/test_dirty_log.py", "--guest-mode=48bit-4k", "--stop=forced", "--density=sparse"]
ONE = [*CELL, *SIZES, "--log-mode=dirty-log", "--backing=anonymous", "--vcpus=1"]
USAGE_ERROR, NOTHING_RAN, FAILED = 4, 5, 1
SYS_MADVISE, SYS_MEMFD_CREATE = 28, 319
NOBODY = 54321

MakeGroup = Callable[[str, str, str], Limit]


class Suite:
    """Runs pytest in a child process under a limit.

    :ivar output: stdout and stderr of the last run
    """

    def __init__(self, folder: Path, device: str) -> None:
        self._folder = folder
        self._device = device
        self.output = ""

    def __call__(self, *arguments: str, limit: Limit | None = None, plugin: str = "") -> int:
        (self._folder / "under_test.py").write_text(plugin)
        options = [f"--results={self._folder}/results", f"--kvm-device={self._device}"]
        command = [sys.executable, "-m", "pytest", "-p", "under_test", *options, *arguments]
        environment = os.environ | {"PYTHONPATH": f"{self._folder}:{ROOT / 'lib'}"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=limit, check=False,
        )  # fmt: skip
        self.output = done.stdout
        assert "INTERNALERROR" not in self.output
        assert "Traceback" not in self.output
        assert "Warning" not in self.output  # such as ResourceWarning
        return done.returncode

    def nothing_ran(self, status: int) -> str:
        """Check that no test ran on KVM and none failed; returns the line that says why."""
        assert status == NOTHING_RAN, self.output
        assert "FAIL" not in self.output
        (line,) = [line for line in self.output.splitlines() if ": cannot be tested: no test ran on KVM" in line]
        return line

    def refused(self, status: int) -> str:
        """Check that the run was refused before it began; returns the only line of output."""
        assert status == USAGE_ERROR, self.output
        (line,) = [line for line in self.output.splitlines() if line.strip()]
        return line


@pytest.fixture
def suite(tmp_path: Path, settings: Settings) -> Suite:
    return Suite(tmp_path, settings.kvm_device)


@pytest.fixture
def group() -> Iterator[MakeGroup]:
    """A function of a controller, one of its files and a value that creates a control group to run under."""
    with ExitStack() as groups:

        def make(controller: str, file: str, value: str) -> Limit:
            try:
                return groups.enter_context(limits.group(controller, file, value))
            except limits.NoGroups as error:
                pytest.skip(str(error))

        yield make


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "vcpus"), [(2, 1), (3, 1), (4, 1), (3, 2), (4, 2), (5, 2)])
@pytest.mark.usefixtures("kvm")
def test_pids_limit_of_a_control_group(suite: Suite, group: MakeGroup, most: int, vcpus: int) -> None:
    """A pids limit is reported whichever thread hits it: a vCPU's, KVM's at the first KVM_RUN, or the collector's."""
    status = suite(*ONE, f"--vcpus={vcpus}", limit=group("pids", "pids.max", str(most)))
    line = suite.nothing_ran(status)
    assert "no more threads can be started: " in line
    assert f"pids.max allows {most} threads (docker run --pids-limit, or TasksMax= of a systemd unit)" in line


@pytest.mark.usefixtures("kvm")
def test_pids_limit_with_require_kvm(suite: Suite, group: MakeGroup) -> None:
    """With --require-kvm a pids limit is a failure."""
    assert suite(*ONE, "--require-kvm", limit=group("pids", "pids.max", "3")) == FAILED
    assert "required by --require-kvm: KVM_RUN(vCPU 0): EAGAIN" in suite.output


@pytest.mark.usefixtures("kvm")
def test_pids_limit_with_workers(suite: Suite, group: MakeGroup) -> None:
    """A fixed number of workers that a pids limit does not allow is refused; -n auto starts as many as it allows."""
    limit = group("pids", "pids.max", "40")
    line = suite.refused(suite(*ONE, "-n", "4", limit=limit))
    assert "-n: 4 workers need 64 threads, but " in line
    assert "pids.max allows 40 threads, 39 of them free (fewer workers, or docker run --pids-limit" in line
    assert suite(*ONE, "-n", "auto", limit=limit) == 0, suite.output


@pytest.mark.usefixtures("kvm")
def test_no_threads_for_any_worker(suite: Suite, group: MakeGroup) -> None:
    """Where no thread can be created, -n auto starts no worker and runs the tests in the main process."""
    suite.nothing_ran(suite(*ONE, "-n", "auto", limit=group("pids", "pids.max", "3")))


@pytest.mark.usefixtures("kvm")
def test_stack_exceeds_address_space(suite: Suite) -> None:
    """A thread whose stack (RLIMIT_STACK) does not fit into RLIMIT_AS is a limit of the host."""

    def limit() -> None:
        rlimit(resource.RLIMIT_STACK, 900 * MIB)()
        rlimit(resource.RLIMIT_AS, 1000 * MIB)()

    line = suite.nothing_ran(suite(*ONE, limit=limit))
    assert "no more threads can be started: RLIMIT_AS lets a process map 1000 MiB (ulimit -v unlimited)" in line


def test_thread_limit_of_a_user(kvm: Kvm, tmp_path: Path) -> None:
    """RLIMIT_NPROC explains a thread that cannot be started; root is exempt, so the test changes to another user."""
    if os.getuid() == 0 and (reason := limits.why_no_user(NOBODY)):
        pytest.skip(reason)

    def body() -> str | None:
        if os.getuid() == 0:
            os.setuid(NOBODY)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        cell = Cell("dirty-log", "48bit-4k", "anonymous", "forced", "sparse", 1)
        with DirtyLogRun(kvm, cell, Settings(iterations=1, test_mem=MIB, ring_count=1024)) as run:
            try:
                run.run()
            except RuntimeError as error:
                return explain_error(error)
        return "no error"

    expected = "no more threads can be started: RLIMIT_NPROC lets this user have 1 threads (ulimit -u unlimited)"
    assert in_child(body, tmp_path) == expected


def in_child(body: Callable[[], str | None], folder: Path) -> str:
    """Call *body* in a forked child; returns its result, or the exception, as text."""
    answer = folder / "answer"
    answer.touch()
    file = os.open(answer, os.O_WRONLY)
    child = os.fork()
    if not child:
        try:
            os.write(file, str(body()).encode())
        except BaseException as error:  # noqa: BLE001 (the child must not go on as pytest)
            os.write(file, repr(error).encode())
        finally:
            os._exit(0)
    os.close(file)
    os.waitpid(child, 0)
    return answer.read_text()


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "workers"), [(10, []), (60, []), (20, ["-n2"])])
def test_too_few_files_for_any_test(suite: Suite, most: int, workers: list[str]) -> None:
    """A run with too few file descriptors for any test is refused before it begins."""
    line = suite.refused(suite(*ONE, *workers, limit=rlimit(resource.RLIMIT_NOFILE, most)))
    assert (
        f"a test opens up to 64 files, but RLIMIT_NOFILE lets a process have {most} files open (ulimit -n 1024)" in line
    )


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


@pytest.mark.usefixtures("kvm")
def test_files_exhausted_during_a_test(suite: Suite) -> None:
    """EMFILE of KVM_CREATE_VCPU is explained by RLIMIT_NOFILE if no descriptor is left."""
    status = suite(*ONE, limit=rlimit(resource.RLIMIT_NOFILE, 200), plugin=OPENING_PLUGIN)
    line = suite.nothing_ran(status)
    assert (
        "KVM_CREATE_VCPU(id=0): EMFILE (Too many open files): no more files can be opened: RLIMIT_NOFILE lets a" in line
    )


def test_file_size_limit_skips_shmem(suite: Suite, kvm: Kvm) -> None:
    """RLIMIT_FSIZE limits memfds: cells with shmem memory are skipped, the others run."""
    status = suite(*CELL, *SIZES, "--log-mode=dirty-log", limit=rlimit(resource.RLIMIT_FSIZE, MIB))
    assert status == 0, suite.output
    assert "FAIL" not in suite.output
    expected = "cannot create a file of 4108 KiB for shmem guest memory: RLIMIT_FSIZE lets a file have 1048576 bytes"
    assert f": {expected} (ulimit -f unlimited)" in suite.output


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [(resource.RLIMIT_AS, "RLIMIT_AS"), (resource.RLIMIT_DATA, "RLIMIT_DATA")],
    ids=["as", "data"],
)
@pytest.mark.usefixtures("kvm")
def test_mapped_memory_limits(suite: Suite, kind: int, name: str) -> None:
    """With RLIMIT_AS or RLIMIT_DATA, cells that do not fit are refused; a test that maps more is skipped."""
    line = suite.refused(suite(*ONE, "--test-mem=1G", limit=rlimit(kind, 1000 * MIB)))
    assert "--test-mem: 1 GiB needs " in line
    assert f"MiB of memory, but {name} lets a process map 1000 MiB, " in line
    status = suite(
        "selftests/memory/test_write_protection.py",
        *SIZES,
        "-k",
        "many_pages and dirty-log",
        "-rs",
        limit=rlimit(kind, 3 * GIB),
    )
    assert status == 0, suite.output
    assert "1 passed, 1 skipped" in suite.output
    expected = f"cannot map 4194316 KiB of anonymous guest memory: {name} lets a process map 3072 MiB (ulimit -"
    assert expected in suite.output


@pytest.mark.usefixtures("kvm")
def test_interpreter_out_of_memory(suite: Suite) -> None:
    """A bare MemoryError of the interpreter is explained by RLIMIT_AS, although its memory is free again by then."""
    plugin = "def pytest_runtest_call(item):\n    bytearray(1500 << 20)\n"
    line = suite.nothing_ran(suite(*ONE, limit=rlimit(resource.RLIMIT_AS, 1000 * MIB), plugin=plugin))
    assert "RLIMIT_AS lets a process map 1000 MiB (ulimit -v unlimited)" in line


def test_memory_limit_of_a_control_group(suite: Suite, group: MakeGroup, kvm: Kvm) -> None:
    """A control group's memory limit bounds --test-mem and the number of workers of -n auto."""
    limit = group("memory", "memory.max", "300M")
    line = suite.refused(suite(*ONE, "--test-mem=1G", limit=limit))
    assert "--test-mem: 1 GiB needs " in line
    assert " allows 300 MiB, " in line
    assert "(a smaller --test-mem, or docker run --memory" in line
    assert suite(*ONE, "-n", "auto", limit=limit) == 0, suite.output
    assert "1/1 worker" in suite.output


GREEDY_PLUGIN = """
def pytest_runtest_call(item):
    bytearray(1 << 30)
"""


@pytest.mark.usefixtures("kvm")
@pytest.mark.slow
def test_worker_killed_by_the_oom_killer(suite: Suite, group: MakeGroup) -> None:
    """A worker that the OOM killer ended in its control group is a skip, or a failure with --require-kvm."""
    limit = group("memory", "memory.max", "300M")
    line = suite.nothing_ran(suite(*ONE, "-n1", limit=limit, plugin=GREEDY_PLUGIN))
    assert "the kernel killed the test for want of memory: " in line
    assert " allows 300 MiB (docker run --memory, or MemoryMax= of a systemd unit)" in line
    assert "1 cell: 1 skipped" in suite.output
    assert suite(*ONE, "-n1", "--require-kvm", limit=limit, plugin=GREEDY_PLUGIN) == FAILED


@pytest.mark.usefixtures("kvm")
def test_worker_killed_for_unknown_reason(suite: Suite) -> None:
    """A SIGKILL without an OOM kill is a failure: it may come from the kernel."""
    plugin = "import os\ndef pytest_runtest_call(item):\n    os.kill(os.getpid(), 9)\n"
    assert suite(*ONE, "-n1", plugin=plugin) == FAILED
    assert "crashed while running" in suite.output
    assert "1 cell: 1 FAIL" in suite.output


SACRIFICING_PLUGIN = """
import os, signal
def pytest_runtest_call(item):
    if not os.fork():
        open("/proc/self/oom_score_adj", "w").write("1000")
        bytearray(1 << 30)
    assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
    os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.mark.usefixtures("kvm")
def test_worker_crash_after_an_oom_kill(suite: Suite, group: MakeGroup) -> None:
    """A worker's SIGSEGV is a failure even right after the OOM killer has killed another process."""
    limit = group("memory", "memory.max", "300M")
    assert suite(*ONE, "-n1", limit=limit, plugin=SACRIFICING_PLUGIN) == FAILED, suite.output
    assert "crashed while running" in suite.output
    assert "1 cell: 1 FAIL" in suite.output


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


MEMINFO = """
MemTotal:       2000000 kB
MemAvailable:   1500000 kB
CommitLimit:    1000000 kB
Committed_AS:    200000 kB
"""


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that adds files with the given contents to a fake /proc, which is empty at first."""
    monkeypatch.setattr(host_limits, "PROC", tmp_path)
    monkeypatch.setattr(cgroups, "PROC", tmp_path)

    def write(files: dict[str, str]) -> None:
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)

    return write


def test_no_overcommit_limits_memory(proc: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """With vm.overcommit_memory=2 the commit limit is reported as the reason, and bounds the available memory."""

    def refuses(*_arguments: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    proc({"meminfo": MEMINFO, "sys/vm/overcommit_memory": "2\n", "sys/vm/admin_reserve_kbytes": "8192\n"})
    monkeypatch.setattr(mmap, "mmap", refuses)
    expected = (
        r"cannot map 1 GiB of anonymous guest memory: with vm.overcommit_memory=2 all processes may map 976 MiB, used or not"
        r" \(sysctl vm.overcommit_memory=0\)"
    )
    with pytest.raises(HostLimit, match=expected):
        GuestMemory(BACKINGS["anonymous"], GIB, 0)
    assert host_limits.available_memory() == (1000000 - 200000 - 8192) * KIB
    proc({"sys/vm/overcommit_memory": "0\n"})
    assert host_limits.available_memory() == 1500000 * KIB
    with pytest.raises(memory.GuestMemoryError, match="ENOMEM"):
        GuestMemory(BACKINGS["anonymous"], GIB, 0)


MOUNTS_V2 = "30 23 0:26 {root} {at} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNTS_V1 = "36 32 0:31 {root} {at} rw,nosuid shared:9 - cgroup cgroup rw,memory\n"


@pytest.mark.parametrize(
    ("groups", "root", "folder"),
    [
        ("0::/a/b\n", "/", "a/b"),  # a host
        ("0::/\n", "/", "."),  # a container with a cgroup namespace
        ("0::/system/docker-1\n", "/system/docker-1", "."),  # one without: the mount begins at its group
        ("0::/../other\n", "/", "."),  # a process that was moved out of the namespace's root
    ],
)
def test_cgroup_v2_paths(proc: Callable[..., None], tmp_path: Path, groups: str, root: str, folder: str) -> None:
    """The limits of this process's cgroup v2 group are found on a host and in containers of each kind."""
    at = tmp_path / "cgroup"
    proc({"self/cgroup": groups, "self/mountinfo": MOUNTS_V2.format(root=root, at=at)})
    proc({f"cgroup/{folder}/memory.max": "max\n", f"cgroup/{folder}/memory.high": f"{500 * MIB}\n"})
    proc(
        {f"cgroup/{folder}/memory.current": f"{300 * MIB}\n", f"cgroup/{folder}/memory.stat": f"inactive_file {MIB}\n"}
    )
    proc({f"cgroup/{folder}/pids.max": "77\n", f"cgroup/{folder}/pids.current": "7\n"})
    assert [(one.file, one.limit, one.usage) for one in cgroups.memory()] == [
        ((at / folder / "memory.high"), 500 * MIB, 299 * MIB)
    ]
    assert [(one.limit, one.usage) for one in cgroups.pids()] == [(77, 7)]


def test_cgroup_v1_limit_of_a_parent(proc: Callable[..., None], tmp_path: Path) -> None:
    """The limit of a parent group counts if the group itself has none; v1 controllers have separate hierarchies."""
    at = tmp_path / "cgroup"
    proc({"self/cgroup": "4:memory:/a/b\n3:pids:/\n0::/x\n", "self/mountinfo": MOUNTS_V1.format(root="/", at=at)})
    proc({"cgroup/a/b/memory.limit_in_bytes": "9223372036854771712\n", "cgroup/a/b/memory.usage_in_bytes": "5\n"})
    proc({"cgroup/a/memory.limit_in_bytes": f"{GIB}\n", "cgroup/a/memory.usage_in_bytes": f"{10 * MIB}\n"})
    proc({"cgroup/a/memory.stat": f"inactive_file 1\ntotal_inactive_file {4 * MIB}\n"})
    (limit,) = cgroups.memory()
    assert (limit.file, limit.limit, limit.usage) == (at / "a/memory.limit_in_bytes", GIB, 6 * MIB)
    assert cgroups.pids() == []


@pytest.mark.parametrize(("file", "usage"), [("max", "current"), ("rsvd.max", "rsvd.current")])
def test_hugetlb_limit_of_a_control_group(
    proc: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, usage: str
) -> None:
    """A control group's hugetlb limit makes a backing unavailable although the pool has free pages."""
    at = tmp_path / "cgroup"
    proc({"pools/hugepages-2048kB/free_hugepages": "16\n"})
    monkeypatch.setattr(memory, "_HUGEPAGES", tmp_path / "pools")
    proc({"self/cgroup": "0::/pod\n", "self/mountinfo": MOUNTS_V2.format(root="/", at=at)})
    proc({f"cgroup/pod/hugetlb.2MB.{file}": f"{8 * MIB}\n", f"cgroup/pod/hugetlb.2MB.{usage}": f"{4 * MIB}\n"})
    backing = BACKINGS["anonymous_hugetlb_2mb"]
    assert backing.missing(4 * MIB) is None
    reason = backing.missing(6 * MIB)
    assert reason is not None
    expected = f"anonymous_hugetlb_2mb: needs 3 huge pages of 2 MiB, but {at}/pod/hugetlb.2MB.{file} allows 8 MiB ("
    assert reason.startswith(expected)


# --- transparent huge pages -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kvm")
def test_thp_disabled_by_prctl(suite: Suite) -> None:
    """PR_SET_THP_DISABLE, which is inherited, is reported as the reason for missing transparent huge pages."""
    arguments = [*CELL, *SIZES, "selftests/memory/test_huge_pages.py", "--log-mode=dirty-log", "--vcpus=1", "-rs"]
    status = suite(*arguments, "--backing=anonymous_thp,anonymous", limit=limits.no_thp)
    assert status == 0, suite.output
    assert "anonymous_thp: transparent huge pages are off for this process" in suite.output
    assert "PR_SET_THP_DISABLE" in suite.output
    assert "fragmented" not in suite.output


ALL_OFF = "transparent huge pages are off (echo madvise > {at}/enabled)"
SIZE_OFF = "transparent huge pages of 2 MiB are off (echo inherit > {at}/hugepages-2048kB/enabled)"


@pytest.mark.parametrize(
    ("common", "of_size", "expected"),
    [
        ("always [madvise] never", None, None),
        ("always madvise [never]", None, ALL_OFF),
        ("always [madvise] never", "always inherit madvise [never]", SIZE_OFF),
        ("always [madvise] never", "always [inherit] madvise never", None),
        ("always madvise [never]", "always [inherit] madvise never", ALL_OFF),
        ("always madvise [never]", "always inherit [madvise] never", None),
    ],
)
def test_thp_settings_per_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, common: str, of_size: str | None, expected: str | None
) -> None:
    """A size's own THP setting decides, or the global one that it inherits; the remedy names the right one."""
    (tmp_path / "enabled").write_text(common)
    if of_size is not None:
        (tmp_path / "hugepages-2048kB").mkdir()
        (tmp_path / "hugepages-2048kB/enabled").write_text(of_size)
    monkeypatch.setattr(memory, "_THP", tmp_path / "enabled")
    reason = f"anonymous_thp: {expected.format(at=tmp_path)}" if expected else None
    assert BACKINGS["anonymous_thp"].missing(2 * MIB) == reason
    if not reason:
        return
    # Memory that was mapped before THP was disabled
    guest_memory = GuestMemory(BACKINGS["anonymous_thp"], 8 * MIB, 0)
    monkeypatch.setattr(GuestMemory, "transparent_huge_size", lambda _: 0)
    with pytest.raises(HugePagesMissing) as error:
        guest_memory.populate()
    assert str(error.value) == reason
    guest_memory.close()


# --- system calls that a container refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
@pytest.mark.usefixtures("kvm")
def test_memfd_create_refused(suite: Suite, code: int) -> None:
    """If a seccomp filter refuses memfd_create, cells with shmem memory are skipped and the filter is named."""
    arguments = [*CELL, *SIZES, "--log-mode=dirty-log", "--vcpus=1", "--backing=shmem,anonymous"]
    assert suite(*arguments, limit=limits.refused(SYS_MEMFD_CREATE, code=code)) == 0, suite.output
    name = errno.errorcode[code]
    assert f": shmem: memfd_create: {name}, which is the seccomp filter's answer (allow the call" in suite.output
    assert "1 pass, 1 skipped" in suite.output


@pytest.mark.parametrize("balancing", ["0", "1", "2", None])
@pytest.mark.usefixtures("kvm")
def test_set_mempolicy_refused(suite: Suite, tmp_path: Path, balancing: str | None) -> None:
    """A refused set_mempolicy is harmless without NUMA balancing; otherwise no test runs, since KVM cannot be judged."""
    switch = tmp_path / "numa_balancing"
    if balancing is not None:
        switch.write_text(f"{balancing}\n")
    plugin = f"import kvm_util.host, pathlib\nkvm_util.host._NUMA_BALANCING = pathlib.Path({str(switch)!r})\n"
    status = suite(*ONE, limit=limits.refused(arch.SYS_SET_MEMPOLICY), plugin=plugin)
    if balancing in ("0", None):
        assert status == 0, suite.output
        return
    line = suite.nothing_ran(status)
    assert (
        "automatic NUMA balancing would make KVM report pages that were not written (sysctl kernel.numa_balancing=0)"
        in line
    )
    assert "set_mempolicy, which prevents that, is refused: EPERM, which is the seccomp filter's answer" in line


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
    if os.geteuid() or not Path("/proc/sys/vm/unprivileged_userfaultfd").exists():
        pytest.skip("needs root, and a kernel with userfaultfd")
    by_filter = "seccomp" in reason
    if not by_filter and Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("every user may handle the kernel's page faults here (vm.unprivileged_userfaultfd=1)")
    if not by_filter and (why := limits.why_no_user(NOBODY)):
        pytest.skip(why)

    def body() -> str:
        limit()
        try:
            MissingPages(0, arch.PAGE_SIZE)
        except HostLimit as error:
            return str(error)
        return "no error"

    assert in_child(body, tmp_path).startswith(f"userfaultfd: {reason}")


@pytest.mark.usefixtures("kvm")
def test_refused_madvise_is_named(suite: Suite) -> None:
    """A refused madvise ends the run with the name of the call and of the seccomp filter."""
    line = suite.nothing_ran(suite(*ONE, limit=limits.refused(SYS_MADVISE)))
    assert "madvise is refused: EPERM, which is the seccomp filter's answer" in line


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


@pytest.mark.parametrize(
    ("where", "tests", "expected"),
    [
        (("kvm_util.vcpu", "Vcpu", "__init__", "mmap.mmap"), ONE, "mmap(struct kvm_run of vCPU 0): EPERM"),
        (
            ("dirty_tracking.ring", "DirtyRing", "of", "mmap.mmap"),
            [*ONE, "--log-mode=dirty-ring"],
            "mmap(dirty ring of 1024 entries): EPERM",
        ),
        (
            ("kvm_util.binary_stats", "BinaryStats", "__init__", "os.pread"),
            ["selftests/unit/test_binary_stats.py", "-k", "test_kvm_page_size"],
            "pread(statistics file, 24 bytes at 0): EPERM",
        ),
    ],
    ids=["kvm_run", "ring", "stats"],
)
@pytest.mark.usefixtures("kvm")
def test_no_filter_excuses_kvm(suite: Suite, where: tuple[str, str, str, str], tests: list[str], expected: str) -> None:
    """EPERM of a call on one of KVM's own files is KVM's, although a seccomp filter refuses other calls."""
    plugin = REFUSING_KVM_PLUGIN.format(**dict(zip(("module", "name", "method", "call"), where, strict=True)))
    assert suite(*tests, limit=limits.refused(arch.SYS_USERFAULTFD), plugin=plugin) == FAILED, suite.output
    assert expected in suite.output


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
            (one, errno.errorcode[code]) for one in numbers for code in codes if filtered_calls.why_refused(one, code)
        }

    def body() -> str:
        before = {one for one in refused() if one[0] != call}  # a container may already have a filter
        limits.refused(numbers[call])()
        return str(refused() - before)

    if os.geteuid():
        pytest.skip("needs root: others may be refused a userfaultfd by the kernel")
    assert in_child(body, tmp_path) == str({(call, "EPERM")})


# --- files that cannot be read or written -----------------------------------------------------------------------------


@pytest.mark.usefixtures("kvm")
def test_hidden_kvm_parameters(suite: Suite, tmp_path: Path) -> None:
    """Without KVM's module parameters no test runs, since backend and expected behaviour are unknown."""
    plugin = f"import kvm_util.host, pathlib\nkvm_util.host._MODULES = pathlib.Path({str(tmp_path / 'module')!r})\n"
    line = suite.nothing_ran(suite(*ONE, plugin=plugin))
    assert (
        f"KVM's parameters, which determine its correct behaviour, are not visible here: {tmp_path}/module has no kvm_*"
        in line
    )


VANISHING_FOLDER_PLUGIN = """
import pathlib
def pytest_runtest_call(item):
    folder = pathlib.Path(item.config.option.results)
    folder.rmdir()
    folder.touch()
"""


@pytest.mark.parametrize(("plugin", "expected"), [("", 0), (LOSING_PLUGIN, FAILED)], ids=["sound", "broken"])
@pytest.mark.usefixtures("kvm")
def test_results_folder_vanishes(suite: Suite, tmp_path: Path, plugin: str, expected: int) -> None:
    """A results folder that vanishes during the run is reported, and does not change the verdict."""
    assert suite(*ONE, plugin=plugin + VANISHING_FOLDER_PLUGIN) == expected, suite.output
    start = f"THE RESULTS ARE NOT KEPT: {tmp_path}/results: "
    assert sum(line.startswith(start) for line in suite.output.splitlines()) == (2 if expected else 1)
    assert ("LOST [R" in suite.output) == bool(expected)


@pytest.mark.parametrize(("plugin", "expected"), [("", 0), (LOSING_PLUGIN, FAILED)], ids=["sound", "broken"])
@pytest.mark.usefixtures("kvm")
def test_junit_file_on_a_full_disk(suite: Suite, plugin: str, expected: int) -> None:
    """A JUnit file that cannot be written is one line, and does not change the verdict."""
    assert suite(*ONE, "--junitxml=/dev/full", plugin=plugin) == expected, suite.output
    (line,) = [line for line in suite.output.splitlines() if line.startswith("THE RESULTS ARE NOT KEPT")]
    assert line == "THE RESULTS ARE NOT KEPT: /dev/full: No space left on device (--junitxml FILE puts them elsewhere)"
    assert "generated xml file" not in suite.output


@pytest.mark.usefixtures("kvm")
def test_file_size_limit_below_results(suite: Suite, tmp_path: Path) -> None:
    """A run is refused if RLIMIT_FSIZE is below the size of the results of a small run."""
    line = suite.refused(suite(*ONE, limit=rlimit(resource.RLIMIT_FSIZE, 100 << 10)))
    limit = "RLIMIT_FSIZE lets a file have 102400 bytes (ulimit -f unlimited)"
    assert line == f"ERROR: --results: {tmp_path}/results: File too large: {limit}"
    assert not (tmp_path / "results").exists()


# --- inherited CPU affinity and signal mask ---------------------------------------------------------------------------


@pytest.mark.parametrize(("plugin", "expected"), [("", 0), (LOSING_PLUGIN, FAILED)], ids=["sound", "broken"])
@pytest.mark.usefixtures("kvm")
def test_one_cpu_for_all_threads(suite: Suite, plugin: str, expected: int) -> None:
    """Two vCPUs and a collector that share a CPU get the same verdict."""
    cpu = min(os.sched_getaffinity(0))
    cells = [*CELL, *SIZES, "--log-mode=dirty-log,clear-log,dirty-ring", "--backing=anonymous", "--vcpus=2"]
    assert suite(*cells, limit=lambda: os.sched_setaffinity(0, {cpu}), plugin=plugin) == expected, suite.output


@pytest.mark.usefixtures("kvm")
def test_signals_blocked_by_the_parent(suite: Suite) -> None:
    """A signal mask inherited from the parent does not keep vCPUs from being kicked."""

    def limit() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    plugin = "import dirty_tracking.writers\ndirty_tracking.writers.HANG_TIMEOUT = 3\n"
    status = suite(*ONE, "--log-mode=dirty-log,dirty-ring", limit=limit, plugin=plugin)
    assert status == 0, suite.output


# --- errors that no limit explains ------------------------------------------------------------------------------------


PLANTED = """
import errno, kvm_util.ioctl, kvm_util.vcpu
from kvm_util import uapi
honest = kvm_util.ioctl.raw_ioctl
def raw_ioctl(fd, request, arg=None):
    return (-1, errno.{code}) if request == uapi.{request} else honest(fd, request, arg)
kvm_util.ioctl.raw_ioctl = kvm_util.vcpu.raw_ioctl = raw_ioctl
"""


NO_FAULT_OF_THE_HOST = pytest.mark.parametrize(
    ("request_", "code"),
    [("KVM_RUN", code) for code in ("EAGAIN", "ENOMEM", "EMFILE")]
    + [("KVM_CREATE_VCPU", "ENOMEM"), ("KVM_CREATE_VCPU", "ENFILE"), ("KVM_GET_DIRTY_LOG", "EAGAIN")],
)


@NO_FAULT_OF_THE_HOST
@pytest.mark.usefixtures("kvm")
def test_error_without_a_limit_fails(suite: Suite, request_: str, code: str) -> None:
    """An ioctl error that no limit explains is a failure."""
    assert suite(*ONE, plugin=PLANTED.format(code=code, request=request_)) == FAILED
    assert f"{request_}(" in suite.output
    assert f": {code} (" in suite.output
    assert "1 cell: 1 FAIL" in suite.output


@NO_FAULT_OF_THE_HOST
@pytest.mark.usefixtures("kvm")
def test_near_limit_explains_nothing(suite: Suite, group: MakeGroup, request_: str, code: str) -> None:
    """A thread limit that is close but not reached does not explain an error."""
    limit = group("pids", "pids.max", "17")
    assert suite(*ONE, limit=limit, plugin=PLANTED.format(code=code, request=request_)) == FAILED, suite.output
    assert "1 cell: 1 FAIL" in suite.output


def test_thread_limit_needs_a_new_thread(suite: Suite, group: MakeGroup, kvm: Kvm) -> None:
    """EAGAIN of an ioctl that starts no thread is a failure even if the thread limit is reached."""
    plugin = PLANTED.format(code="EAGAIN", request="KVM_CREATE_VCPU")
    assert suite(*ONE, limit=group("pids", "pids.max", "1"), plugin=plugin) == FAILED, suite.output
    assert "KVM_CREATE_VCPU(id=0): EAGAIN" in suite.output


def test_memory_left_explains_no_enomem(proc: Callable[..., None]) -> None:
    """ENOMEM is explained only if less memory is left than the call asked for plus what KVM may allocate."""
    proc({"meminfo": MEMINFO.replace("1500000", "13000")})
    assert explain(errno.ENOMEM) is None
    assert explain(errno.ENOMEM, MIB) is not None
    proc({"meminfo": MEMINFO.replace("1500000", "12000")})
    assert explain(errno.ENOMEM) == "the host has 1953 MiB (end other programs)"


def test_one_file_left_explains_no_emfile(tmp_path: Path) -> None:
    """RLIMIT_NOFILE explains EMFILE only if no more file can be opened."""

    def body() -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        number = 0
        while number < 98:
            number = os.open("/", os.O_PATH)
        return f"{number} {explain(errno.EMFILE)} {os.open('/', os.O_PATH)} {explain(errno.EMFILE)}"

    expected = "RLIMIT_NOFILE lets a process have 100 files open (ulimit -n 1024)"
    assert in_child(body, tmp_path) == f"98 None 99 no more files can be opened: {expected}"


@pytest.mark.parametrize(("taken", "explained"), [(2, 1), (0, 0)])
def test_refused_fork_explains_one_error(
    proc: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int, explained: int
) -> None:
    """A fork refused by a control group explains one error, also after other threads have ended."""
    proc({"self/cgroup": "0::/\n", "self/mountinfo": MOUNTS_V2.format(root="/", at=tmp_path / "cgroup")})
    proc({"cgroup/pids.max": "4\n", "cgroup/pids.current": f"{taken}\n", "cgroup/pids.events": "max 7\n"})
    monkeypatch.setattr(host_limits, "_refusals", host_limits._Refusals())
    assert host_limits.why_thread_refused() is None
    proc({"cgroup/pids.events": f"max {7 + explained}\n"})
    found = [host_limits.why_thread_refused() for _ in range(2)]
    assert [one is not None for one in found] == [bool(explained), False]


def test_no_file_left_for_the_device(tmp_path: Path, settings: Settings, kvm: Kvm) -> None:
    """EMFILE when opening /dev/kvm is a limit of the host, not an unavailable KVM."""

    def body() -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        try:
            Kvm(settings.kvm_device)
        except HostLimit as error:
            return str(error)
        return "no error"

    expected = (
        f"{settings.kvm_device} cannot be opened: no more files can be opened: RLIMIT_NOFILE lets a process have 3"
    )
    assert in_child(body, tmp_path).startswith(expected)


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


@pytest.mark.parametrize("verdict", [AssertionError, GuestError, VcpuHang])
def test_limits_never_excuse_findings(verdict: type[Exception]) -> None:
    """A finding about KVM is not excused by a limit that is its cause, its context, or raised after it."""
    error = verdict("lost")
    error.__context__ = HostLimit("no threads")
    assert explain_error(error) is None
    error = verdict("lost")
    error.__cause__ = HostLimit("no threads")
    assert explain_error(error) is None
    limit = HostLimit("no threads")
    limit.__context__ = verdict("lost")
    assert explain_error(limit) is None
    limit.__suppress_context__ = True
    assert explain_error(limit) is None


def test_explanation_follows_causes() -> None:
    """An error is explained by its cause, or by a limit that was being handled unless its context is suppressed."""
    error = ValueError("an empty ring")
    error.__context__ = HostLimit("no threads")
    assert explain_error(error) == "no threads"
    error.__suppress_context__ = True
    assert explain_error(error) is None
    error.__cause__ = HostLimit("no files")
    assert explain_error(error) == "no files"
    error = ValueError("an empty ring")
    error.__context__ = KeyError("another one")
    error.__context__.__context__ = HostLimit("no threads")
    assert explain_error(error) is None
    kvm_error = KvmError(errno.ENOMEM, "KVM_CREATE_VM")
    kvm_error.__context__ = HostLimit("no threads")
    assert explain_error(kvm_error) is None


def test_unexplained_errors() -> None:
    """Errors that no limit explains have no explanation."""
    assert explain_error(RuntimeError("anything")) is None
    assert explain_error(MemoryError("slot 0 has no room")) is None
    assert explain_error(KvmError(errno.ENOMEM, "KVM_CREATE_VM")) is None
    assert explain(errno.EINVAL) is None
