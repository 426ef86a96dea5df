# SPDX-License-Identifier: GPL-2.0-only
"""Finding a kernel, its modules and their parameters, and diagnosing how it ended; nothing is booted here."""

import io
import lzma
import re
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.early_collection import matching_tests
from harness.kernel_options import kernel_options, split_tests
from harness.table import cross_table, cross_table_of_tests, skipped_everywhere, untested_lines
from runner import ROOT, check_kernel, debian, target
from runner.boot_outcome import BootOutcome, diagnose_console, kernel_log, splats_before_init, splats_since_init
from runner.cpio import CpioWriter
from runner.emulator import Emulator
from runner.errors import CannotTest
from runner.guest_init import INIT_MARKER, took_effect
from runner.guest_session import GuestSession
from runner.kernel import Kernel, decompress_module, find_kernel, kernels_under
from runner.modules import Module, check_parameters, kvm_modules, parse_parameters
from runner.qemu import Machine, Qemu
from selftests.unit.commands import pytest_command
from selftests.unit.mutants.kill_matrix import contract_files

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
def test_unpacked_package(tmp_path: Path, usr: bool) -> None:
    """An unpacked package is found by its folder and by its image, in either layout."""
    root = make_root(tmp_path, RELEASE, usr=usr)
    by_folder = find_kernel(str(root))
    assert by_folder.release == RELEASE
    assert by_folder.modules is not None
    assert by_folder.modules.name == RELEASE
    assert find_kernel(str(by_folder.image)) == by_folder


def test_modules_beside_an_image(tmp_path: Path) -> None:
    """An image in any folder takes its modules from lib/modules/<release> there."""
    (tmp_path / "bzImage").write_bytes(bzimage())
    modules = tmp_path / "lib/modules" / RELEASE
    modules.mkdir(parents=True)
    assert find_kernel(str(tmp_path / "bzImage")).modules == modules


def test_folder_with_several_kernels(tmp_path: Path) -> None:
    """A folder with several kernels is refused with the list of images to choose from."""
    root = make_root(tmp_path, "6.1.9", "6.1.10")
    with pytest.raises(CannotTest, match=r"holds several kernels: name one of .*6\.1\.10, .*6\.1\.9"):
        find_kernel(str(root))


def test_local_kernels_are_bootable(tmp_path: Path) -> None:
    """Images without modules and files that are no kernels are left out; the newest release, compared as numbers, is first."""
    root = make_root(tmp_path, "6.1.9", "6.1.10")
    (root / "boot/vmlinuz-6.9").write_bytes(bzimage("6.9"))
    (root / "boot/vmlinuz-rescue").write_bytes(b"none")
    assert [kernel.release for kernel in kernels_under(root)] == ["6.1.10", "6.1.9"]


@pytest.mark.parametrize("marker", ["Kbuild", ".config"], ids=["in-place", "O="])
def test_kernel_build_tree(tmp_path: Path, marker: str) -> None:
    """A build tree has its modules itself; one that is not built is refused."""
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


def test_kernel_package_file(tmp_path: Path, cache: Path) -> None:
    """A .deb is unpacked into the cache."""
    package = make_package(tmp_path, f"linux-image-{RELEASE}-unsigned", "amd64", make_root(tmp_path / "root", RELEASE))
    kernel = find_kernel(str(package))
    assert (kernel.release, kernel.image.is_relative_to(cache)) == (RELEASE, True)


@pytest.mark.usefixtures("cache")
def test_kernel_in_two_packages(tmp_path: Path) -> None:
    """If image and modules are in two packages, naming either one takes the other from beside it."""
    root = make_root(tmp_path / "root", RELEASE)
    shutil.move(root / "lib", tmp_path / "modules/lib")
    package = make_package(tmp_path, f"linux-image-{RELEASE}", "amd64", root)
    with pytest.raises(CannotTest, match="no modules for"):
        find_kernel(str(package))
    other = make_package(tmp_path, f"linux-modules-{RELEASE}", "amd64", tmp_path / "modules")
    assert {find_kernel(str(path)).release for path in (package, other)} == {RELEASE}


@pytest.mark.parametrize(
    ("name", "architecture", "message"),
    [
        (f"linux-image-{RELEASE}", "arm64", "is a package for arm64, this machine is"),
        ("hello", "amd64", "is the package hello, not a kernel's"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_unsuitable_package(tmp_path: Path, name: str, architecture: str, message: str) -> None:
    """A package of another architecture or without a kernel is refused."""
    with pytest.raises(CannotTest, match=message):
        find_kernel(str(make_package(tmp_path, name, architecture, None)))


@pytest.mark.usefixtures("cache")
def test_file_that_is_no_package(tmp_path: Path) -> None:
    """A .deb that is no Debian package is refused."""
    (tmp_path / "x.deb").write_text("no")
    with pytest.raises(CannotTest, match="is not a Debian package"):
        find_kernel(str(tmp_path / "x.deb"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nonexistent/bzImage", "neither a file or folder, nor an installed release"),
        (str(ROOT / "lib"), "is neither a kernel build tree nor a folder with boot/vmlinuz-*"),
        ("7.2", r"neither a file or folder, nor an installed release .*; Debian's is debian:7\.2$"),
        ("7.2-rc3", r"nor an installed release \(installed: [^;]*$"),
        ("debian:six", "write it as debian:6.12"),
        ("debian:7.2-rc3", "release candidates are in none of trixie, bookworm, sid; name a release, such as debian:7.2,"),
        ("debian:7.2~rc3-rt-amd64", "release candidates are in none of"),
    ],
)  # fmt: skip
def test_names_of_no_kernel(name: str, message: str) -> None:
    """A name that fits no kernel is refused, with the name in Debian if it is a release that may be there."""
    with pytest.raises(CannotTest, match=message):
        find_kernel(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no kernel at all", r"is not a kernel image \(no x86_64 boot header\)"),
        (bytes(56) + b"ARM\x64" + bytes(4096), "is a kernel for arm64, this machine is"),
        (b"\x7fELF" + bytes(14) + b"\xf3\0" + bytes(4096), "is an ELF file for riscv, this machine is"),
        (
            b"\x7fELF" + bytes(14) + b"\x3e\0" + bytes(4096),
            r"is an ELF file: give the compressed image \(arch/",
        ),
        (bytes(0x202) + b"HdrS" + bytes(4096), "is a 32-bit x86 kernel"),
        (b"", "is not a kernel image"),
    ],
    ids=["text", "arm64", "riscv", "vmlinux", "i386", "empty"],
)
def test_images_of_other_machines(tmp_path: Path, content: bytes, message: str) -> None:
    """A file that is no kernel, or another architecture's, is refused with what it is."""
    (tmp_path / "image").write_bytes(content)
    with pytest.raises(CannotTest, match=f"^{tmp_path}/image {message}"):
        find_kernel(str(tmp_path / "image"))


def test_newest_match_in_the_cache(tmp_path: Path) -> None:
    """The newest complete kernel of the version and flavour is taken; versions are compared number by number."""
    for release in ("6.1.0-9-cloud", "6.1.0-10-cloud", "6.12.9+deb12-cloud", "6.12.9+deb12-rt"):
        (tmp_path / f"{release}-amd64").mkdir()
        (tmp_path / f"{release}-amd64/.complete").touch()
    (tmp_path / "6.1.0-11-cloud-amd64").mkdir()
    assert debian.fetch("6.1", tmp_path).name == "6.1.0-10-cloud-amd64"
    assert debian.fetch("6.12", tmp_path).name == "6.12.9+deb12-cloud-amd64"
    assert debian.fetch("6.12-rt-amd64", tmp_path).name == "6.12.9+deb12-rt-amd64"


def test_compressed_modules(tmp_path: Path) -> None:
    """A compressed module is decompressed; a damaged one is refused."""
    (tmp_path / "a.ko.xz").write_bytes(lzma.compress(b"data"))
    assert decompress_module(tmp_path / "a.ko.xz") == b"data"
    for name in ("b.ko.xz", "b.ko.gz", "b.ko.zst"):
        (tmp_path / name).write_bytes(b"not packed")
        with pytest.raises(CannotTest, match=f"{name} cannot be unpacked"):
            decompress_module(tmp_path / name)


def test_built_in_kvm_needs_no_module(tmp_path: Path) -> None:
    """A KVM in modules.builtin has no modules to load; a vendor module that is nowhere is an error."""
    (tmp_path / "modules.builtin").write_text("kernel/arch/x86/kvm/kvm.ko\nkernel/arch/x86/kvm/kvm-amd.ko\n")
    assert kvm_modules(Kernel(tmp_path, RELEASE, tmp_path), "kvm_amd") == []
    with pytest.raises(CannotTest, match="no module kvm_intel under"):
        kvm_modules(Kernel(tmp_path, RELEASE, tmp_path), "kvm_intel")


def test_extra_modules(tmp_path: Path) -> None:
    """Modules that tests use are loaded where the kernel has them, with those that they depend on, and are missed nowhere."""
    built_in = "kernel/arch/x86/kvm/kvm.ko\nkernel/arch/x86/kvm/kvm-amd.ko\n"
    (tmp_path / "modules.builtin").write_text(built_in)
    for name, depends in (("brd", "other"), ("other", "")):
        source = f'const char info[] __attribute__((section(".modinfo"))) = "depends={depends}";'
        command = ["gcc", "-xc", "-", "-c", "-o", str(tmp_path / f"{name}.ko")]
        subprocess.run(command, input=source, text=True, check=True)
    modules = kvm_modules(Kernel(tmp_path, RELEASE, tmp_path), "kvm_amd", ["none", "brd"])
    assert [(module.name, module.optional) for module in modules] == [("other", True), ("brd", True)]
    (tmp_path / "modules.builtin").write_text(built_in + "kernel/drivers/block/brd.ko\n")
    assert kvm_modules(Kernel(tmp_path, RELEASE, tmp_path), "kvm_amd", ["brd"]) == []


def test_file_that_is_no_module(tmp_path: Path) -> None:
    """A module's file that is none is refused, compressed or not."""
    for name in ("kvm.ko.xz", "kvm-amd.ko"):
        (tmp_path / name).write_bytes(lzma.compress(b"garbage"))
    with pytest.raises(CannotTest, match=r"kvm\.ko\.xz is not a kernel module"):
        kvm_modules(Kernel(tmp_path, RELEASE, tmp_path), "kvm_amd")


def test_parsed_kvm_parameters() -> None:
    """Parameters are parsed, a misspelt one gets a hint, and those of a built-in KVM are left to the booted kernel."""
    modules = [Module("kvm", b"", (), frozenset({"tdp_mmu"})), Module("kvm_amd", b"", (), frozenset({"npt"}))]
    parameters = parse_parameters(" kvm.tdp_mmu=0  kvm-amd.npt=1 ")
    assert parameters == {"kvm.tdp_mmu": "0", "kvm_amd.npt": "1"}
    check_parameters(parameters, modules, "kvm_amd")
    check_parameters({"kvm.any": "1"}, modules[1:], "kvm_amd")  # built in: the booted kernel checks it
    with pytest.raises(CannotTest, match=r"no parameter nptt \(did you mean npt\?\)"):
        check_parameters({"kvm_amd.nptt": "1"}, modules, "kvm_amd")
    for text in ("kvm", "kvm.npt", "npt=1", "=", "kvm.=1"):
        with pytest.raises(CannotTest, match=r"write it as module\.parameter=value"):
            parse_parameters(text)


@pytest.mark.parametrize(
    ("wanted", "found", "effect"),
    [
        *(("0", "N", True), ("off", "n", True), ("1", "Y", True), ("0x10", "16", True), ("force", "Y", True)),
        *(("auto", "Y", True), ("auto", "N", True), ("never", "never", True)),
        *(("1", "N", False), ("off", "Y", False), ("force", "N", False), ("never", "N", False), ("2", "Y", False)),
        *(("2", "1", False), ("-1", "1", False)),
    ],
)
def test_effect_of_a_parameter(wanted: str, found: str, effect: bool) -> None:
    """A parameter took effect if it reads as the same value in any spelling, or as what a word such as ``force`` means."""
    assert took_effect(wanted, found) is effect


OOPS = [
    "[    5.0] BUG: kernel NULL pointer dereference, address: 0",
    "[    5.0] Oops: 0002 [#1] SMP",
    "[    5.0] RIP: 0010:f",
]
PANIC = ["[    6.0] Kernel panic - not syncing: Fatal exception", "[    6.0] Kernel Offset: disabled"]
OUT_OF_MEMORY = ["[    5.0] Out of memory: Killed process 148 (python3) total-vm:4522100kB, anon-rss:224504kB"]
INT3 = ["[    5.0] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI"]


@pytest.mark.parametrize(
    ("lines", "booted", "timeout", "outcome"),
    [
        (OOPS, True, None, BootOutcome.OOPS),
        (OOPS, True, "too late", BootOutcome.OOPS),
        ([*OOPS, *PANIC], True, None, BootOutcome.PANIC),
        (PANIC, True, None, BootOutcome.PANIC),
        (PANIC, False, None, BootOutcome.NO_BOOT),
        ([], False, "too late", BootOutcome.NO_BOOT),
        ([], True, "too late", BootOutcome.HANG),
        ([], True, None, BootOutcome.SUITE_DIED),
        (OUT_OF_MEMORY, True, None, BootOutcome.NOT_TESTED),
        ([*OUT_OF_MEMORY, *PANIC], True, None, BootOutcome.PANIC),
        (INT3, True, None, BootOutcome.EMULATOR_FAULT),
        ([*INT3, *PANIC], False, None, BootOutcome.EMULATOR_FAULT),
    ],
)
def test_diagnosis_by_console(lines: list[str], booted: bool, timeout: str | None, outcome: BootOutcome) -> None:
    """The console, whether init started, and an exceeded time limit decide how a kernel ended."""
    end = diagnose_console("\n".join(["[    0.0] Linux version 6.12", *lines]), booted, timeout, emulated=True)
    assert end.outcome is outcome


def test_int3_oops_on_hardware() -> None:
    """Without emulation an int3 oops is the kernel's."""
    assert diagnose_console("\n".join(INT3), True, None, emulated=False).outcome is BootOutcome.OOPS


def test_splats_before_and_since_init() -> None:
    """Reports of the boot are apart from those since init, which include those of loading KVM."""
    console = f"[  1.0] WARNING: early\n[  1.1] ---[ end trace 0 ]---\n[  2.0] {INIT_MARKER}\n[  3.0] WARNING: late\n"
    assert [splat.title for splat in splats_before_init(console)] == ["WARNING: early"]
    assert [splat.title for splat in splats_since_init(console)] == ["WARNING: late"]


@pytest.mark.parametrize(
    ("kernel", "arguments", "there", "here"),
    [
        ("auto", None, ["selftests", "--ignore=selftests/unit/"], ["selftests/unit"]),
        ("auto", ["selftests"], ["selftests", "--ignore=selftests/unit/"], ["selftests/unit"]),
        ("auto", ["."], [".", "--ignore=selftests/unit/"], ["selftests/unit"]),
        ("auto", ["selftests/unit/test_uapi.py::test_x"], [], ["selftests/unit/test_uapi.py::test_x"]),
        ("auto", ["selftests/matrix/test_x.py::test_x[a]"], ["selftests/matrix/test_x.py::test_x[a]"], []),
        ("debian:6.12", None, ["selftests", "--ignore=selftests/unit/"], []),
        ("debian:6.12", ["selftests/unit/boot/broken_kernel.py"], ["selftests/unit/boot/broken_kernel.py"], []),
    ],
)
def test_tests_in_kernel_and_on_host(
    kernel: str, arguments: list[str] | None, there: list[str], here: list[str]
) -> None:
    """With auto the suite's own tests run on the host, however they are named; a named kernel gets all tests."""
    sources = pytest.Config.ArgsSource
    config: Any = SimpleNamespace(
        getoption=lambda _name, default: default, option=SimpleNamespace(kernel=kernel),
        args_source=sources.ARGS if arguments else sources.TESTPATHS, args=arguments or ["selftests"],
        invocation_params=SimpleNamespace(dir=ROOT),
    )  # fmt: skip
    assert split_tests(config) == (there, [f"{ROOT / path}" for path in here])


NO_SELECTION = SimpleNamespace(keyword="", markexpr="", deselect=None, ignore=None, ignore_glob=None)


@pytest.mark.slow
def test_early_collection_with_a_python_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collection on this host finds modules where the user's PYTHONPATH has them, as pytest may be there."""
    (tmp_path / "sitecustomize.py").write_text("open(__file__ + '.ran', 'w')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    matching_tests(NO_SELECTION, [], ["selftests/interface/test_slots.py"])
    assert (tmp_path / "sitecustomize.py.ran").exists()


@pytest.mark.slow
def test_early_collection_compiles_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collection on this host leaves compiled test modules for the initramfs, whatever the user's environment."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    folder = ROOT / "selftests/interface/__pycache__"
    compiled = folder / f"test_slots.{sys.implementation.cache_tag}-pytest-{pytest.__version__}.pyc"
    compiled.unlink(missing_ok=True)
    number, with_threads = matching_tests(NO_SELECTION, [], ["selftests/interface/test_slots.py"])
    assert (number > 0, with_threads) == (True, 0)
    assert compiled.exists()


# A plugin with which a test without the marker threads fails if it starts one
WITHOUT_THREADS = """
import threading
import pytest

start = threading.Thread.start

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    def refuse(thread):
        raise AssertionError(f"{thread} is started by {item.nodeid}, which lacks the marker threads")
    if item.get_closest_marker("threads") is None:
        threading.Thread.start = refuse
    try:
        return (yield)
    finally:
        threading.Thread.start = start
"""


@pytest.mark.slow
@pytest.mark.usefixtures("kvm")
def test_marker_of_tests_with_threads(tmp_path: Path) -> None:
    """No test starts a thread that lacks the marker for it: it would run in a machine with one CPU."""
    command, environment = pytest_command(tmp_path, WITHOUT_THREADS)
    command += ["-m", "not threads", *map(str, contract_files())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stdout.splitlines() if "lacks the marker" in line]) == (0, [])


def test_contract_tests_count_as_tests_on_kvm(tmp_path: Path) -> None:
    """Each contract test has the fixture ``kvm``: without it, it would have one log mode, and no verdict on KVM."""
    command, environment = pytest_command(tmp_path, "")
    command += ["--collect-only", "-q", "-m", "not kvm", *map(str, contract_files())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert [line for line in done.stdout.splitlines() if "::" in line] == []
    assert "no test matches -m 'not kvm'" in done.stdout


CELL = "57bit-1g-anonymous_hugetlb_1gb-forced"
MATRIX = "selftests/matrix/test_dirty_log.py"


@pytest.mark.parametrize(
    "tests", [[MATRIX, "-k", CELL], [f"{MATRIX}::test_dirty_log[dirty-ring-{CELL}-sparse-2vcpus]"]], ids=["name", "id"]
)
@pytest.mark.slow
def test_cells_of_another_kernel_match(tests: list[str]) -> None:
    """A cell that this host lacks matches, as the booted kernel may have it."""
    number, with_threads = matching_tests(NO_SELECTION, [], tests)
    assert number == with_threads > 0


@pytest.mark.parametrize(
    ("kernel", "repeated"), [("auto", "/boot/vmlinuz-6.12"), ("debian:6.12", "debian:6.12")], ids=["chosen", "named"]
)
def test_options_to_reproduce_a_run(kernel: str, repeated: str) -> None:
    """The options to reproduce a run have the machine but for its CPUs, and the image that auto stood for."""
    given = {"kvm_params": "kvm.tdp_mmu=0", "qemu": None, "accel": "tcg", "cpu_model": None, "append": ""}
    option = SimpleNamespace(kernel=kernel, **given, vm_memory="3000", vm_cpus="4", machines=None, time_limit="60")
    assert kernel_options(option, Path("/boot/vmlinuz-6.12")) == [
        f"--kernel={repeated}", "--kvm-params=kvm.tdp_mmu=0", "--accel=tcg", "--vm-memory=3000", "--time-limit=60",
    ]  # fmt: skip


def test_reproduction_in_a_machine_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that reproduces a failure names as many CPUs as its machine had for tests."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 2})
    assert GuestSession("", "pytest --kernel=6.12", True, False).reproduce_command == "pytest --kernel=6.12 --vm-cpus=2"


def test_machine_for_tests_without_threads() -> None:
    """Every second machine has the CPUs of a machine for tests without threads; a single CPU needs no spare one."""
    qemu = Qemu(Emulator(("qemu",), "10.0", "here"), "tcg", "max", "kvm_amd")
    kernel: Any = SimpleNamespace(release="6.12", image=Path("x"))
    machine = Machine(3072, 2, "")
    same = target.Target(kernel, [], {}, {}, qemu, machine, 60, 3)
    other = target.Target(kernel, [], {}, {}, qemu, machine, 60, 3, Machine(3072, 1, ""))
    assert [one.booted_machine(threads).cpus for one in (same, other) for threads in (True, False)] == [2, 2, 2, 1]
    assert [qemu.has_spare_cpu(other.booted_machine(threads)) for threads in (True, False)] == [True, False]
    assert "3 of them share the tests (--machines)" in same.lines[3]
    assert "3 share the tests (--machines); 1 with 1 CPU, for tests without threads" in other.lines[3]


def test_auto_takes_a_kernel_with_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer local kernel that has no KVM is passed over."""
    without, with_kvm = (Kernel(tmp_path, release, tmp_path / release) for release in ("7.9", "6.1"))
    for kernel, built_in in ((without, ""), (with_kvm, "kvm.ko\nkvm-amd.ko\n")):
        kernel.modules.mkdir()
        (kernel.modules / "modules.builtin").write_text(built_in)
    qemu = Qemu(Emulator(("qemu",), "10.0.13", "here"), "tcg", "max", "kvm_amd")
    monkeypatch.setattr(target, "local_kernels", lambda: [without, with_kvm])
    monkeypatch.setattr(target, "find_qemu", lambda *_: qemu)
    assert target.find_target(None, "", None, None, None, Machine(1, 1, ""), 1).kernel == with_kvm


@pytest.mark.parametrize("spelling", ["--results=out", "--results out"])
def test_paths_of_check_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    """Paths are relative to the user's folder, in both spellings of an option; names to look up are unchanged."""
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "no kernel is named"),
        (["-v"], "no kernel is named"),
        (["auto"], "auto is no kernel to check"),
        (["6.1", "--kernel=x"], "--kernel: the kernel is named already"),
    ],
    ids=["empty", "option", "auto", "twice"],
)
def test_kernel_of_check_kernel(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    """A kernel that is not named, not by name, or named twice, is one line with the status that ends a bisection."""
    assert check_kernel.main(arguments) == 128
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"check_kernel.py: {message}")


def test_usage_of_check_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    """Its usage lists every exit status."""
    assert check_kernel.main(["--help"]) == 0
    listed = re.findall(r"^  (\d+) ", capsys.readouterr().out, re.MULTILINE)
    assert listed == ["0", "1", "125", "128", "130"]


def test_exit_status_of_each_outcome() -> None:
    """Each outcome has the exit status by which git bisect run marks a commit bad or skips it."""
    bad = {BootOutcome.PANIC, BootOutcome.OOPS, BootOutcome.HANG, BootOutcome.SUITE_DIED}
    assert {outcome: outcome.exit_status for outcome in BootOutcome} == {
        outcome: 0 if outcome is BootOutcome.FINISHED else 1 if outcome in bad else 125 for outcome in BootOutcome
    }


def test_kernel_log_of_a_console() -> None:
    """The kernel's log is the lines of the console with a timestamp."""
    assert kernel_log("SeaBIOS\n[    0.000000] Linux version\nguest_init: x\n[   12.5][ T1] y\n") == (
        "[    0.000000] Linux version\n[   12.5][ T1] y\n"
    )


def test_archive_for_cpio(tmp_path: Path) -> None:
    """An archive has a header for each folder and file, and cpio extracts it."""
    file = io.BytesIO()
    archive = CpioWriter(file)
    archive.add_file("/a/b/c.txt", b"hello", 0o755)
    archive.finish()
    data = file.getvalue()
    assert (len(data) % 4, data.index(b"070701")) == (0, 0)
    assert data.count(b"070701") == 4  # a, a/b, the file, the trailer
    assert int(data[data.index(b"a/b/c.txt\0") - 110 + 14 :][:8], 16) == stat.S_IFREG | 0o755
    if shutil.which("cpio"):
        subprocess.run(["cpio", "-id", "--quiet"], input=data, cwd=tmp_path, check=True)
        assert (tmp_path / "a/b/c.txt").read_text() == "hello"


def test_table_of_several_runs() -> None:
    """The table has a line per cell and a column per run, with a dash for a cell that a run lacks."""
    small, large = ({"log_mode": "dirty-log", "guest_mode": "48bit-4k", "vcpus": vcpus} for vcpus in (1, 2))
    passed = small | {"verdict": "pass"}
    *lines, legend = cross_table(["A", "B"], [[passed, large | {"verdict": "skipped"}], [small | {"verdict": "FAIL"}]])
    assert [line.split()[2:] for line in lines[1:]] == [["1", "pass", "FAIL"], ["2", "skip", "-"]]
    assert legend == "(skip: skipped; -: no cell of that run)"
    assert len(cross_table(["A"], [[passed]])) == 2  # nothing to explain


def test_table_of_test_functions() -> None:
    """The table has a line per function with its cases counted; tests that ran nowhere are named with the reason."""

    def row(test: str, verdict: str, reason: str = "") -> dict[str, str]:
        return {"test": f"selftests/test_a.py::{test}", "verdict": verdict, "reason": reason}

    first = [row("test_b[x]", "pass"), row("test_b[y]", "skipped", "no SMM"), row("test_c", "skipped", "no AVX")]
    failed = [row("test_b[x]", "FAIL"), row("test_b[z]", "FAIL")]
    second = [*failed, row("test_c", "known bug"), row("test_c", "known bug, not seen")]
    *lines, legend = cross_table_of_tests(["A", "B"], [first, second])
    assert [line.split() for line in lines] == [
        ["A", "B", "test"],
        ["1", "1s", "2F", "test_a.py::test_b"],
        ["1s", "2k", "test_a.py::test_c"],
    ]
    assert legend == "(4 3k 2s 1F: 4 passed, 3 have a known bug, 2 skipped or not run, 1 failed)"
    assert skipped_everywhere([first, [*failed, row("test_b[y]", "pass")]]) == ["selftests/test_a.py::test_c: no AVX"]


def test_reasons_of_untested_tests() -> None:
    """There is a line per reason, the most frequent first, with the files of its tests."""
    lines = untested_lines(
        {
            "no SMM": ["selftests/x86_64/test_smm.py::test_a"],
            "48bit-1g: no PDPE1GB": ["selftests/test_c.py::c"],
            "no SVM: it is off": [
                *(f"selftests/x86_64/test_b.py::test_b[{case}]" for case in "xy"),
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
