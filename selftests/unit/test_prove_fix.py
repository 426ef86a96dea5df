# SPDX-License-Identifier: GPL-2.0-only
"""``make prove-fix``: which verdicts prove a patch, the tests and kernels that it runs, and its errors."""

import lzma
import shutil
import time
from pathlib import Path

import pytest

from runner import prove_fix
from runner.errors import CannotTest
from runner.kernel import Kernel
from runner.kernel_source import SourceTree, fetch_source

OWN = {"test_own"}
BEFORE = {
    "a.py::test_own[x]": "FAIL",
    "a.py::test_own[y]": "pass",
    "a.py::test_other": "FAIL",
    "a.py::test_good": "pass",
}
FIXED = BEFORE | {"a.py::test_own[x]": "pass"}


def without(verdicts: dict[str, str], test: str) -> dict[str, str]:
    """*verdicts* of a run in which *test* did not run."""
    return {name: verdict for name, verdict in verdicts.items() if name != test}


def test_fixed_test_of_the_bug_is_a_proof() -> None:
    """A patch is proven if the tests of the bug that fail without it pass with it, and no other verdict changes."""
    assert prove_fix.find_problems(BEFORE, FIXED, OWN) == []


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (FIXED, FIXED, "no test of the bug fails without the patch"),
        (BEFORE, BEFORE, "a.py::test_own[x] does not pass with the patch: FAIL"),
        (BEFORE, without(FIXED, "a.py::test_own[x]"), "a.py::test_own[x] does not pass with the patch: not run"),
        (BEFORE, FIXED | {"a.py::test_own[y]": "FAIL"}, "a.py::test_own[y] is not of the bug, or did not fail, and changes"),
        (BEFORE, FIXED | {"a.py::test_other": "pass"}, "a.py::test_other is not of the bug, or did not fail, and changes"),
        (BEFORE, FIXED | {"a.py::test_good": "FAIL"}, "a.py::test_good is not of the bug, or did not fail, and changes"),
        (BEFORE, without(FIXED, "a.py::test_good"), "changes: pass, then not run"),
        (without(BEFORE, "a.py::test_good"), FIXED, "changes: not run, then pass"),
    ],
    ids=["bug-not-seen", "not-fixed", "own-not-run", "own-broken", "other-fixed", "other-broken", "lost", "new"],
)  # fmt: skip
def test_verdicts_that_are_no_proof(before: dict[str, str], after: dict[str, str], problem: str) -> None:
    """Each other change of a verdict, and a bug that does not show, are reasons why a patch is not proven."""
    (found,) = prove_fix.find_problems(before, after, OWN)
    assert problem in found


def test_tests_of_a_family_of_entries() -> None:
    """The tests of a bug are those of all its entries that always show it; the files are those that define them."""
    assert prove_fix.tests_of("ring-reset-interrupted") == {"test_interrupted_reset_write_protects"}
    every = prove_fix.tests_of("")
    assert "test_clear_ending_on_huge_page_start" in every
    assert "test_dense_writer_never_overruns_its_ring" not in every
    assert [prove_fix.files_with(test) for test in sorted(every) if len(prove_fix.files_with(test)) != 1] == []


def test_kernel_with_other_modules(tmp_path: Path) -> None:
    """A kernel's copy has the given modules in place of its own, and all else that it had."""
    modules = tmp_path / "kernel/lib/modules/1.2"
    for name in (
        "kernel/arch/x86/kvm/kvm.ko.xz",
        "kernel/arch/x86/kvm/kvm-amd.ko.xz",
        "kernel/virt/lib/irqbypass.ko.xz",
    ):
        (modules / name).parent.mkdir(parents=True, exist_ok=True)
        (modules / name).write_text("old")
    (tmp_path / "image").write_text("image")
    (tmp_path / "kvm.ko").write_text("new")
    copy = prove_fix.with_modules(Kernel(tmp_path / "image", "1.2", modules), [tmp_path / "kvm.ko"], tmp_path / "copy")
    files = {path.name: path.read_text() for path in copy.rglob("*") if path.is_file()}
    assert files == {"vmlinuz-1.2": "image", "kvm.ko": "new", "kvm-amd.ko.xz": "old", "irqbypass.ko.xz": "old"}


@pytest.mark.parametrize("words", [[], ["no-such-bug"], ["ring-reset-interrupted", "more"], ["--help"]], ids=str)
def test_unknown_bug_is_an_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Anything but one bug that has a folder is one line with those that have, and status 128."""
    assert prove_fix.main(words) == 128
    (line,) = capsys.readouterr().err.splitlines()
    assert "one of clear-misses-huge-page, " in line


def make_packages(folder: Path, version: str) -> Path:
    """A folder as the packages of a kernel's source and configuration leave it, with a tree that cannot be built."""
    major, minor, sub = version.split(".")
    tree = folder / "linux-source"
    tree.mkdir()
    (tree / "Makefile").write_text(f"VERSION = {major}\nPATCHLEVEL = {minor}\nSUBLEVEL = {sub}\n")
    packages = folder / "packages/usr/src"
    (packages / "linux-config-7.2").mkdir(parents=True)
    shutil.make_archive(str(packages / "linux-source-7.2"), "xztar", folder, "linux-source")
    (packages / "linux-config-7.2/config.amd64_none_cloud-amd64.xz").write_bytes(lzma.compress(b"CONFIG_KVM=m\n"))
    return folder / "packages"


@pytest.mark.parametrize(
    ("release", "left", "message"),
    [
        ("7.2.1+deb14-cloud-amd64", 60, r"the source is of 7\.2\.13, the kernel is 7\.2\.1\+deb14-cloud-amd64: remove"),
        ("7.2.13+deb14-cloud-amd64", 60, "make olddefconfig failed: .*olddefconfig.* \\(apt install gcc"),
        ("7.2.13+deb14-cloud-amd64", 0, "tar -xf: the time is over"),
    ],
    ids=["other-version", "does-not-build", "no-time"],
)  # fmt: skip
def test_source_that_cannot_be_built(tmp_path: Path, release: str, left: float, message: str) -> None:
    """A source of another version, one that does not build, and one that takes too long are one line with the reason."""
    if missing := [tool for tool in ("make", "tar", "xz") if shutil.which(tool) is None]:
        pytest.skip(f"no {', '.join(missing)} on this machine")
    (tmp_path / "tree").mkdir()
    packages = make_packages(tmp_path, "7.2.13")
    with pytest.raises(CannotTest, match=message):
        SourceTree(packages, Kernel(tmp_path, release, tmp_path), tmp_path / "tree", time.monotonic() + left)


def test_missing_programs_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel is built with, and this machine lacks, is one line with the command that installs it."""
    monkeypatch.setattr("shutil.which", lambda name: None if name in ("flex", "pahole") else f"/usr/bin/{name}")
    with pytest.raises(CannotTest, match=r"a kernel is built with flex, pahole, which .* \(apt install .* dwarves "):
        fetch_source("7.2")
