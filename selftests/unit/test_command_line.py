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

import pytest

from dirty_tracking.modes import RingMode, smallest_ring
from harness.output_paths import OutputError, check_file, check_folder
from kvm_util.ioctl import raw_ioctl
from kvm_util.kvm import Kvm, KvmUnavailable
from runner import ROOT

QUICK = ["--test-mem=4M", "--iterations=2", "--interval=1", "--ring-count=1024"]
ONE_CELL = ["--guest-mode=48bit-4k", "--backing=anonymous", "--stop=forced", "--density=sparse", "--vcpus=1"]
USAGE_ERROR, NOTHING_RAN = 4, 5


class Suite:
    """Runs the matrix in a process of its own, with results in a folder of the test."""

    def __init__(self, results: Path) -> None:
        self.results = results

    def command(self, *arguments: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "pytest",
            "selftests/matrix/test_dirty_log.py",
            f"--results={self.results}",
            *arguments,
        ]

    def __call__(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(self.command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path / "results")


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "xdist"])
@pytest.mark.usefixtures("kvm")
def test_a_sound_run_is_green_and_ends_with_the_table(suite: Suite, workers: list[str]) -> None:
    """One row per cell in the order of the plan, the same figures in the results file, and the seed in the header."""
    done = suite(*QUICK, *ONE_CELL, "--log-mode=dirty-log,clear-log", "--seed=7", *workers)
    assert done.returncode == 0, done.stdout + done.stderr
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


def test_without_kvm_nothing_is_green(suite: Suite) -> None:
    """A device that is not there: every cell says why and what to do, and the run is no success."""
    done = suite(*QUICK, *ONE_CELL, "--kvm-device=/nonexistent")
    assert done.returncode == NOTHING_RAN
    assert re.search(
        r" on this host: cannot be tested: no test ran on KVM: /nonexistent .*; 5 skipped; files: ", done.stdout
    )
    assert "/nonexistent does not exist (--kvm-device; KVM's own is /dev/kvm)" in done.stdout
    assert re.search(r"^ +5 skipped, matrix/test_dirty_log\.py: /nonexistent does not exist", done.stdout, re.MULTILINE)


def test_require_kvm_turns_skips_into_failures(suite: Suite) -> None:
    done = suite(*QUICK, *ONE_CELL, "--kvm-device=/nonexistent", "--require-kvm", "--log-mode=dirty-log")
    assert done.returncode == 1
    assert "required by --require-kvm: /nonexistent does not exist" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ring-count=1000"], "--ring-count: 1000 is not a power of two"),
        (["--iterations=0"], "--iterations: 0 is out of range, it must be from 1 to 1000000"),
        (["--iterations=99999999999999999999"], "is out of range, it must be from 1 to 1000000"),
        (["--interval=1e300"], "--interval: 1e300 ms is out of range, it must be above 0 and at most 3600000"),
        (["--vcpus="], "--vcpus: '' is not a whole number"),
        (["--seed="], "--seed: '' is not a whole number"),
        (["--log-mode="], "--log-mode: no such value: ''"),
        (["--interval=-1"], "--interval: -1 ms is out of range"),
        (["--log-mode=dirty"], "--log-mode: no such value: 'dirty' (choose from dirty-log, clear-log,"),
        (["--test-mem=900G"], "--test-mem: 900 GiB needs"),
        (["--seed=x"], "--seed: 'x' is not a whole number"),
        (["--vcpus=0"], "--vcpus: 0 is out of range"),
        (["--phys-offset=0x1234"], "--phys-offset: offset 0x1234 is not a multiple of the page size"),
        (["--phys-offset=0x100000"], "--phys-offset: test memory at 0x100000 runs into the guest's own memory"),
        (["--phys-offset=0x8000000000000"], "ends beyond the guest-physical limit"),
        (["-n", "99999999999"], "-n: 99999999999 is out of range, it must be from 0 to 1024"),
        (["-n", "-3"], "-n: -3 is out of range"),
        (["--results=/tmp/x", "--junitxml=/tmp/x/table.txt"], "is what the run's own results are written to (--results)"),
        (["--ring-count=1048576"], "--ring-count: 1048576 is out of range, this KVM takes at most 65536"),
        (["--ring-count=1099511627776"], "--ring-count: rings of 1099511627776 entries need "),
        (["--test-mem=10X"], "--test-mem: '10X' has an unknown unit 'X' (the units are K, M, G or T)"),
        (["--kvm-device="], "--kvm-device: '' names no device"),
        (["--kernel="], "--kernel: '' names no kernel"),
        (["--kernel=auto", "--qemu="], "--qemu: '' names no program"),
        (["--kernel=auto", "--cpu-model="], "--cpu-model: '' names no CPU model"),
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
        (["--junitxml=/etc/passwd/x"], "--junitxml: /etc/passwd/x: Not a directory (--junitxml FILE puts it elsewhere)"),
        (["--log-file=/proc/nope"], "--log-file: /proc/nope: No such file or directory"),
        (["--results="], "--results: '' names no folder"),
        (["--results=/proc/nope"], "--results: /proc/nope: No such file or directory (--results DIR puts the "),
        (["--results=/etc/passwd"], "--results: /etc/passwd: Not a directory"),
        (["--results=/etc/passwd/x"], "--results: /etc/passwd/x: Not a directory"),
        (["--results=/sys/kernel"], "--results: /sys/kernel: Permission denied"),
        (["--results=/dev/full"], "--results: /dev/full: Not a directory"),
    ],
    ids=lambda value: value[0].split("=")[0].strip("-") if isinstance(value, list) else "",
)  # fmt: skip
@pytest.mark.usefixtures("kvm")
def test_bad_input_is_one_line_and_a_usage_error(suite: Suite, arguments: list[str], message: str) -> None:
    done = suite(*arguments)
    assert done.returncode == USAGE_ERROR
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert message in line


@pytest.mark.parametrize("option", ["--emulated", "--report-to=/dev/null", "--repeat-with=x"])
def test_facts_for_a_kernel_are_no_options(suite: Suite, option: str) -> None:
    """By hand it would let tests run that may corrupt this host's memory."""
    done = suite(option, "--collect-only")
    assert done.returncode == USAGE_ERROR
    assert f"unrecognized arguments: {option}" in done.stderr


@pytest.mark.parametrize("option", ["--help", "--markers", "--fixtures", "--cache-show"])
def test_options_that_only_show(suite: Suite, option: str) -> None:
    """They show it, with status 0; a kernel that is named with them is not called good by that."""
    done = suite(option)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "INTERNALERROR" not in done.stdout
    if option != "--help":
        done = suite(option, "--kernel=debian:6.12")
        assert done.returncode == USAGE_ERROR
        assert "an option that only shows something tests no kernel: leave out --kernel" in done.stderr


@pytest.mark.usefixtures("kvm")
def test_a_path_that_stands_alone(suite: Suite, tmp_path: Path) -> None:
    """As in `--results DIR`: started as make does it, pytest does not look for its settings there."""
    folder = tmp_path / "there already"
    folder.mkdir()
    command = [sys.executable, "-m", "runner.suite_pytest", "-o", "testpaths=selftests/matrix/test_dirty_log.py"]
    cells = [*QUICK, *ONE_CELL, "--log-mode=dirty-log", "--kvm-device", "/dev/kvm", "--results", str(folder)]
    done = subprocess.run([*command, *cells], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "results.json").exists()


@pytest.mark.parametrize("closed", [1, 2])
def test_an_output_that_is_closed(closed: int) -> None:
    """What would be shown goes nowhere; the status is what it is."""
    command = [sys.executable, "-m", "runner.suite_pytest", "selftests/matrix/test_dirty_log.py", "-k", "nothing_like"]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=lambda: os.close(closed), check=False)
    assert done.returncode == USAGE_ERROR


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_a_file_that_cannot_be_imported(suite: Suite, tmp_path: Path, workers: str) -> None:
    """Of a kernel nothing good is said then, whatever passed in other files."""
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    options = [*QUICK, *ONE_CELL, "--log-mode=dirty-log", "--continue-on-collection-errors"]
    done = suite(str(tmp_path / "test_broken.py"), *options, workers)
    assert done.returncode == 1
    assert ": 1 file of tests could not be collected; 1 passed: no verdict; files: " in done.stdout


@pytest.mark.parametrize("more", [[], ["-n2"], ["--collect-only"]], ids=["alone", "xdist", "collect-only"])
def test_a_selection_that_matches_nothing(suite: Suite, more: list[str]) -> None:
    """It is said what was asked for, and nothing of KVM."""
    done = suite("-k", "nothing_like", *more)
    assert done.returncode == USAGE_ERROR, done.stdout
    assert "\nno test matches -k 'nothing_like' in selftests/matrix/test_dirty_log.py\n" in done.stdout
    assert "no test ran on KVM" not in done.stdout


def test_options_that_are_not_used_here(suite: Suite) -> None:
    """The machine's, where no other kernel is needed after all: the header says so."""
    done = suite("--kernel=auto", "--vm-memory=300", "--qemu=/nonexistent", "--collect-only", "--kvm-device=/dev/kvm")
    if "KVM cannot be used on this host" in done.stderr:
        pytest.skip("this host has no KVM")
    assert done.returncode == 0, done.stdout
    assert "\nnot used --qemu, --vm-memory: the tests run on this host\n" in done.stdout


def test_no_kernel_is_booted_for_nothing(suite: Suite) -> None:
    """Where all that matches runs on this host, --kernel auto needs no other kernel, though there is no KVM."""
    done = suite("selftests/unit/test_selection.py", "-k", "test_sizes", "--kernel=auto", "--kvm-device=/nonexistent")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "machine  " not in done.stdout
    assert " passed, " in done.stdout


def test_a_host_without_kvm_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /dev/kvm does not exist, the error names the modules to load."""

    def no_device(path: str, flags: int) -> int:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    monkeypatch.setattr(os, "open", no_device)
    with pytest.raises(KvmUnavailable, match=r"^/dev/kvm does not exist: load KVM \(modprobe kvm_intel or modprobe"):
        Kvm()


def test_a_mistyped_device_is_named(suite: Suite) -> None:
    """A device that the user named is what is wrong, and no module to load is suggested."""
    done = suite(*QUICK, *ONE_CELL, "--log-mode=dirty-log", "--kvm-device=kvm")
    assert done.returncode == NOTHING_RAN
    assert "KVM: kvm does not exist (--kvm-device; KVM's own is /dev/kvm)" in done.stdout
    assert "modprobe" not in done.stdout


def test_only_results_leave_a_folder(suite: Suite, tmp_path: Path) -> None:
    """The folders that a run made for its results are gone when there were none; those that were there stay."""
    (tmp_path / "there").mkdir()
    options = [f"--results={tmp_path}/there/made/results", f"--junitxml={tmp_path}/junit/x.xml"]
    done = suite("--deselect=selftests/matrix/test_dirty_log.py", "selftests/unit/test_uapi.py", *options)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "junit/x.xml").exists()
    assert not list((tmp_path / "there").iterdir())
    assert suite("--collect-only", "--results=/proc/nope").returncode == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """It may say so when the data is to go out only; what was made to find out is gone."""

    def fails(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OutputError, match=f"^--results: {tmp_path}/a/b: {os.strerror(code)} "):
        check_folder("--results", tmp_path / "a/b")
    with pytest.raises(OutputError, match=f"^--junitxml: {tmp_path}/a/x.xml: {os.strerror(code)} "):
        check_file("--junitxml", tmp_path / "a/x.xml")
    assert not list(tmp_path.iterdir())


def test_files_that_are_there_are_kept(tmp_path: Path) -> None:
    """To try whether a file can be written changes nothing in it."""
    (tmp_path / "x.xml").write_text("before")
    check_file("--junitxml", tmp_path / "x.xml")
    check_folder("--results", tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_the_last_failed_run_again(suite: Suite, tmp_path: Path) -> None:
    """--lf works, and its file is not in the checkout's first folder."""
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


def test_a_ring_too_small_for_this_kvm_is_told(suite: Suite, kvm: Kvm) -> None:
    """The smallest size depends on the backend; the message names it, and that size is taken."""
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
def test_a_failure_shows_all_and_the_command_repeats_it(suite: Suite, tmp_path: Path) -> None:
    """Environment, dimensions, seed, pages with their history, a map; in JSON too; and the printed command fails alike."""
    (tmp_path / "faulty.py").write_text(FAULTY_PLUGIN)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'lib'}"}
    options = ["--no-known-bugs", "--require-kvm", "--thorough"]
    command = suite.command(*QUICK, *ONE_CELL, *options, "--log-mode=dirty-log", "-p", "faulty", "-n2")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
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
    command_again = f"{data['reproduce']} -p faulty --results={suite.results}"
    again = subprocess.run(
        command_again, shell=True, cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    assert again.returncode == 1, again.stdout + again.stderr
    assert "1 cell: 1 FAIL" in again.stdout


@pytest.mark.usefixtures("kvm")
def test_what_repeats_a_test_that_is_no_cell(tmp_path: Path) -> None:
    """Its command has every option that the run had."""
    (tmp_path / "faulty.py").write_text(FAULTY_PLUGIN)
    test = "selftests/memory/test_arming.py::test_pages_mapped_before_logging[dirty-log]"
    options = ["--no-known-bugs", "--seed=7", "--iterations=3", "--test-mem=8M", "--kvm-device=/dev/kvm", "--soak=9"]
    command = [sys.executable, "-m", "pytest", "-p", "faulty", test, *options, f"--results={tmp_path}/results"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'lib'}"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("reproduce ")]
    assert f"'{test}'" in line
    assert set(options) <= {*line.split()}


@pytest.mark.usefixtures("kvm")
def test_known_bugs_are_plain_failures_on_demand(suite: Suite, host: object) -> None:
    """Under --no-known-bugs a cell on the list fails as any other; without, it is counted apart."""
    if getattr(host, "backend", "") != "kvm_pvm":
        pytest.skip("the cell whose bug shows every time is one of kvm_pvm's")
    dense = ["selftests/matrix/test_known_bugs.py"]
    expected = suite("--deselect=selftests/matrix/test_dirty_log.py", *dense)
    assert expected.returncode == 0, expected.stdout
    assert "1 known bug" in expected.stdout
    test = "selftests/matrix/test_known_bugs.py::test_dense_writer_never_overruns_its_ring"
    named = f"(described in known_bugs.toml):\n  {test}\n"
    assert f"pvm-ring-overflow-always {named}" in expected.stdout
    plain = suite("--deselect=selftests/matrix/test_dirty_log.py", *dense, "--no-known-bugs")
    assert plain.returncode == 1
    assert "LOST [R" in plain.stdout


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
def test_a_device_that_may_not_be_opened_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int, mode: int, remedy: str
) -> None:
    """To join its group helps only where there is one but root's, and it may use the device."""
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


def test_a_device_that_is_not_kvm_is_told() -> None:
    with pytest.raises(KvmUnavailable, match="/dev/null does not answer KVM_GET_API_VERSION"):
        Kvm("/dev/null")


@pytest.mark.usefixtures("kvm")
def test_another_api_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvm_util.kvm.raw_ioctl", lambda fd, request: (raw_ioctl(fd, request)[0] + 1, 0))
    with pytest.raises(KvmUnavailable, match="/dev/kvm speaks KVM API version 13, this suite 12"):
        Kvm()


def test_a_missing_assembler_is_told(suite: Suite, tmp_path: Path) -> None:
    """No ``as`` on the PATH, and guest code that has to be assembled: one line, with the package to install."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("conftest.py", "pytest.ini", "pyproject.toml", "known_bugs.toml", "guest_code", "selftests"):
        (copy / name).symlink_to(ROOT / name)
    for name in ("lib", "runner"):  # not links: modules find the checkout through their own path
        shutil.copytree(ROOT / name, copy / name)
    done = subprocess.run(
        suite.command(*QUICK), cwd=copy, capture_output=True, text=True, env={"PATH": str(tmp_path)}, check=False
    )
    assert done.returncode == USAGE_ERROR
    assert "no as on this machine: install binutils (apt install binutils, or gcc)" in done.stderr
