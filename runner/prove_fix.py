# SPDX-License-Identifier: GPL-2.0-only
"""python -m runner.prove_fix BUG: show that the patch of a bug (bugs/BUG/fix.patch) fixes that bug's tests, and only those.

It builds KVM's modules of a Debian kernel without and with the patch, boots that kernel with each, runs the files that have
the tests of known bugs, and compares the verdicts. Exit status: 0 when exactly the tests of BUG change from fail to pass, 1
when not, 125 when that cannot be tested, 128 when there is no such bug, 130 when interrupted.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from harness import known_bugs
from harness.output_paths import new_folder
from harness.saved_run import CompareError, Result, SavedRun
from runner import ROOT
from runner.errors import CANNOT_TEST, CannotTest
from runner.kernel import Kernel, find_kernel
from runner.kernel_source import SourceTree, fetch_source
from runner.store import BUILD, locked, say, scratch, shown
from runner.waiting import duration

SERIES = "7.2"  # the kernel that the patches are for
BACKEND = "kvm_amd"  # the one that is emulated
TIME_LIMIT = 3600  # seconds, for all of it
# Without eager page splitting each of the bugs shows.
PARAMETERS = "kvm.eager_page_split=0"


def main(arguments: list[str]) -> int:
    """Show it for the bug that *arguments* name."""
    bugs = sorted(path.name for path in (ROOT / "bugs").glob("*/"))
    if len(arguments) != 1 or arguments[0] not in bugs:
        say(f"usage: python -m runner.prove_fix BUG, one of {', '.join(bugs)}")
        return 128
    try:
        return prove(arguments[0], time.monotonic() + TIME_LIMIT)
    except (CannotTest, CompareError) as error:
        say(f"cannot be tested: {error}")
        return CANNOT_TEST
    except OSError as error:
        say(f"cannot be tested: {error.filename or BUILD}: {error.strerror}")
        return CANNOT_TEST
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def prove(bug: str, deadline: float) -> int:
    """Build, boot and compare.

    :returns: the exit status
    """
    started = time.monotonic()
    kernel, packages = find_kernel(f"debian:{SERIES}"), fetch_source(SERIES)
    results = new_folder(f"prove-fix-{bug}")
    with locked(BUILD / "prove-fix"), scratch(BUILD / "prove-fix") as folder:
        (folder / "source").mkdir()
        tree = SourceTree(packages, kernel, folder / "source", deadline)
        without = with_modules(kernel, tree.build_kvm(), folder / "without")
        tree.apply(ROOT / "bugs" / bug / "fix.patch")
        patched = with_modules(kernel, tree.build_kvm(), folder / "with")
        before, after = (run(root, results / root.name, deadline) for root in (without, patched))
    problems = find_problems(before, after, tests_of(bug))
    for test in sorted(before):
        if before[test] != after.get(test):
            print(f"{test}: {before[test]} without the patch, {after.get(test, 'not run')} with it")
    for problem in problems:
        print(f"not proven: {problem}")
    if not problems:
        unchanged = sum(verdict == after[test] for test, verdict in before.items())
        print(f"proven: these tests are fixed, and {unchanged} have the same verdict with the patch and without")
    print(f"{kernel.release}, {PARAMETERS}; {duration(time.monotonic() - started)}; files: {shown(results)}")
    return 1 if problems else 0


def with_modules(kernel: Kernel, modules: list[Path], root: Path) -> Path:
    """A copy of *kernel*, in *root*, with other KVM modules."""
    copy = root / "lib" / "modules" / kernel.release
    shutil.copytree(kernel.modules, copy)
    (root / "boot").mkdir()
    shutil.copy(kernel.image, root / "boot" / f"vmlinuz-{kernel.release}")
    for module in modules:
        for old in copy.rglob(f"{module.name}*"):
            old.unlink()
        shutil.copy(module, copy / "kernel")
    return root


def run(root: Path, results: Path, deadline: float) -> dict[str, str]:
    """Run the tests in the kernel in *root*.

    :returns: the verdict of each test that ran
    """
    files = sorted({file for name in tests_of("") for file in files_with(name)})
    command = [sys.executable, str(ROOT / "runner" / "check_kernel.py"), str(root), f"--kvm-params={PARAMETERS}"]
    command += ["--no-known-bugs", f"--results={results}", *files]
    say(f"testing the kernel {root.name} the patch: {' '.join(files)}")
    try:
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False, timeout=max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        raise CannotTest(f"the time of {duration(TIME_LIMIT)} is over") from None
    saved = SavedRun.load(results)
    if saved.death or saved.cut_short:
        raise CannotTest(f"the run of the kernel {root.name} the patch ended early: see {shown(results)}")
    return verdicts(saved.tests)


def verdicts(tests: Mapping[str, Result]) -> dict[str, str]:
    """The verdict of each of *tests* that ran."""
    return {test: result.verdict for test, result in tests.items() if result.ran}


def tests_of(bug: str) -> set[str]:
    """The test functions that always show *bug*, the name of a folder below bugs/; with an empty name, any of them."""
    entries = [entry for entry in known_bugs.load() if BACKEND in entry.backend and entry.always]
    return {test for entry in entries if not bug or entry.is_of(bug) for test in entry.tests}


def files_with(test: str) -> list[str]:
    """The files that define the function *test*."""
    files = (ROOT / "selftests").glob("*/test_*.py")
    return [str(file.relative_to(ROOT)) for file in files if f"\ndef {test}(" in file.read_text(encoding="utf-8")]


def find_problems(before: Mapping[str, str], after: Mapping[str, str], own: set[str]) -> list[str]:
    """Why the verdicts without the patch and with it do not show that it fixes the tests of *own* functions and no others."""
    concerned = {test for test in {*before, *after} if function_of(test) in own}
    shows = {test for test in concerned if before.get(test) == "FAIL"}
    problems = [] if shows else ["no test of the bug fails without the patch"]
    for test in sorted({*before, *after}):
        old, new = before.get(test, "not run"), after.get(test, "not run")
        if test in shows and new != "pass":
            problems.append(f"{test} does not pass with the patch: {new}")
        elif test not in shows and old != new:
            problems.append(f"{test} is not of the bug, or did not fail, and changes: {old}, then {new}")
    return problems


def function_of(test: str) -> str:
    """The name of a test's function, by its id."""
    return test.partition("[")[0].rpartition("::")[2]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
