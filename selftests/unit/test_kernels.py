# SPDX-License-Identifier: GPL-2.0-only
"""Finding a kernel, its modules and their parameters, and what is made of how it ended; nothing is booted here."""

import io
import lzma
import re
import shutil
import stat
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness import results
from harness.early_collection import any_test_matches
from harness.interruption import Interruption
from harness.kernel_options import kernel_options, split_tests
from harness.planned_tests import PlannedTests
from harness.remote import RemoteSession
from harness.run_report import Facts, KernelReport, RunReport
from harness.table import DIMENSIONS, cross_table, cross_table_of_tests, skipped_everywhere, untested_lines
from runner import ROOT, check_kernel, debian, target
from runner import kernel_matrix as matrix
from runner.cpio import CpioWriter
from runner.emulator import Emulator
from runner.ending import Ending, judge, kernel_log, reports_at_boot, reports_since_start
from runner.errors import CannotTest
from runner.guest_init import BEGINS, comparable, took_effect
from runner.kernel import Kernel, decompress_module, find_kernel, kernels_under
from runner.kernel_matrix import load
from runner.modules import Module, check_parameters, kvm_modules, module_name, parse_parameters
from runner.qemu import Machine, Qemu
from runner.target import Target

RELEASE = "6.12.0-test"


def bzimage(release: str = RELEASE) -> bytes:
    """The head of a kernel image, as far as it is looked at."""
    image = bytearray(0x1000)
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x20E, 0x400)
    struct.pack_into("<H", image, 0x236, 1)
    text = f"{release} (builder@host) #1 SMP".encode()
    image[0x600 : 0x600 + len(text)] = text
    return bytes(image)


def make_root(root: Path, *releases: str, usr: bool = False) -> Path:
    for release in releases:
        modules = root / ("usr/lib/modules" if usr else "lib/modules") / release
        (modules / "kernel").mkdir(parents=True)
        image = modules / "vmlinuz" if usr else root / "boot" / f"vmlinuz-{release}"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(bzimage(release))
    return root


@pytest.mark.parametrize("usr", [False, True], ids=["boot", "usr-lib-modules"])
def test_an_unpacked_package_by_folder_and_by_image(tmp_path: Path, usr: bool) -> None:
    root = make_root(tmp_path, RELEASE, usr=usr)
    by_folder = find_kernel(str(root))
    assert by_folder.release == RELEASE
    assert by_folder.modules is not None
    assert by_folder.modules.name == RELEASE
    assert find_kernel(str(by_folder.image)) == by_folder


def test_modules_beside_an_image_anywhere(tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(bzimage())
    modules = tmp_path / "lib/modules" / RELEASE
    modules.mkdir(parents=True)
    assert find_kernel(str(tmp_path / "bzImage")).modules == modules


def test_a_folder_with_several_kernels_is_ambiguous(tmp_path: Path) -> None:
    root = make_root(tmp_path, "6.1.9", "6.1.10")
    with pytest.raises(CannotTest, match=r"holds several kernels: name one of .*6\.1\.10, .*6\.1\.9"):
        find_kernel(str(root))


def test_what_cannot_be_booted_is_not_at_hand(tmp_path: Path) -> None:
    """No modules, or no kernel: left out; the newest comes first, by the numbers' values."""
    root = make_root(tmp_path, "6.1.9", "6.1.10")
    (root / "boot/vmlinuz-6.9").write_bytes(bzimage("6.9"))
    (root / "boot/vmlinuz-rescue").write_bytes(b"none")
    assert [kernel.release for kernel in kernels_under(root)] == ["6.1.10", "6.1.9"]


@pytest.mark.parametrize("marker", ["Kbuild", ".config"], ids=["in-place", "O="])
def test_a_build_tree(tmp_path: Path, marker: str) -> None:
    """Modules come from the tree itself; without an image it is not built."""
    (tmp_path / "arch/x86/boot").mkdir(parents=True)
    (tmp_path / marker).touch()
    with pytest.raises(CannotTest, match="without arch/x86/boot/bzImage: build it"):
        find_kernel(str(tmp_path))
    (tmp_path / "arch/x86/boot/bzImage").write_bytes(bzimage())
    assert find_kernel(str(tmp_path)).modules == tmp_path
    assert find_kernel(str(tmp_path / "arch/x86/boot/bzImage")).modules == tmp_path


def make_package(folder: Path, name: str, architecture: str, root: Path | None) -> Path:
    tree = folder / name
    (tree / "DEBIAN").mkdir(parents=True)
    fields = f"Package: {name}\nVersion: 1\nArchitecture: {architecture}\nMaintainer: n <n@n>\nDescription: d\n"
    (tree / "DEBIAN/control").write_text(fields)
    if root is not None:
        shutil.copytree(root, tree, dirs_exist_ok=True)
    path = folder / f"{name}_1_{architecture}.deb"
    subprocess.run(["dpkg-deb", "-b", str(tree), str(path)], check=True, capture_output=True)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb")
    monkeypatch.setattr("runner.kernel.CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_a_package_file(tmp_path: Path, cache: Path) -> None:
    """It is unpacked once, into the cache."""
    package = make_package(tmp_path, f"linux-image-{RELEASE}-unsigned", "amd64", make_root(tmp_path / "root", RELEASE))
    kernel = find_kernel(str(package))
    assert kernel.release == RELEASE
    assert kernel.image.is_relative_to(cache)
    assert find_kernel(str(package)) == kernel


def test_a_kernel_in_two_packages(tmp_path: Path, cache: Path) -> None:
    """Image and modules apart, as newer Debian and Ubuntu have them: the other one is taken from beside it."""
    assert not cache.exists()
    root = make_root(tmp_path / "root", RELEASE)
    shutil.move(root / "lib", tmp_path / "modules/lib")
    package = make_package(tmp_path, f"linux-image-{RELEASE}", "amd64", root)
    with pytest.raises(CannotTest, match="no modules for"):
        find_kernel(str(package))
    other = make_package(tmp_path, f"linux-modules-{RELEASE}", "amd64", tmp_path / "modules")
    assert find_kernel(str(package)).release == RELEASE
    assert find_kernel(str(other)).release == RELEASE


@pytest.mark.parametrize(
    ("name", "architecture", "message"),
    [
        (f"linux-image-{RELEASE}", "arm64", "is a package for arm64, this machine is"),
        ("hello", "amd64", "is the package hello, not a kernel's"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_a_package_that_is_not_for_us(tmp_path: Path, name: str, architecture: str, message: str) -> None:
    with pytest.raises(CannotTest, match=message):
        find_kernel(str(make_package(tmp_path, name, architecture, None)))


@pytest.mark.usefixtures("cache")
def test_a_file_that_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "x.deb").write_text("no")
    with pytest.raises(CannotTest, match="is not a Debian package"):
        find_kernel(str(tmp_path / "x.deb"))


def cached(cache: Path, *releases: str) -> None:
    for release in releases:
        make_root(cache / release, release)
        (cache / release / ".complete").touch()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("7.2", r"neither a file or folder, nor an installed release .*; Debian's is debian:7\.2$"),
        ("7.2-rc3", r"nor an installed release \(installed: [^;]*$"),
        (
            "debian:7.2-rc3",
            "release candidates are in none of trixie, bookworm, sid; name a release, such as debian:7.2,",
        ),
        ("debian:7.2~rc3-rt-amd64", "release candidates are in none of"),
    ],
)
def test_kernels_with_another_name_in_debian(name: str, message: str) -> None:
    """A release that is not installed is named as Debian has it, and a release candidate as one that Debian's suites lack."""
    with pytest.raises(CannotTest, match=message):
        find_kernel(name)


def test_debian_takes_the_newest_that_fits_from_the_cache(tmp_path: Path) -> None:
    """Versions are compared number by number, and flavours do not mix; what was cut short is not taken."""
    cached(tmp_path, "6.1.0-9-cloud-amd64", "6.1.0-10-cloud-amd64", "6.12.9+deb12-cloud-amd64", "6.12.9+deb12-rt-amd64")
    (tmp_path / "6.1.0-11-cloud-amd64").mkdir()
    assert debian.fetch("6.1", tmp_path).name == "6.1.0-10-cloud-amd64"
    assert debian.fetch("6.12", tmp_path).name == "6.12.9+deb12-cloud-amd64"
    assert debian.fetch("6.12-rt-amd64", tmp_path).name == "6.12.9+deb12-rt-amd64"


def test_packed_modules(tmp_path: Path) -> None:
    (tmp_path / "a.ko.xz").write_bytes(lzma.compress(b"data"))
    assert decompress_module(tmp_path / "a.ko.xz") == b"data"
    for name in ("b.ko.xz", "b.ko.gz", "b.ko.zst"):
        (tmp_path / name).write_bytes(b"not packed")
        with pytest.raises(CannotTest, match=f"{name} cannot be unpacked"):
            decompress_module(tmp_path / name)


def test_no_modules_are_needed_when_kvm_is_built_in(tmp_path: Path) -> None:
    (tmp_path / "modules.builtin").write_text("kernel/arch/x86/kvm/kvm.ko\nkernel/arch/x86/kvm/kvm-amd.ko\n")
    assert kvm_modules(Kernel(tmp_path, RELEASE, tmp_path), "kvm_amd") == []
    with pytest.raises(CannotTest, match="no module kvm_intel under"):
        kvm_modules(Kernel(tmp_path, RELEASE, tmp_path), "kvm_intel")


def test_a_module_that_is_none(tmp_path: Path) -> None:
    for name in ("kvm.ko", "kvm-amd.ko"):
        (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(CannotTest, match=r"kvm\.ko is not a kernel module"):
        kvm_modules(Kernel(tmp_path, RELEASE, tmp_path), "kvm_amd")


def test_parameters_are_read_and_checked() -> None:
    modules = [Module("kvm", b"", (), frozenset({"tdp_mmu"})), Module("kvm_amd", b"", (), frozenset({"npt"}))]
    parameters = parse_parameters(" kvm.tdp_mmu=0  kvm-amd.npt=1 ")
    assert parameters == {"kvm.tdp_mmu": "0", "kvm_amd.npt": "1"}
    check_parameters(parameters, modules, "kvm_amd")
    check_parameters({"kvm.any": "1"}, modules[1:], "kvm_amd")  # built in: the booted kernel will tell
    with pytest.raises(CannotTest, match=r"no parameter nptt \(did you mean npt\?\)"):
        check_parameters({"kvm_amd.nptt": "1"}, modules, "kvm_amd")
    for text in ("kvm", "kvm.npt", "npt=1", "=", "kvm.=1"):
        with pytest.raises(CannotTest, match=r"write it as module\.parameter=value"):
            parse_parameters(text)


def test_module_names() -> None:
    assert module_name(Path("kernel/arch/x86/kvm/kvm-amd.ko.xz")) == "kvm_amd"


@pytest.mark.parametrize(("one", "other"), [("0", "N"), ("off", "n"), ("1", "Y"), ("0x10", "16"), ("auto", "auto")])
def test_values_of_parameters_have_several_spellings(one: str, other: str) -> None:
    assert comparable(one) == comparable(other)


@pytest.mark.parametrize(
    ("wanted", "found"), [("force", "Y"), ("auto", "Y"), ("auto", "N"), ("off", "N"), ("never", "never")]
)
def test_words_that_a_parameter_does_not_show(wanted: str, found: str) -> None:
    """A word of kvm.nx_huge_pages is compared by what it means."""
    assert took_effect(wanted, found)


@pytest.mark.parametrize(("wanted", "found"), [("force", "N"), ("1", "N"), ("off", "Y"), ("never", "N")])
def test_a_word_that_took_no_effect(wanted: str, found: str) -> None:
    """A value that the kernel did not follow is seen, whatever word it is."""
    assert not took_effect(wanted, found)


def test_different_values_are_different() -> None:
    assert len({comparable(value) for value in ("0", "1", "2", "auto", "-1")}) == 5


OOPS = [
    "[    5.0] BUG: kernel NULL pointer dereference, address: 0",
    "[    5.0] Oops: 0002 [#1] SMP",
    "[    5.0] RIP: 0010:f",
]
PANIC = ["[    6.0] Kernel panic - not syncing: Fatal exception", "[    6.0] Kernel Offset: disabled"]
OUT_OF_MEMORY = ["[    5.0] Out of memory: Killed process 148 (python3) total-vm:4522100kB, anon-rss:224504kB"]
INT3 = ["[    5.0] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI"]


@pytest.mark.parametrize(
    ("lines", "booted", "overdue", "ending"),
    [
        (OOPS, True, None, Ending.OOPS),
        (OOPS, True, "too late", Ending.OOPS),
        ([*OOPS, *PANIC], True, None, Ending.PANIC),
        (PANIC, True, None, Ending.PANIC),
        (PANIC, False, None, Ending.NO_BOOT),
        ([], False, "too late", Ending.NO_BOOT),
        ([], True, "too late", Ending.HANG),
        ([], True, None, Ending.SUITE_DIED),
        (OUT_OF_MEMORY, True, None, Ending.NOT_TESTED),
        ([*OUT_OF_MEMORY, *PANIC], True, None, Ending.PANIC),
        (INT3, True, None, Ending.EMULATOR_FAULT),
        ([*INT3, *PANIC], False, None, Ending.EMULATOR_FAULT),
    ],
)
def test_how_a_machine_ended(lines: list[str], booted: bool, overdue: str | None, ending: Ending) -> None:
    end = judge("\n".join(["[    0.0] Linux version 6.12", *lines]), booted, overdue, emulated=True)
    assert end.ending is ending


def test_a_breakpoint_oops_on_real_hardware_is_the_kernels() -> None:
    assert judge("\n".join(INT3), True, None, emulated=False).ending is Ending.OOPS


def test_reports_at_boot_are_told_apart() -> None:
    """What comes before the first program is not the suite's; what comes when KVM is loaded is."""
    console = [
        "[    1.0] WARNING: early",
        "[    1.1] ---[ end trace 0 ]---",
        f"[    2.0] {BEGINS}",
        "[    3.0] WARNING: late",
    ]
    assert [splat.title for splat in reports_at_boot("\n".join(console))] == ["WARNING: early"]
    assert [splat.title for splat in reports_since_start("\n".join(console))] == ["WARNING: late"]


def test_what_no_test_saw_is_in_the_report_all_the_same(tmp_path: Path) -> None:
    """A WARN as KVM is loaded fails the run; what a test saw is there once; what came at boot is only remarked."""
    report = RunReport(tmp_path, Facts({}, {}, []))
    report.kernel_reports.append(KernelReport("WARN", "WARNING: seen", ["WARNING: seen"], None, ["a test"]))
    planned = PlannedTests({}, Interruption())
    session = RemoteSession(cast(Target, None), [], "pytest", [], False, tmp_path, report, planned)
    titles = ("early", BEGINS, "loading", "seen")
    lines = [f"[    1.0] {'' if title == BEGINS else 'WARNING: '}{title}" for title in titles]
    session.add_reports("\n".join(lines))
    assert [one.title for one in report.kernel_reports] == ["WARNING: seen", "WARNING: loading"]
    assert report.kernel_reports[1].known_bug is None
    assert report.remarks == ["the kernel reported while it booted, before KVM was loaded: WARNING: early"]


@pytest.mark.parametrize(
    ("kernel", "arguments", "there", "here"),
    [
        ("auto", None, ["selftests", "--ignore=selftests/unit/"], ["selftests/unit"]),
        ("auto", ["selftests"], ["selftests", "--ignore=selftests/unit/"], ["selftests/unit"]),
        ("auto", ["."], [".", "--ignore=selftests/unit/"], ["selftests/unit"]),
        ("auto", ["selftests/unit/test_uapi.py::test_x"], [], ["selftests/unit/test_uapi.py::test_x"]),
        (
            "auto",
            ["selftests/interface/test_slots.py::test_x[a]"],
            ["selftests/interface/test_slots.py::test_x[a]"],
            [],
        ),
        ("debian:6.12", None, ["selftests", "--ignore=selftests/unit/"], []),
        (
            "debian:6.12",
            ["selftests/unit/mutants/falsified_kernel.py"],
            ["selftests/unit/mutants/falsified_kernel.py"],
            [],
        ),
    ],
)
def test_which_tests_run_in_the_kernel(
    kernel: str, arguments: list[str] | None, there: list[str], here: list[str]
) -> None:
    """With auto the suite's tests of itself stay on the host, however tests are named; a named kernel gets all."""
    source = pytest.Config.ArgsSource.TESTPATHS if arguments is None else pytest.Config.ArgsSource.ARGS
    config: Any = SimpleNamespace(
        getoption=lambda _name, default: default,
        option=SimpleNamespace(kernel=kernel),
        args_source=source,
        args=arguments or ["selftests"],
        invocation_params=SimpleNamespace(dir=ROOT),
    )
    assert split_tests(config) == (there, [f"{ROOT / path}" for path in here])


@pytest.mark.parametrize(
    "tests",
    [
        ["selftests/matrix/test_dirty_log.py", "-k", "57bit-1g-anonymous_hugetlb_1gb-forced"],
        [
            "selftests/matrix/test_dirty_log.py::test_dirty_log[dirty-ring-57bit-1g-anonymous_hugetlb_1gb-forced-sparse-2vcpus]"
        ],
    ],
    ids=["by-name", "by-id"],
)
def test_cells_of_any_kernel_match(tests: list[str]) -> None:
    """What this host lacks may be there in the kernel that is to be booted."""
    option = SimpleNamespace(keyword="", markexpr="", deselect=None, ignore=None, ignore_glob=None)
    assert any_test_matches(option, [], tests)


@pytest.mark.parametrize(
    ("kernel", "repeated"), [("auto", "/boot/vmlinuz-6.12"), ("debian:6.12", "debian:6.12")], ids=["chosen", "named"]
)
def test_the_same_machine_again(kernel: str, repeated: str) -> None:
    """The command that repeats a failure has all that the machine was made of, and the kernel that was at hand then."""
    given = {"kvm_params": "kvm.tdp_mmu=0", "qemu": None, "accel": "tcg", "cpu_model": None, "append": ""}
    option = SimpleNamespace(kernel=kernel, **given, vm_memory="3000", vm_cpus=None, time_limit="60")
    assert kernel_options(option, Path("/boot/vmlinuz-6.12")) == [
        f"--kernel={repeated}", "--kvm-params=kvm.tdp_mmu=0", "--accel=tcg", "--vm-memory=3000", "--time-limit=60",
    ]  # fmt: skip


def test_auto_takes_a_kernel_that_has_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer kernel at hand that has no KVM is passed over."""
    without, with_kvm = (Kernel(tmp_path, release, tmp_path / release) for release in ("7.9", "6.1"))
    for kernel, built_in in ((without, ""), (with_kvm, "kvm.ko\nkvm-amd.ko\n")):
        kernel.modules.mkdir()
        (kernel.modules / "modules.builtin").write_text(built_in)
    qemu = Qemu(Emulator(("qemu",), "10.0.13", "here"), "tcg", "max", "kvm_amd")
    monkeypatch.setattr(target, "kernels_at_hand", lambda: [without, with_kvm])
    monkeypatch.setattr(target, "find_qemu", lambda *_: qemu)
    assert target.find_target("auto", "", None, None, None, Machine(1, 1, ""), 1).kernel == with_kvm


@pytest.mark.parametrize("spelling", ["--results=out", "--results out"])
def test_paths_of_a_checked_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    """Files are seen from where the user is, in both spellings of an option; names that are looked up stay as they are."""
    seen: list[str] = []

    def main(arguments: list[str]) -> int:
        seen.extend(arguments)
        return 0

    monkeypatch.setattr("pytest.main", main)
    monkeypatch.setattr("sys.path", [""])
    monkeypatch.chdir(tmp_path)
    assert check_kernel.main(["debian:6.12", *spelling.split(), "--qemu", "qemu-system-x86_64", "--junitxml=~/x"]) == 0
    assert seen[:2] == ["--kernel=debian:6.12", "-v"]
    junit = Path("~/x").expanduser()
    assert seen[2:] == [f"--results={tmp_path / 'out'}", "--qemu=qemu-system-x86_64", f"--junitxml={junit}"]


def test_statuses_are_those_of_a_bisection() -> None:
    bad = {Ending.PANIC, Ending.OOPS, Ending.HANG, Ending.SUITE_DIED}
    assert {ending: ending.exit_status for ending in Ending} == {
        ending: 0 if ending is Ending.FINISHED else 1 if ending in bad else 125 for ending in Ending
    }


def test_the_kernels_log_is_what_has_a_timestamp() -> None:
    assert kernel_log("SeaBIOS\n[    0.000000] Linux version\nguest_init: x\n[   12.5][ T1] y\n") == (
        "[    0.000000] Linux version\n[   12.5][ T1] y\n"
    )


def test_an_archive_that_cpio_reads(tmp_path: Path) -> None:
    """The tool where there is one; else what is known of the format."""
    file = io.BytesIO()
    archive = CpioWriter(file)
    archive.add_file("/a/b/c.txt", b"hello", 0o755)
    archive.finish()
    data = file.getvalue()
    assert len(data) % 4 == 0
    assert data.startswith(b"070701")
    assert data.count(b"070701") == 4  # a, a/b, the file, the trailer
    mode = int(data[data.index(b"a/b/c.txt\0") - 110 + 14 :][:8], 16)
    assert stat.S_ISREG(mode)
    assert stat.S_IMODE(mode) == 0o755
    if shutil.which("cpio"):
        (tmp_path / "out").mkdir()
        subprocess.run(["cpio", "-id", "--quiet"], input=data, cwd=tmp_path / "out", check=True)
        assert (tmp_path / "out/a/b/c.txt").read_text() == "hello"


def matrix_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "matrix.toml"
    path.write_text(text)
    return path


def test_a_matrix_file(tmp_path: Path) -> None:
    path = matrix_file(tmp_path, 'kernels = ["debian:6.1"]\narguments = "-k \'a or b\'"\n')
    assert load(path) == (["debian:6.1"], [""], ["-k", "a or b"])
    kernels, parameters, _ = load(ROOT / "matrix.toml")
    assert kernels == ["host", "debian:6.1", "debian:6.12", "debian:7.2"]
    assert len(parameters) == 6
    assert all(parse_parameters(text) for text in parameters)


def test_a_run_of_the_matrix_that_cannot_be(tmp_path: Path) -> None:
    done = matrix.run("/nonexistent/bzImage", "", tmp_path / "01", [])
    assert (done.status, done.cells) == (125, [])
    assert "/nonexistent/bzImage" in done.reason or "no qemu" in done.reason


@pytest.mark.parametrize("kernel", ["host", "debian:6.12"])
def test_a_run_of_the_matrix_that_a_signal_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """It is not good, and the next kernel has its turn."""
    (tmp_path / "pytest.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = matrix.run(kernel, "", tmp_path / "01", [])
    assert (done.status, done.reason) == (125, "a signal ended it")


@pytest.mark.parametrize(("option", "status"), [("--no-such-option", 128), ("-k=no_such_test", 128)])
def test_the_hosts_run_in_a_matrix_has_a_status_as_others_have(tmp_path: Path, option: str, status: int) -> None:
    """What ends the whole matrix, and where nothing ran."""
    assert matrix.run("host", "", tmp_path / "01", ["selftests/unit/test_pieces.py", option]).status == status


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [([0, 0], 0), ([0, 1], 1), ([1, 125], 1), ([0, 125], 125), ([0, 128], 128), ([130, 0], 130)],
)
def test_the_matrix_ends_with_a_table_and_a_status(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    statuses: list[int],
    expected: int,
) -> None:
    """Bad before anything else, then what could not be tested; an interrupted one shows what it has."""
    cell = dict(zip(DIMENSIONS, ("dirty-log", "48bit-4k", "shmem", "forced", "sparse", 1), strict=True))
    answers = iter(statuses)

    def run(kernel: str, parameters: str, folder: Path, _arguments: list[str]) -> matrix.Run:
        folder.mkdir(parents=True)
        return matrix.Run(kernel, parameters, next(answers), [cell | {"verdict": "pass"}], [], kernel, "")

    monkeypatch.setattr(matrix, "run", run)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    assert matrix.main([str(matrix_file(tmp_path, 'kernels = ["a", "b"]'))]) == expected
    shown = capsys.readouterr().out
    assert "dirty-log  48bit-4k  shmem    forced  sparse   1     pass" in shown
    assert re.search(r"\n\n2 runs: .*; files: \S+\n$", shown)
    assert (tmp_path / next(iter(tmp_path.glob("results/matrix-*/table.txt")))).exists()


def test_the_table_of_several_runs() -> None:
    """A line per cell, a column per run; a cell that a run did not have is a dash."""
    cell = {
        "log_mode": "dirty-log",
        "guest_mode": "48bit-4k",
        "backing": "shmem",
        "stop": "forced",
        "density": "sparse",
    }
    one, two = cell | {"vcpus": 1}, cell | {"vcpus": 2}
    *lines, legend = cross_table(
        ["A", "B"], [[one | {"verdict": "pass"}, two | {"verdict": "skipped"}], [one | {"verdict": "FAIL"}]]
    )
    assert [line.split()[5:] for line in lines[1:]] == [["1", "pass", "FAIL"], ["2", "skip", "-"]]
    assert legend == "(skip: skipped; -: no cell of that run)"
    assert len(cross_table(["A"], [[one | {"verdict": "pass"}]])) == 2  # nothing to explain


def test_the_table_of_tests_says_where_each_ran() -> None:
    """A line per function, its cases counted; and what ran nowhere is named with its reason."""

    def row(test: str, verdict: str, reason: str = "") -> dict[str, str]:
        return {"test": f"selftests/test_a.py::{test}", "verdict": verdict, "reason": reason}

    one = [row("test_b[x]", "pass"), row("test_b[y]", "skipped", "no SMM"), row("test_c", "skipped", "no AVX")]
    two = [
        row("test_b[x]", "FAIL"),
        row("test_b[z]", "FAIL"),
        row("test_c", "known bug"),
        row("test_c", "known bug, not seen"),
    ]
    *lines, legend = cross_table_of_tests(["A", "B"], [one, two])
    assert [line.split() for line in lines] == [
        ["A", "B", "test"],
        ["1", "1s", "2F", "test_a.py::test_b"],
        ["1s", "2k", "test_a.py::test_c"],
    ]
    assert legend == "(4 3k 2s 1F: 4 passed, 3 have a known bug, 2 skipped or not run, 1 failed)"
    assert skipped_everywhere([one, [*two[:2], row("test_b[y]", "pass")]]) == ["selftests/test_a.py::test_c: no AVX"]


def test_what_did_not_run_has_a_line_each() -> None:
    """A line per reason, the one that kept most from running first, with the files of its tests."""
    lines = untested_lines(
        {
            "no SMM": ["selftests/x86_64/test_smm.py::test_a"],
            "48bit-1g: no PDPE1GB": ["selftests/test_c.py::c"],
            "no SVM: it is off": [
                "selftests/x86_64/test_b.py::test_b[x]",
                "selftests/x86_64/test_b.py::test_b[y]",
                "selftests/test_c.py::d",
            ],
            "57bit-4k: no LA57": ["selftests/test_c.py::a"],
            "57bit-2m: no LA57": ["selftests/test_c.py::b"],
        },
        "skipped",
    )
    assert [line.strip() for line in lines] == [
        "3 skipped, x86_64/test_b.py, test_c.py: no SVM: it is off",
        "2 skipped, test_c.py: 57bit-2m, 57bit-4k: no LA57",
        "1 skipped, x86_64/test_smm.py: no SMM",
        "1 skipped, test_c.py: 48bit-1g: no PDPE1GB",
    ]


def test_the_host_is_a_kernel_of_the_matrix_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters are for kernels that are booted."""
    asked = []

    def run(kernel: str, parameters: str, folder: Path, _arguments: list[str]) -> matrix.Run:
        asked.append((kernel, parameters))
        folder.mkdir(parents=True)
        return matrix.Run(kernel, parameters, 0, [], [], kernel, "")

    monkeypatch.setattr(matrix, "run", run)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    matrix.main(
        [str(matrix_file(tmp_path, 'kernels = ["host", "b"]\nparameters = ["kvm_amd.npt=0", "kvm_amd.npt=1"]'))]
    )
    assert asked == [("host", ""), ("b", "kvm_amd.npt=0"), ("b", "kvm_amd.npt=1")]
