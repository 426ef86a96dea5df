# SPDX-License-Identifier: GPL-2.0-only
"""``make coverage``: GCOV's counters of a program, which functions it is about, and its errors."""

import base64
import shutil
import subprocess
from pathlib import Path

import pytest

from runner import coverage, gcov
from runner.errors import CannotTest

SOURCE = """\
#include <stdlib.h>
#include <string.h>

static inline int mark_page_dirty(int page)
{
	if (page > 9)
		return 1;
	return 0;
}

static int write_guest(int page)
{
	return mark_page_dirty(page);
}

static int unrelated(int page)
{
	return page;
}

int main(int argc, char **argv)
{
	if (argc > 1)
		return write_guest(atoi(argv[1]));
	return unrelated(0);
}
"""
FILE = "arch/x86/kvm/x.c"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A build tree of a kernel whose KVM is one program, which counts."""
    if shutil.which("gcc") is None or shutil.which("gcov") is None:
        pytest.skip("no gcc with gcov (apt install gcc)")
    root = tmp_path / "linux"
    (root / FILE).parent.mkdir(parents=True)
    (root / FILE).write_text(SOURCE)
    (root / ".config").write_text("CONFIG_GCOV_KERNEL=y\nCONFIG_DEBUG_FS=y\n")
    subprocess.run(["gcc", "--coverage", "-c", FILE, "-o", "arch/x86/kvm/x.o"], cwd=root, check=True)
    subprocess.run(["gcc", "--coverage", "arch/x86/kvm/x.o", "-o", "program"], cwd=root, check=True)
    return root


def run(tree: Path, results: Path, machine: str, *arguments: str) -> None:
    """Run the program, and keep its counters as those of *machine*."""
    counters = tree / "arch/x86/kvm/x.gcda"
    subprocess.run([tree / "program", *arguments], check=False)
    gcov.save(results, machine, str(counters), base64.b64encode(counters.read_bytes()).decode())
    counters.unlink()


def lines_of(functions: gcov.Functions) -> dict[str, list[int]]:
    """How often the lines of each function were executed."""
    return {one.name: [one.lines[line] for line in sorted(one.lines)] for one in functions.values()}


def test_counters_of_machines_add_up(tree: Path, tmp_path: Path) -> None:
    """The counters of all machines and runs are added up, line by line."""
    a, b = tmp_path / "a", tmp_path / "b"
    run(tree, a, "kernel", "1")
    assert lines_of(gcov.read(tree, [a]))["mark_page_dirty"] == [1, 1, 0, 1]
    run(tree, a, "kernel-2", "10")
    run(tree, b, "kernel")
    found = lines_of(gcov.read(tree, [a, b]))
    assert found["mark_page_dirty"] == [2, 2, 1, 1]
    assert found["unrelated"] == [1, 1]


def test_functions_that_track_dirty_pages(tree: Path, tmp_path: Path) -> None:
    """Functions are chosen by their names and by what they call; those of other folders are left out."""
    run(tree, tmp_path, "kernel")
    functions = gcov.read(tree, [tmp_path])
    assert {one.name for one in coverage.relevant(functions, tree).values()} == {"mark_page_dirty", "write_guest"}
    for one in functions.values():
        one.file = f"mm/{one.file}"
    with pytest.raises(CannotTest, match="none of what was counted is of"):
        coverage.relevant(functions, tree)


def test_table_and_details(tree: Path, tmp_path: Path) -> None:
    """The table has the shares of lines, also of the C tests, and the details have each line that was not executed."""
    run(tree, tmp_path / "suite", "kernel", "1")
    run(tree, tmp_path / "c", "kernel", "10")
    suite, c_tests = (coverage.relevant(gcov.read(tree, [tmp_path / name]), tree) for name in ("suite", "c"))
    assert [line.split() for line in coverage.summary(suite, c_tests)[1:]] == [
        [FILE, "2", "of", "2", "6", "5", "(83.3", "%)", "5", "(83.3", "%)"],
        ["all", "2", "of", "2", "6", "5", "(83.3", "%)", "5", "(83.3", "%)"],
    ]
    assert "by the C tests" not in coverage.summary(suite, {})[0]
    details = coverage.details(suite, c_tests, tree)
    assert f"{FILE}:4 mark_page_dirty: 3 (75.0 %) of 4" in details
    assert "  C      7 \t\treturn 1;" in details
    assert "  C      8 \treturn 0;" not in details


def test_build_tree_without_counters(tree: Path, tmp_path: Path) -> None:
    """A tree that is not built for it is refused with what it lacks."""
    coverage.check_tree(tree)
    for path in tree.rglob("*.gcno"):
        path.unlink()
    with pytest.raises(CannotTest, match="begin arch/x86/kvm/Makefile with GCOV_PROFILE := y"):
        coverage.check_tree(tree)
    (tree / ".config").write_text("CONFIG_DEBUG_FS=y\n")
    with pytest.raises(CannotTest, match=r"linux lacks CONFIG_GCOV_KERNEL$"):
        coverage.check_tree(tree)
    with pytest.raises(CannotTest, match=r"has no \.config"):
        coverage.check_tree(tmp_path)


def test_counters_that_are_missing(tree: Path, tmp_path: Path) -> None:
    """A run without counters, and counters of another build, are errors that say so."""
    with pytest.raises(CannotTest, match="has sent no counters"):
        gcov.read(tree, [tmp_path])
    run(tree, tmp_path, "kernel")
    for path in tree.rglob("*.gcno"):
        path.unlink()
    with pytest.raises(CannotTest, match=r"x\.gcno is missing: the kernel was built in another folder"):
        gcov.read(tree, [tmp_path])


@pytest.mark.parametrize("words", [["tree"], ["tree", "", "--results=x"], ["tree", "", "--kernel", "y"]], ids=" ".join)
def test_wrong_words_of_coverage(words: list[str]) -> None:
    """Missing words, and options that coverage.py sets itself, end it with status 128 before anything runs."""
    assert coverage.main(words) == 128


def test_gcov_that_is_missing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without gcov, and one whose gcov cannot read what GCC wrote, are errors before anything runs."""
    (notes,) = tree.rglob("*.gcno")
    notes.write_bytes(b"oncg" + bytes(60))
    with pytest.raises(CannotTest, match="it has to be of the GCC that built the kernel"):
        coverage.check_tree(tree)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(CannotTest, match=r"no gcov \(apt install gcc\)"):
        coverage.check_tree(tree)


def test_selftests_that_are_built(tmp_path: Path) -> None:
    """The C selftests are the programs that have a source beside them, or in a folder of the architecture."""
    folder = tmp_path / coverage._C_TESTS
    for name in ("dirty_log_test", "x86/smm_test", "lib/guest_modes", "run.sh"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch(0o755)
    for name in ("dirty_log_test.c", "x86/smm_test.c", "x86/not_built_test.c"):
        (folder / name).touch(0o644)
    assert [path.name for path in coverage.c_selftests(tmp_path)] == ["dirty_log_test", "smm_test"]
