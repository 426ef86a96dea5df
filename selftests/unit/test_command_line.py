# SPDX-License-Identifier: GPL-2.0-only
"""The suite as a user meets it: pytest in a process of its own, its exit status, and what it says."""

import errno
import grp
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from dirty_tracking.modes import RingMode, smallest_ring
from harness.output_paths import check_file, check_folder
from harness.version import suite_version
from kvm_util.ioctl import raw_ioctl
from kvm_util.kvm import Kvm, KvmUnavailable
from runner import ROOT
from selftests.unit.commands import QUICK, Done, start

ONE_CELL = ["--guest-mode=48bit-4k", "--backing=anonymous", "--stop=forced", "--density=sparse", "--vcpus=1"]
MATRIX = "selftests/matrix/test_dirty_log.py"
NO_MATRIX = f"--deselect={MATRIX}"
USAGE_ERROR, NOTHING_RAN = 4, 5


class Suite:
    """Runs the matrix in a process of its own, with results in a folder of the test."""

    def __init__(self, results: Path) -> None:
        self.results = results

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "pytest", MATRIX, f"--results={self.results}", *arguments]

    def __call__(self, *arguments: str, folder: Path = ROOT, **environment: str) -> Done:
        return start(self.command(*arguments), folder, **environment)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path / "results")


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "xdist"])
@pytest.mark.usefixtures("kvm")
def test_sound_run_ends_with_the_table(suite: Suite, workers: list[str]) -> None:
    """A sound run passes, and table and results have a row per cell; the header has the seed."""
    done = suite(*QUICK, *ONE_CELL, "--log-mode=dirty-log,clear-log", "--seed=7", *workers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"\nsuite    {suite_version()}\nkernel   " in done.stdout
    assert "seed     7" in done.stdout
    assert re.search(r"dirty-log .* pass\nclear-log .* pass\n", done.stdout)
    assert "2 cells: 2 pass" in done.stdout
    assert f" on this host: good: 2 passed; files: {suite.results}\n" in done.stdout
    assert re.search(r"dirty-log .* pass\nclear-log .* pass\n", (suite.results / "table.txt").read_text())
    results = json.loads((suite.results / "results.json").read_text())
    assert [cell["verdict"] for cell in results["cells"]] == ["pass", "pass"]
    assert all(cell["writes"] >= 2 * 256 for cell in results["cells"])
    assert results["settings"]["seed"] == 7
    assert results["host"]["kernel"] == os.uname().release
    assert results["suite"] == suite_version()


def test_run_without_a_kvm_device(suite: Suite) -> None:
    """Without the named KVM device each test is skipped with the reason, no module is to be loaded, and it is no success."""
    done = suite(*QUICK, *ONE_CELL, "--kvm-device=/nonexistent")
    assert done.returncode == NOTHING_RAN
    end = r" on this host: cannot be tested: no test ran on KVM: /nonexistent .*; 5 skipped; files: "
    assert re.search(end, done.stdout)
    reason = "/nonexistent does not exist (--kvm-device; KVM's own is /dev/kvm)"
    assert re.search(rf"^ +5 skipped, matrix/test_dirty_log\.py: {re.escape(reason)}", done.stdout, re.MULTILINE)
    assert "modprobe" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations=0"], "--iterations: 0 is out of range, it must be from 1 to 1000000"),
        (["--interval=1e300"], "--interval: 1e300 ms is out of range, it must be above 0 and at most 3600000"),
        (["--vcpus="], "--vcpus: '' is not a whole number"),
        (["--seed="], "--seed: '' is not a whole number"),
        (["--log-mode="], "--log-mode: no such value: ''"),
        (["--test-mem=900G"], "--test-mem: 900 GiB needs"),
        (["--vcpus=0"], "--vcpus: 0 is out of range"),
        (["--phys-offset=0x100000"], "--phys-offset: test memory at 0x100000 runs into the guest's own memory"),
        (["-n", "99999999999"], "-n: 99999999999 is out of range, it must be from 0 to 1024"),
        (["--results=/tmp/x", "--junitxml=/tmp/x/table.txt"], "is what the run's own results are written to (--results)"),
        (["--ring-count=1048576"], "--ring-count: 1048576 is out of range, this KVM takes at most 65536"),
        (["--kvm-device="], "--kvm-device: '' names no device"),
        (["--kernel="], "--kernel: '' names no kernel"),
        (["--kernel=auto", "--qemu="], "--qemu: '' names no program"),
        (["--kernel=debian:6.12", "--kvm-device=/dev/kvm"], "--kvm-device: is this host's KVM, and the tests run in another"),
        (["--kernel=debian:6.12", "--collect-only"], "--collect-only cannot be used where the tests run in another kernel"),
        (["--kernel=debian:6.12", "--lf"], "--lf cannot be used where the tests run in another kernel"),
        *(
            ([option], f"{option.partition('=')[0]}: only for tests in another kernel (--kernel NAME, or make check-kernel)")
            for option in ("--vm-memory=abc", "--vm-cpus=1", "--time-limit=9", "--append=x", "--accel=tcg", "--qemu=x",
                           "--cpu-model=max", "--kvm-params=kvm.tdp_mmu=0")
        ),
        (["--junitxml="], "--junitxml: '' names no file"),
        (["--junitxml=/proc/nope"], "--junitxml: /proc/nope: No such file or directory (--junitxml FILE puts it elsewhere)"),
        (["--log-file=/proc/nope"], "--log-file: /proc/nope: No such file or directory"),
        (["--results="], "--results: '' names no folder"),
        (["--results=/proc/nope"], "--results: /proc/nope: No such file or directory (--results DIR puts the "),
        (["--results=/etc/passwd/x"], "--results: /etc/passwd/x: Not a directory"),
        (["--results=/sys/kernel"], "--results: /sys/kernel: Permission denied"),
        (["--results=/dev/full"], "--results: /dev/full: Not a directory"),
    ],
    ids=lambda value: value[0].split("=")[0].strip("-") if isinstance(value, list) else "",
)  # fmt: skip
@pytest.mark.usefixtures("kvm")
def test_bad_input_is_a_usage_error(suite: Suite, arguments: list[str], message: str) -> None:
    """Bad input is a usage error of one line that names the option and what is wrong."""
    done = suite(*arguments)
    assert done.returncode == USAGE_ERROR
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert message in line


def test_facts_of_a_booted_kernel(suite: Suite) -> None:
    """Options that only the runner of a booted kernel may set are refused: they allow tests that may harm a host."""
    options = ("--emulated", "--report-to=/dev/null", "--repeat-with=x")
    assert f"unrecognized arguments: {' '.join(options)}" in suite(*options, "--collect-only").stderr


@pytest.mark.parametrize("option", ["--help", "--markers", "--fixtures", "--cache-show"])
def test_options_that_only_show(suite: Suite, option: str) -> None:
    """Options that only show something exit with 0, and are refused together with --kernel."""
    done = suite(option)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "INTERNALERROR" not in done.stdout
    if option != "--help":
        done = suite(option, "--kernel=debian:6.12")
        assert done.returncode == USAGE_ERROR
        assert "an option that only shows something tests no kernel: leave out --kernel" in done.stderr


@pytest.mark.usefixtures("kvm")
def test_path_as_a_separate_argument(suite: Suite, tmp_path: Path) -> None:
    """A path in an argument of its own, as in `--results DIR`, does not change where pytest looks for settings."""
    folder = tmp_path / "there already"
    folder.mkdir()
    command = [sys.executable, "-m", "runner.suite_pytest", "-o", f"testpaths={MATRIX}", *QUICK, *ONE_CELL]
    done = start([*command, "--log-mode=dirty-log", "--kvm-device", "/dev/kvm", "--results", str(folder)], ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "results.json").exists()


@pytest.mark.parametrize("closed", [1, 2])
def test_closed_output_streams(closed: int) -> None:
    """A closed stdout or stderr does not change the exit status."""
    command = [sys.executable, "-m", "runner.suite_pytest", MATRIX, "-k", "nothing_like"]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=lambda: os.close(closed), check=False)
    assert done.returncode == USAGE_ERROR


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_file_that_cannot_be_imported(suite: Suite, tmp_path: Path, workers: str) -> None:
    """A test file that cannot be imported makes the run one without a verdict, whatever passed in other files."""
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    options = [*QUICK, *ONE_CELL, "--log-mode=dirty-log", "--continue-on-collection-errors"]
    done = suite(str(tmp_path / "test_broken.py"), *options, workers)
    assert done.returncode == 1
    assert ": 1 file of tests could not be collected; 1 passed: no verdict; files: " in done.stdout


@pytest.mark.parametrize("more", [[], ["-n2"], ["--collect-only"]], ids=["alone", "xdist", "collect-only"])
def test_selection_that_matches_nothing(suite: Suite, more: list[str]) -> None:
    """If no test matches, the run says which selection that was, and nothing about KVM."""
    done = suite("-k", "nothing_like", *more)
    assert done.returncode == USAGE_ERROR, done.stdout
    assert f"\nno test matches -k 'nothing_like' in {MATRIX}\n" in done.stdout
    assert "no test ran on KVM" not in done.stdout


def test_unused_options_of_the_machine(suite: Suite) -> None:
    """If the tests run on this host, the header lists the machine's options that are not used."""
    done = suite("--kernel=auto", "--vm-memory=300", "--qemu=/nonexistent", "--collect-only", "--kvm-device=/dev/kvm")
    if "KVM cannot be used on this host" in done.stderr:
        pytest.skip("this host has no KVM")
    assert done.returncode == 0, done.stdout
    assert "\nnot used --qemu, --vm-memory: the tests run on this host\n" in done.stdout


def test_no_needless_boot(suite: Suite) -> None:
    """With --kernel auto no kernel is booted if all selected tests run on the host, even without KVM."""
    tests = ["selftests/unit/test_selection.py", "-k", "test_sizes_with_units"]
    done = suite(*tests, "--kernel=auto", "--kvm-device=/nonexistent")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "machine  " not in done.stdout
    assert " passed, " in done.stdout


def test_remedy_for_missing_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """If /dev/kvm does not exist, the error names the modules to load."""
    monkeypatch.setattr(os, "open", Mock(side_effect=FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))))
    with pytest.raises(KvmUnavailable, match=r"^/dev/kvm does not exist: load KVM \(modprobe kvm_intel or modprobe"):
        Kvm()


def test_no_folder_without_results(suite: Suite, tmp_path: Path) -> None:
    """A run without results removes the folders that it made for them, and no others."""
    (tmp_path / "there").mkdir()
    options = [f"--results={tmp_path}/there/made/results", f"--junitxml={tmp_path}/junit/x.xml"]
    done = suite(NO_MATRIX, "selftests/unit/test_uapi.py", *options)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "junit/x.xml").exists()
    assert not list((tmp_path / "there").iterdir())
    assert suite("--collect-only", "--results=/proc/nope").returncode == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A disk error that shows only at fsync() is found before the run, and the probe leaves no file."""
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(code, os.strerror(code))))
    with pytest.raises(pytest.UsageError, match=f"^--results: {tmp_path}/a/b: {os.strerror(code)} "):
        check_folder("--results", tmp_path / "a/b")
    with pytest.raises(pytest.UsageError, match=f"^--junitxml: {tmp_path}/a/x.xml: {os.strerror(code)} "):
        check_file("--junitxml", tmp_path / "a/x.xml")
    assert not list(tmp_path.iterdir())


def test_existing_files_are_kept(tmp_path: Path) -> None:
    """Checking whether a file can be written does not change it."""
    (tmp_path / "x.xml").write_text("before")
    check_file("--junitxml", tmp_path / "x.xml")
    check_folder("--results", tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_last_failed_tests_run_again(suite: Suite, tmp_path: Path) -> None:
    """--lf runs what failed, and pytest's cache is not in the checkout's top folder."""
    options = [
        *QUICK,
        *ONE_CELL,
        "--log-mode=dirty-log",
        "--kvm-device=/nonexistent",
        "--require-kvm",
        "-p",
        "no:xdist",
    ]
    options += ["selftests/unit/test_uapi.py", "-o", f"cache_dir={tmp_path}/cache"]
    assert re.search(r"=== \d+ passed, .*1 error in ", suite(*options).stdout)
    assert re.search(r"=== 1 error in ", suite(*options, "--lf").stdout)
    assert not (ROOT / ".pytest_cache").exists()


def test_ring_too_small_for_this_kvm(suite: Suite, kvm: Kvm) -> None:
    """A ring below this KVM's minimum is a usage error that names the minimum, and a ring of that size works."""
    if reason := RingMode.supported(kvm):
        pytest.skip(reason)
    least = smallest_ring(kvm)
    done = suite(f"--ring-count={least // 2}")
    assert done.returncode == USAGE_ERROR
    assert f"{least // 2} is out of range, this KVM takes at least {least}" in done.stderr
    done = suite(*QUICK[:-1], *ONE_CELL, "--log-mode=dirty-ring", f"--ring-count={least}")
    assert done.returncode == 0, done.stdout


FAULTY_PLUGIN = """
from kvm_util.vm import Vm
get_dirty_log = Vm.get_dirty_log
def falsified(vm, slot, bitmap):
    get_dirty_log(vm, slot, bitmap)
    if any(bitmap):
        word = next(i for i in range(0, len(bitmap), 8) if any(bitmap[i:i + 8]))
        bitmap[word:word + 8] = bytes(8)
Vm.get_dirty_log = falsified
"""


@pytest.mark.usefixtures("kvm")
def test_failure_report_and_its_command(suite: Suite, tmp_path: Path) -> None:
    """A failure has environment, cell, seed, page history and map, in text and JSON, and its command reproduces it."""
    (tmp_path / "faulty.py").write_text(FAULTY_PLUGIN)
    path = f"{tmp_path}:{ROOT / 'lib'}"
    options = ["--no-known-bugs", "--require-kvm", "--thorough"]
    done = suite(*QUICK, *ONE_CELL, *options, "--log-mode=dirty-log", "-p", "faulty", "-n2", PYTHONPATH=path)
    assert done.returncode == 1, done.stdout + done.stderr
    for expected in (
        f"kernel   {os.uname().release}", "backend  kvm_", "cpu      ", "cell     log_mode dirty-log, guest_mode 48bit-4k",
        "seed     ", "iteration 1, collection", "LOST [R1]", "last written by write", "slot map",
        "1 cell: 1 FAIL",
    ):  # fmt: skip
        assert expected in done.stdout
    (file,) = suite.results.glob("test_dirty_log*.json")
    data = json.loads(file.read_text())
    assert {"host", "cell", "settings", "reproduce", "findings", "history", "map"} <= set(data)
    assert data["findings"][0]["kind"] == "LOST"
    assert set(options) <= {*data["reproduce"].split()}
    again = start(["sh", "-c", f"{data['reproduce']} -p faulty --results={suite.results}"], ROOT, PYTHONPATH=path)
    assert again.returncode == 1, again.stdout + again.stderr
    assert "1 cell: 1 FAIL" in again.stdout


@pytest.mark.parametrize(
    ("group", "mode", "remedy"),
    [
        (107, 0o660, r"join its group \(sudo usermod -aG 107 \$USER, then log in again\)"),
        (107, 0o600, r"it is group 107's with mode rw------- \(be root, or: sudo chgrp kvm "),
        (0, 0o660, r"it is group root's with mode rw-rw---- \(be root, or: sudo chgrp kvm "),
        (0, 0o600, r"it is group root's with mode rw------- .*, or, without it, make check-kernel KERNEL=debian:6.12"),
    ],
    ids=["of-a-group", "of-its-owner-alone", "of-roots-group", "of-root-alone"],
)
def test_device_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int, mode: int, remedy: str
) -> None:
    """If the device may not be opened, the remedy is its group only if that is not root and may use the device."""
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0)
    tmp_path.chmod(0o755)
    root = os.geteuid() == 0
    if root:  # root may open anything: be nobody for a moment
        for folder in list(tmp_path.parents)[:2]:
            folder.chmod(0o755)
        os.seteuid(65534)
    try:
        with (
            pytest.raises(KvmUnavailable, match=f"may not be opened by this user: {remedy}"),
            monkeypatch.context() as patch,
        ):
            patch.setattr(os, "stat", lambda _: SimpleNamespace(st_gid=group, st_mode=stat.S_IFREG | mode))
            patch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name="root" if gid == 0 else str(gid)))
            Kvm(str(device))
    finally:
        if root:
            os.seteuid(0)


def test_device_that_is_not_kvm() -> None:
    """A device that does not answer KVM_GET_API_VERSION is an error that names it."""
    with pytest.raises(KvmUnavailable, match="/dev/null does not answer KVM_GET_API_VERSION"):
        Kvm("/dev/null")


@pytest.mark.usefixtures("kvm")
def test_unknown_kvm_api_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown KVM API version is an error that has both versions."""
    monkeypatch.setattr("kvm_util.kvm.raw_ioctl", lambda fd, request: (raw_ioctl(fd, request)[0] + 1, 0))
    with pytest.raises(KvmUnavailable, match="/dev/kvm speaks KVM API version 13, this suite 12"):
        Kvm()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the checkout, without the list of known bugs and what was built."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("conftest.py", "pytest.ini", "pyproject.toml", "guest_code", "selftests"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("lib", "runner"):  # not links: modules find the checkout through their own path
        shutil.copytree(ROOT / name, folder / name)
    return folder


def test_missing_assembler(suite: Suite, copy: Path) -> None:
    """If guest code has to be assembled and ``as`` is missing, the error names the package to install."""
    (copy / "known_bugs.toml").symlink_to(ROOT / "known_bugs.toml")
    done = suite(*QUICK, folder=copy, PATH=str(copy))
    assert done.returncode == USAGE_ERROR
    assert "no as on this machine: install binutils (apt install binutils, or gcc)" in done.stderr


BROKEN = "[[bug]]\n"


@pytest.mark.parametrize(
    ("text", "options"),
    [(None, []), (BROKEN, []), (BROKEN, ["--kernel=debian:0.1"]), (BROKEN, ["-n1"])],
    ids=["missing", "broken", "in-a-kernel", "xdist"],
)
def test_broken_list_stops_the_run(suite: Suite, copy: Path, text: str | None, options: list[str]) -> None:
    """A broken list of known bugs is one line and a usage error, before a kernel is looked for."""
    (copy / "build").symlink_to(ROOT / "build")
    if text is not None:
        (copy / "known_bugs.toml").write_text(text)
    done = suite("--collect-only", *options, folder=copy)
    assert done.returncode == USAGE_ERROR, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    missing = "bug 1 of the list: findings: it is missing, or has no kind" if text else "No such file or directory"
    assert line.startswith("ERROR: known_bugs.toml:")
    assert line.endswith(missing)
