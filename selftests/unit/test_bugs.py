# SPDX-License-Identifier: GPL-2.0-only
"""The folders below bugs/: one for each known bug of mainline, with a reproducer, a patch, and what they are about."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import known_bugs
from runner import ROOT

BUGS = ROOT / "bugs"
FOLDERS = sorted(path.name for path in BUGS.glob("*/"))
MAINLINE = {"kvm_amd", "kvm_intel"}
MOST_LINES = 150
# As kernel code is compiled by its selftests, and strictly
GCC = ["gcc", "-Wall", "-Wextra", "-Werror", "-O2", "-c", "-o", "/dev/null"]
FIXES = re.compile(r'Fixes: [0-9a-f]{12} \("KVM: .*"\)')


def problems_of(folder: Path) -> Iterator[str]:
    """What a folder lacks, and what is wrong in its README and its patch."""
    if missing := {"README.md", "reproducer.c", "fix.patch"} - {path.name for path in folder.iterdir()}:
        yield f"no {', '.join(sorted(missing))}"
        return
    readme, patch = ((folder / name).read_text() for name in ("README.md", "fix.patch"))
    if not patch.startswith("From ") or not re.search(r"^Subject: \[PATCH\] KVM: ", patch, re.MULTILINE):
        yield "fix.patch: not what git format-patch writes for KVM"
    if re.search(r"^Signed-off-by:", patch, re.MULTILINE):
        yield "fix.patch: signed off by somebody; its sender does that"
    fixes = FIXES.findall(patch)
    if len(fixes) != 1 or FIXES.findall(readme) != fixes:
        yield "README.md and fix.patch: not the same one Fixes: line in both"
    lines = (folder / "reproducer.c").read_text().splitlines()
    if lines[0] != "// SPDX-License-Identifier: GPL-2.0-only":
        yield "reproducer.c: no licence in its first line"
    if len(lines) >= MOST_LINES:
        yield f"reproducer.c: {len(lines)} lines, must be below {MOST_LINES}"


def compile_reproducer(folder: Path, empty: Path) -> str:
    """Compile the folder's reproducer as the only file in the folder *empty*; what gcc says against it."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc (apt install gcc libc6-dev)")
    source = shutil.copy(folder / "reproducer.c", empty)
    errors = subprocess.run([*GCC, source], capture_output=True, text=True, check=False).stderr
    if "linux/kvm.h: No such file" in errors:
        pytest.skip("no <linux/kvm.h> (apt install linux-libc-dev)")
    return errors


def test_folder_for_each_mainline_bug() -> None:
    """Each known bug of a vendor module of mainline has one folder, and each folder is about such a bug."""
    folders = {
        bug.id: [name for name in FOLDERS if bug.is_of(name)]
        for bug in known_bugs.load()
        if MAINLINE & set(bug.backend)
    }
    assert {len(names) for names in folders.values()} == {1}, folders
    assert sorted({names[0] for names in folders.values()}) == FOLDERS
    assert not any(bug.is_of(name) for bug in known_bugs.load() if bug.id not in folders for name in FOLDERS)


def test_folder_is_in_the_lists() -> None:
    """The list of folders, and the table of bugs in docs/results.md, have a link to each folder's README."""
    for document, path in ((BUGS / "README.md", "{}/README.md"), (ROOT / "docs/results.md", "../bugs/{}/README.md")):
        linked = document.read_text()
        assert [name for name in FOLDERS if f"({path.format(name)})" not in linked] == [], document


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_of_a_bug_is_complete(name: str) -> None:
    """A folder has a README and a patch that name the same commit, and a reproducer that is short."""
    assert list(problems_of(BUGS / name)) == []


@pytest.mark.parametrize("name", FOLDERS)
def test_reproducer_compiles_alone(name: str, tmp_path: Path) -> None:
    """A reproducer compiles without a warning, and needs no other file."""
    assert compile_reproducer(BUGS / name, tmp_path) == ""


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("README.md", "Fixes: ", "Since ", "not the same one Fixes: line"),
        ("fix.patch", "Fixes: 4", "Fixes: 5", "not the same one Fixes: line"),
        ("fix.patch", "From ", "diff ", "not what git format-patch writes"),
        ("fix.patch", "\n---\n", "\nSigned-off-by: A B <a@b.org>\n---\n", "signed off"),
        ("reproducer.c", "// SPDX", "// PDX", "no licence"),
        ("reproducer.c", "int main", "\n" * MOST_LINES + "int main", "must be below"),
    ],
)
def test_mistake_in_the_folder_of_a_bug(file: str, old: str, new: str, problem: str, tmp_path: Path) -> None:
    """Each mistake in a folder's files is found."""
    folder = Path(shutil.copytree(BUGS / "ring-reset-interrupted", tmp_path / "copy"))
    text = (folder / file).read_text()
    (folder / file).write_text(text.replace(old, new, 1))
    (found,) = problems_of(folder)
    assert problem in found


@pytest.mark.parametrize("wrong", ['#include "kvm_util.h"', "int unused(void) { int x; return 0; }"])
def test_mistake_in_a_reproducer(wrong: str, tmp_path: Path) -> None:
    """A reproducer that needs another file, or that gcc warns about, does not pass."""
    folder = Path(shutil.copytree(BUGS / "ring-reset-interrupted", tmp_path / "copy"))
    source = folder / "reproducer.c"
    source.write_text(source.read_text() + wrong)
    (tmp_path / "empty").mkdir()
    assert "error: " in compile_reproducer(folder, tmp_path / "empty")


def test_missing_file_in_the_folder(tmp_path: Path) -> None:
    """A folder without a patch is not complete."""
    folder = Path(shutil.copytree(BUGS / "ring-reset-interrupted", tmp_path / "copy"))
    (folder / "fix.patch").unlink()
    assert list(problems_of(folder)) == ["no fix.patch"]
