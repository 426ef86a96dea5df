# SPDX-License-Identifier: GPL-2.0-only
"""check_kernel.py as users run it, with good, broken and unusable kernels."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dirty_tracking.modes import LOG_MODES
from runner import ROOT
from runner.guest_init import INIT_MARKER
from runner.kernel import Kernel

pytestmark = [pytest.mark.boots, pytest.mark.slow]

GOOD, BAD, CANNOT_TEST, NOT_LIKE_THIS, INTERRUPTED = 0, 1, 125, 128, 130
BREAKING = "selftests/unit/boot/broken_kernel.py"
UNFLUSHED = "selftests/unit/boot/unflushed_kernel.py"
PLANTED = "selftests/unit/mutants/planted.py::test_planted[page-added]"
ONE_CELL = [
    *("selftests/matrix/test_dirty_log.py", "--log-mode=dirty-ring", "--guest-mode=48bit-4k", "--backing=anonymous"),
    *("--stop=forced", "--density=sparse", "--vcpus=1"),
]


@dataclass(frozen=True)
class Checked:
    """A finished run of check_kernel.py."""

    status: int
    output: str
    results: Path

    @property
    def data(self) -> Any:
        return json.loads((self.results / "results.json").read_text())

    @property
    def verdicts(self) -> dict[str, list[str]]:
        """The names of the tests that passed, and that have a failure, an error or a skip."""
        verdicts: dict[str, list[str]] = {"passed": [], "failure": [], "error": [], "skipped": []}
        for case in cases_of(self.results):
            found = [child.tag for child in case if child.tag in verdicts]
            verdicts[found[0] if found else "passed"].append(case.attrib["name"])
        return verdicts


def cases_of(results: Path) -> list[ElementTree.Element]:
    """The test cases in a run's junit.xml."""
    return list(ElementTree.parse(results / "junit.xml").getroot().iter("testcase"))


class CheckKernel:
    """Runs check_kernel.py in a process, with its results in a folder of the test."""

    def __init__(self, results: Path) -> None:
        self.results = results

    def __call__(self, kernel: str | Path, *arguments: str, before: tuple[str, ...] = ()) -> Checked:
        """Run it to its end; *before* is a program that runs it, and that program's arguments."""
        command = [*before, *self._command(kernel, *arguments)]
        done = subprocess.run(command, cwd=self.results.parent, capture_output=True, text=True, check=False)
        return Checked(done.returncode, done.stdout + done.stderr, self.results)

    @contextmanager
    def started(self, kernel: str | Path, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
        """Start check_kernel.py, and kill it at the end."""
        process = subprocess.Popen(
            self._command(kernel, *arguments), cwd=self.results.parent, stdout=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have it ignored in the background
        )  # fmt: skip
        with process:
            yield process

    def _command(self, kernel: str | Path, *arguments: str) -> list[str]:
        program = str(ROOT / "runner/check_kernel.py")
        return [sys.executable, program, str(kernel), f"--results={self.results}", "--accel=tcg", *arguments]


@pytest.fixture
def check_kernel(tmp_path: Path) -> CheckKernel:
    return CheckKernel(tmp_path / "results")


def test_good_kernel_and_its_files(check_kernel: CheckKernel, kernel: Kernel) -> None:
    """A kernel that passes is good with status 0; the table says where it ran, the files have the parameters and figures."""
    done = check_kernel(kernel.image, *ONE_CELL, "--kvm-params=kvm_amd.npt=0", "--gcov")
    assert done.status == GOOD, done.output
    assert "--gcov: this kernel has no /sys/kernel/debug/gcov (CONFIG_GCOV_KERNEL" in done.output
    assert f"kernel {kernel.release}, kvm_amd: emulated by QEMU" in done.output
    release = re.escape(kernel.release)
    assert re.search(rf"^booting Linux {release} in QEMU [\d.]+ \(emulated\)$", done.output, re.M)
    assert re.search(rf"^{release}, kvm_amd in QEMU \S+ \(emulated\): good: 1 passed; ", done.output, re.M)
    assert "1 cell: 1 pass" in done.output
    sizes = "32 MiB of test memory (--test-mem), 6 iterations (--iterations), rings of 4096 entries"
    assert sizes in " ".join(done.output.split())
    data = done.data
    assert data["host"]["kernel"] == kernel.release
    assert data["host"]["parameters"]["kvm_amd.npt"] == "N"
    assert data["host"]["parameters"]["kvm.force_emulation_prefix"] == "1"  # the suite adds it
    assert data["machine"]["emulated"] is True
    assert data["end"]["ending"] == "FINISHED"
    assert [cell["verdict"] for cell in data["cells"]] == ["pass"]
    assert data["cells"][0]["writes"] >= 6 * 256
    assert "Linux version" in (done.results / "kernel.log").read_text()
    assert (done.results / "console.log").exists()
    (name,) = done.verdicts["passed"]
    assert "dirty-ring-48bit-4k" in name
    assert not list(done.results.glob("*.cpio"))
    assert "\x1b" not in done.output


@pytest.mark.parametrize(
    "here", [[], ["selftests/unit/test_uapi.py", "-n2"]], ids=["alone", "beside-tests-of-the-host"]
)
@pytest.mark.usefixtures("kernel")
def test_auto_kernel_without_kvm(tmp_path: Path, here: list[str]) -> None:
    """With --kernel auto and no usable KVM, the KVM tests run in a booted kernel, the suite's own tests on the host."""
    options = ["--kernel=auto", "--kvm-device=/nonexistent", "--accel=tcg", f"--results={tmp_path}", "-v"]
    command = [sys.executable, "-m", "pytest", *ONE_CELL, *here, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == GOOD, done.stdout + done.stderr
    assert "KVM cannot be used on this host (/nonexistent does not exist" in done.stderr
    assert "kvm_amd: emulated by QEMU" in done.stdout
    assert "1 cell: 1 pass" in done.stdout
    files = {case.attrib["classname"] for case in cases_of(tmp_path)}
    assert files == {"selftests.matrix.test_dirty_log", *(["selftests.unit.test_uapi"] if here else [])}


@pytest.mark.parametrize(
    ("how", "ending", "text"),
    [
        ("panic", "PANIC", "the kernel panicked: Kernel panic - not syncing: sysrq triggered crash"),
        ("oops", "OOPS", "the kernel oopsed: Oops: invalid opcode"),
        ("hang", "HANG", "the kernel hung: no message for 60 s (--time-limit)"),
        ("killed", "SUITE_DIED", "the suite died in the kernel"),
        (
            "ends_all",
            "SUITE_DIED",
            "the suite died in the kernel: pytest ended with status 0, with 2 tests left to run",
        ),
    ],
)
def test_dead_kernel_is_bad(check_kernel: CheckKernel, kernel: Kernel, how: str, ending: str, text: str) -> None:
    """A kernel or a suite that ends early has a name, fails the running test, and keeps the results before it."""
    done = check_kernel(kernel.image, BREAKING, "-k", f"test_before or test_{how} or test_after", "--time-limit=60")
    assert done.status == BAD, done.output
    assert f"KERNEL {kernel.release}: {text}" in done.output
    assert "test_before PASSED" in done.output
    assert f"test_{how} FAILED" in done.output
    assert f"broken_kernel.py: {text.partition(':')[0]}" in done.output
    assert done.data["end"]["ending"] == ending
    assert done.data["end"]["console"]
    expected = {"passed": ["test_before"], "failure": [f"test_{how}"], "error": [], "skipped": ["test_after"]}
    assert done.verdicts == expected
    assert (done.results / "kernel.log").stat().st_size > 1000


def test_one_of_two_machines_dies(check_kernel: CheckKernel, kernel: Kernel) -> None:
    """The test that ran in a kernel that panics fails; another machine runs the others, and the verdict is bad."""
    others = "selftests/interface/test_get_and_clear.py"
    done = check_kernel(kernel.image, f"{BREAKING}::test_panic", others, "--machines=2", "--kvm-params=kvm_amd.npt=1")
    assert done.status == BAD, done.output
    assert done.verdicts["failure"] == ["test_panic"]
    assert len(done.verdicts["passed"]) > 40
    log = r"\(kernel(-2)?\.log\)"
    assert re.search(rf"^KERNEL {re.escape(kernel.release)} {log}: the kernel panicked: ", done.output, re.M)
    assert done.data["end"]["ending"] == "PANIC"
    files = {path.name for path in done.results.iterdir()}
    assert {"console.log", "console-2.log", "kernel.log", "kernel-2.log"} <= files


def test_warn_fails_the_running_test(check_kernel: CheckKernel, kernel: Kernel) -> None:
    """A WARN() of the kernel fails the test during which it came, and no other, and the kernel is bad."""
    done = check_kernel(kernel.image, BREAKING, "-k", "test_before or test_warn or test_after")
    assert done.status == BAD, done.output
    assert "1 failed, 2 passed" in done.output
    assert f"WARN, while {BREAKING}::test_warn ran:\n  WARNING: CPU: " in done.output
    (report,) = done.data["kernel_log"]
    assert report["kind"] == "WARN"
    assert report["tests"] == [f"{BREAKING}::test_warn"]
    assert "svm_init" in report["title"]


@pytest.mark.mutants
def test_planted_fault_in_booted_kernel(check_kernel: CheckKernel, kernel: Kernel) -> None:
    """Tests that only such a kernel can run fail under a planted fault: SMM, huge pages, nested guests, KVM's emulator, AVX.

    test_kill_matrix.py has the tests that this host's KVM can run.
    """
    statistics = "selftests/unit/mutants/test_write_protection_can_fail.py::test_falsified_statistics"
    done = check_kernel(
        kernel.image, statistics, PLANTED, "selftests/x86_64", "selftests/memory/test_huge_pages.py",
        "selftests/memory/test_huge_page_parameters.py", "selftests/memory/test_host_memory.py",
        "selftests/memory/test_writes.py", "selftests/memory/test_stale_translations.py",
        "selftests/memory/test_prefault.py",
        "--no-known-bugs", "--tb=no", "-k", "not plain and not dirty-log and not clear-log-unset",  # a ring, and a bitmap
        "--kvm-params=kvm_amd.npt=1", "--machines=1",  # the one with the fault
        "--append=tsc=reliable clocksource=tsc",  # for KVM_HC_CLOCK_PAIRING
    )  # fmt: skip
    assert done.status == BAD, done.output
    verdicts = done.verdicts
    assert {name.partition("[")[0] for name in verdicts["passed"]} == {"test_falsified_statistics", "test_planted"}
    assert len(verdicts["failure"]) > 150
    assert not verdicts["error"]


@pytest.mark.mutants
def test_missing_tlb_flush_is_found(check_kernel: CheckKernel, kernel: Kernel) -> None:
    """A KVM that flushes no remote TLBs fails test_stale_translations in each log mode, with small pages and huge ones."""
    done = check_kernel(
        kernel.image, UNFLUSHED, "selftests/memory/test_stale_translations.py", "--tb=no", "--kvm-params=kvm_amd.npt=1",
        "--machines=1",  # the one without TLB flushes
        "--thorough",  # an interrupt on the vCPU's CPU flushes too: on a busy host now and then in all of a few turns
    )  # fmt: skip
    assert done.status == BAD, done.output
    assert done.verdicts["passed"] == ["test_disable_tlb_flushes"]
    assert len(done.verdicts["failure"]) == 2 * 2 * len(LOG_MODES)


def test_lost_page_is_bad(check_kernel: CheckKernel, kernel: Kernel) -> None:
    """A failing test in the kernel makes it bad; its report, its file and the command to reproduce it are there."""
    done = check_kernel(kernel.image, f"{BREAKING}::test_lost", "--seed=7", "--kvm-params=kvm_amd.npt=0")
    assert done.status == BAD, done.output
    assert "LOST [R" in done.output
    machine = f"--kernel={kernel.image} --kvm-params=kvm_amd.npt=0 --accel=tcg --vm-cpus=2"
    assert f"-m pytest {machine} {BREAKING}::test_lost --seed=7" in done.output
    (file,) = done.results.glob("*-test_lost.json")
    assert json.loads(file.read_text())["findings"][0]["kind"] == "LOST"
    assert done.data["end"]["ending"] == "FINISHED"


@pytest.mark.parametrize("failure", [False, True], ids=["alone", "after-a-failure"])
def test_emulator_fault_is_no_bug(check_kernel: CheckKernel, kernel: Kernel, failure: bool) -> None:
    """The remaining tests run in another boot after an emulator fault; the third ends the run, and a failure stays one."""
    selected = f"test_before or test_int3 or {'test_fails or' if failure else ''} test_after"
    done = check_kernel(kernel.image, BREAKING, "-k", selected)
    assert done.status == (BAD if failure else CANNOT_TEST), done.output
    assert done.output.count("EMULATOR FAULT: Oops: int3") == 3
    assert done.output.count("the remaining tests run in another boot") == 2
    assert done.output.count("test_before PASSED") == 1
    assert (done.results / "console-3.log").exists()


@pytest.mark.parametrize(
    ("number", "text"),
    [(signal.SIGKILL, "signal SIGKILL"), (signal.SIGTERM, "status 0: qemu-system-x86_64: terminating on signal 15")],
)
def test_killed_qemu_is_no_bug(check_kernel: CheckKernel, kernel: Kernel, number: int, text: str) -> None:
    """A QEMU that the host kills says nothing about the kernel, which cannot be tested."""
    with check_kernel.started(kernel.image, f"{BREAKING}::test_hang") as process:
        wait_until_booted(check_kernel.results)
        for child in children_of(process.pid):
            os.kill(child, number)
        output = process.stdout.read() if process.stdout else ""
    assert process.returncode == CANNOT_TEST, output
    assert f"it cannot be tested: QEMU ended with {text}" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_cleans_up(check_kernel: CheckKernel, kernel: Kernel, number: int) -> None:
    """An interrupted run leaves no QEMU and no initramfs, and writes its logs and which tests did not run."""
    with check_kernel.started(kernel.image, f"{BREAKING}::test_hang") as process:
        wait_until_booted(check_kernel.results)
        children = children_of(process.pid)
        assert children
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED
    assert "no test ran on KVM" not in output
    assert f"; files: {check_kernel.results}" in output
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not list(check_kernel.results.glob("*.cpio"))
    assert (check_kernel.results / "kernel.log").exists()


def wait_until_booted(results: Path) -> None:
    console = results / "console.log"
    deadline = time.monotonic() + 300
    while not (console.exists() and INIT_MARKER in console.read_text(errors="replace")):
        assert time.monotonic() < deadline, "the kernel did not come up"
        time.sleep(0.1)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_no_kvm_test_is_no_verdict(check_kernel: CheckKernel, kernel: Kernel) -> None:
    """A kernel in which no test on KVM ran cannot be tested; a results file that cannot be written does not change that."""
    done = check_kernel(kernel.image, BREAKING, "-k", "test_before", "--junitxml=/dev/full", "-n2")
    assert done.status == CANNOT_TEST, done.output
    assert ": cannot be tested: no test ran on KVM: none that was selected needs it; 1 passed" in done.output
    assert "THE RESULTS ARE NOT KEPT: /dev/full: No space left on device" in done.output
    assert "-n is not used: one process runs the tests in the kernel" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("option", "ending", "text"),
    [
        ("--append=rdinit=/nonexistent", "NO_BOOT", "does not boot: Kernel panic - not syncing: VFS: Unable to mount"),
        ("--time-limit=1", "NO_BOOT", "the kernel does not boot: no message for 1 s (--time-limit)"),
        (
            "--append=module_blacklist=kvm_amd",
            "NO_KVM",
            "module kvm_amd.ko does not load here: Operation not permitted",
        ),
        ("--kvm-params=kvm_amd.npt=0 kvm.tdp_mmu=1", "NO_KVM", "kvm.tdp_mmu=1 did not take effect: it is N"),
        ("--vm-cpus=9999", "NOT_TESTED", "QEMU ended with status 1: qemu-system-x86_64: Invalid SMP CPUs 10000"),
    ],
    ids=["panic", "hang", "module-refused", "parameter-ignored", "qemu"],
)
def test_kernel_that_cannot_be_tested(
    check_kernel: CheckKernel, kernel: Kernel, option: str, ending: str, text: str
) -> None:
    """A kernel that does not boot, or has no KVM as it is wanted, cannot be tested."""
    done = check_kernel(kernel.image, f"{BREAKING}::test_lost", option)
    assert done.status == CANNOT_TEST, done.output
    assert f"KERNEL {kernel.release}: " in done.output
    assert text in done.output
    assert "no test ran on KVM" not in done.output
    assert done.data["end"]["ending"] == ending


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--log-mode=dirty"], "--log-mode: no such value: 'dirty'"),
        (["--iterations=0"], "--iterations: 0 is out of range, it must be from 1 to 1000000"),
        (["--test-mem=4G"], "--test-mem: 4 GiB needs 4304 MiB of memory, but the machine has 3072 MiB"),
        (["--vm-memory=100"], "--vm-memory: 100 is out of range, it must be at least 256"),
        (["--time-limit=x"], "--time-limit: 'x' is not a whole number"),
        (["--kvm-params=npt"], "--kvm-params: 'npt' is no parameter: write it as module.parameter=value"),
        (["--kvm-device=/dev/null"], "--kvm-device: is this host's KVM"),
        (["--results="], "--results: '' names no folder"),
        (["--results", ""], "--results: '' names no folder"),
        (["--junitxml", "/proc/x"], "--junitxml: /proc/x: No such file or directory"),
        (["--log-file=/proc/x"], "--log-file: /proc/x: No such file or directory"),
        (["--debug=/proc/x"], "pytest: [Errno 2] No such file or directory: '/proc/x'"),
        (["--maxfail=x"], "--maxfail: invalid int value: 'x'"),
        (["--lf"], "--lf cannot be used where the tests run in another kernel (--kernel)"),
        (["-k", "a and"], "Wrong expression passed to '-k': a and"),
        (["-m", "a and"], "Wrong expression passed to '-m': a and"),
        (["-k", "nothing_like"], "no test matches -k 'nothing_like' in selftests"),
        (["-m", "kvm and slow and boots"], "no test matches -m 'kvm and slow and boots' in selftests"),
        (["selftests/nope.py"], "file or directory not found: selftests/nope.py"),
        (["selftests/interface/test_slots.py::test_nope"], "not found: selftests/interface/test_slots.py::test_nope"),
    ],
    ids=lambda value: " ".join(value).replace("/", "-") if isinstance(value, list) else "",
)
def test_usage_error_ends_a_bisection(check_kernel: CheckKernel, arguments: list[str], message: str) -> None:
    """A wrong option or test is one line, before the kernel (here a missing one) is looked for, and status 128."""
    done = check_kernel("/nonexistent/bzImage", *arguments)
    assert done.status == NOT_LIKE_THIS, done.output
    assert sum(message in line for line in done.output.splitlines()) == 1
    assert "Traceback" not in done.output
    assert "no kernel" not in done.output


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--cpu-model=max,-svm", "this CPU model cannot run guests: it has no SVM"),
        ("--cpu-model=z80", "unable to find CPU model 'z80'"),
        ("--kvm-params=kvm.tdp_mu=0", "kvm has no parameter tdp_mu (did you mean tdp_mmu?)"),
        ("--kvm-params=kvm_amdd.npt=0", "no such module is loaded"),
        ("--vm-memory=9000000", "--vm-memory: 9000000 MiB are not there, the host or its control group has "),
    ],
)
def test_refused_machine(check_kernel: CheckKernel, kernel: Kernel, option: str, message: str) -> None:
    """A machine or a parameter that cannot be had is one line, before the kernel is booted."""
    assert message in one_line(check_kernel(kernel.image, option))


@pytest.mark.usefixtures("kernel")
def test_refused_kernel(check_kernel: CheckKernel) -> None:
    """A kernel that is not there is one line."""
    assert "neither a file or folder, nor an installed release" in one_line(check_kernel("/nonexistent/bzImage"))


def one_line(done: Checked) -> str:
    assert done.status == CANNOT_TEST, done.output
    (line,) = done.output.strip().splitlines()
    return line


def test_no_space_for_the_initramfs(check_kernel: CheckKernel, kernel: Kernel) -> None:
    """An initramfs that cannot be written, as on a full disk, means "cannot be tested"."""
    done = check_kernel(kernel.image, *ONE_CELL, before=("prlimit", f"--fsize={1 << 20}"))
    assert done.status == CANNOT_TEST
    assert f"it cannot be tested: the initramfs cannot be made: {done.results}: File too large" in done.output
    assert "Traceback" not in done.output
