# SPDX-License-Identifier: GPL-2.0-only
"""Which of the kernel's code that tracks dirty pages the tests execute; see _USAGE."""

import os
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":
    # Python puts the program's own folder there; and the user may have taken any Python.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from runner.unmet import leave, unmet

    if reason := unmet():
        leave(reason, 128)

from harness.output_paths import new_folder
from runner import gcov, initramfs
from runner.arch import this_arch
from runner.errors import CANNOT_TEST, CannotTest
from runner.gcov import Function, Functions
from runner.kernel import find_kernel
from runner.kernel_runs import Planned, Runs, split_options
from runner.modules import parse_parameters
from runner.program_boot import PROGRAMS, boot_programs
from runner.qemu import Machine
from runner.run_verdicts import INTERRUPTED, NOT_RUN, USAGE_ERROR
from runner.store import say, shown
from runner.suite_pytest import make_absolute

_USAGE = """\
usage: coverage.py TREE PARAMETERS [options of check_kernel.py, and tests to run]

Runs the suite in the kernel of the build tree TREE, and says which lines of the functions that track dirty pages it executed.
TREE is built with CONFIG_GCOV_KERNEL, and its KVM with GCOV_PROFILE := y (docs/coverage.md). PARAMETERS are of KVM's modules;
if they are empty the suite runs three times, with each of KVM's MMUs. If the kernel's KVM selftests are built in TREE, they
run too, for comparison.

exit status
  0    it was measured, whatever the tests' verdicts
  125  it cannot be measured
  128  TREE and PARAMETERS are missing, or an option is wrong
  130  interrupted"""

# The functions that it is about. By name: those of logging, write protection, splitting, zapping and memslots ...
NAMED = re.compile(
    r"(?<!vmcb_is_)(?<!register_mark_)dirty(?!_debug)|write_protect|wrprot|page_track|split|zap|collapsible|recover_huge|hugepage"
    r"|memslot|memory_region|unmap_gfn|age_gfn|(make|set|sync)_spte|mmu_spte_|fast_pf_fix|(?<!inject_)(?<!emulated_)page_fault"
    r"|direct_map|mmu_map|vcpu_(un)?map$|pml|pre_?(fault|fetch)"
)
# ... by what they call: those that mark a page, or write guest memory ...
CALLING = re.compile(
    r"mark_page_dirty(_in_slot)?\(|gpc_mark_dirty_in_slot\(|\bkvm_(vcpu_)?(write|clear)_guest|\bkvm_vcpu_unmap\(|\bkvm_dirty_ring_push\("
)
# ... and by their files.
FILES = ("virt/kvm/dirty_ring.c", "virt/kvm/pfncache.c", "arch/x86/kvm/mmu/tdp_mmu.c", "arch/x86/kvm/mmu/tdp_iter.c")
_KVM = ("arch/x86/kvm/", "virt/kvm/", "include/linux/kvm")
# KVM's three ways to map a guest: the TDP MMU, nested paging without it, and shadow paging
_PARAMETERS = ("kvm_amd.npt=1", "kvm_amd.npt=1 kvm.tdp_mmu=0 kvm.eager_page_split=0", "kvm_amd.npt=0")
_C_TESTS = "tools/testing/selftests/kvm"
_C_SILENCE = 300  # seconds without a message in the kernel that runs the C tests
_C_MEMORY = 4096  # MiB of its machine


def main(arguments: list[str]) -> int:
    """Measure it for the tree that *arguments* name."""
    if len(arguments) < 2 or {"-h", "--help"} & {*arguments}:
        print(_USAGE)
        return 0 if len(arguments) >= 2 else USAGE_ERROR
    if given := split_options(arguments[2:], ["--results", "--kernel", "--kvm-params"])[0]:
        say(
            f"coverage.py: {', '.join(given)}: TREE and PARAMETERS say which kernel runs, and the results have a folder"
        )
        return USAGE_ERROR
    try:
        return measure(Path(arguments[0]).expanduser(), arguments[1], make_absolute(arguments[2:]))
    except CannotTest as error:
        say(f"cannot be measured: {error}")
        return CANNOT_TEST
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def measure(tree: Path, parameters: str, options: Sequence[str]) -> int:
    """Run the tests, and print and keep what they executed.

    :returns: the exit status
    """
    check_tree(tree)
    folder = new_folder("coverage")
    sets = [parameters] if parameters.strip() else list(_PARAMETERS)
    planned = [
        Planned(str(tree), one, folder / f"suite-{number}", ["--gcov", *options]) for number, one in enumerate(sets, 1)
    ]
    statuses = {result.status for result in Runs(1, last_status=CANNOT_TEST).run(planned)}
    if statuses & {INTERRUPTED, NOT_RUN}:
        raise KeyboardInterrupt
    suite = relevant(gcov.read(tree, [run.folder for run in planned]), tree)
    c_tests: Functions = {}
    try:
        c_tests = gcov.read(tree, run_c_tests(tree, sets, folder))
    except CannotTest as error:  # what the suite executed is known all the same
        say(f"without the kernel's own selftests, for comparison: {error}")
    (folder / "coverage.txt").write_text("\n".join(details(suite, c_tests, tree)) + "\n", encoding="utf-8")
    print("\n".join(summary(suite, c_tests)))
    print(f"with {', and with '.join(sets)}; each line that was not executed: {shown(folder / 'coverage.txt')}")
    return 0


def check_tree(tree: Path) -> None:
    """Check that *tree* is a kernel's build tree whose KVM counts what it executes.

    :raises CannotTest: it is not
    """
    config = tree / ".config"
    if not config.is_file():
        raise CannotTest(f"{tree} is no build tree of a kernel: it has no .config")
    missing = [name for name in ("GCOV_KERNEL", "DEBUG_FS") if f"CONFIG_{name}=y" not in config.read_text()]
    if missing:
        raise CannotTest(f"the kernel in {tree} lacks {', '.join(f'CONFIG_{name}' for name in missing)}")
    notes = next((tree / "arch/x86/kvm").glob("*.gcno"), None)
    if notes is None:
        raise CannotTest(f"KVM in {tree} is built without counters: begin arch/x86/kvm/Makefile with GCOV_PROFILE := y")
    gcov.check(notes)


def c_selftests(tree: Path) -> list[Path]:
    """The KVM selftests that are built in *tree*."""
    found = (path for path in (tree / _C_TESTS).rglob("*") if path.with_suffix(".c").is_file() or _in_arch(path))
    return sorted(path for path in found if path.is_file() and not path.suffix and os.access(path, os.X_OK))


def _in_arch(path: Path) -> bool:
    """Whether the source of a program is in a folder of its architecture."""
    return any((path.parent / name / path.name).with_suffix(".c").is_file() for name in ("x86", "x86_64"))


def run_c_tests(tree: Path, sets: Sequence[str], folder: Path) -> list[Path]:
    """Run the C selftests in the kernel of *tree*, once with each of *sets* of parameters.

    :returns: the folders with their counters
    :raises CannotTest: there are none, or the kernel ended early
    """
    programs = c_selftests(tree)
    if not programs:
        raise CannotTest(f"they are not built (make -C {tree} headers_install; make -C {tree / _C_TESTS})")
    kernel = find_kernel(str(tree))
    command = [initramfs.PYTHON, "-m", "runner.c_selftests", this_arch().report_port, PROGRAMS]
    machine = Machine(memory=_C_MEMORY, cpus=2, append="debugfs=on")
    folders = []
    for number, parameters in enumerate(sets, 1):
        say(f"running {len(programs)} C selftests with {parameters}")
        results = folder / f"c-{number}"
        results.mkdir(parents=True)
        folders.append(results)
        parsed = parse_parameters(parameters)
        for message in boot_programs(kernel, parsed, programs, command, results, machine, _C_SILENCE):
            if "ran" in message:
                name, ended = message["ran"]
                with (results / "programs.txt").open("a") as file:
                    file.write(f"{name}: {ended}\n")
            elif "gcov" in message:
                gcov.save(results, "kernel", *message["gcov"])
            elif message.get("exit_status"):
                raise CannotTest(f"they ended with status {message['exit_status']}: {message['output']}")
    return folders


def relevant(functions: Functions, tree: Path) -> Functions:
    """Those of *functions* that track dirty pages.

    :raises CannotTest: there are none
    """
    sources: dict[str, list[str]] = {}
    found: Functions = {}
    for key, function in functions.items():
        if not function.file.startswith(_KVM) or not function.lines:
            continue
        if function.file not in sources:
            sources[function.file] = (tree / function.file).read_text(errors="replace").splitlines()
        body = "\n".join(sources[function.file][function.start - 1 : function.end])
        if function.file in FILES or NAMED.search(function.name) or CALLING.search(body):
            found[key] = function
    if not found:
        raise CannotTest(f"none of what was counted is of {tree}: a kernel that was built with O= cannot be measured")
    return found


def summary(suite: Functions, c_tests: Functions) -> list[str]:
    """A table of files: functions, lines, and how many of these were executed."""
    files: dict[str, list[Function]] = defaultdict(list)
    for function in suite.values():
        files[function.file].append(function)
    rows = [_row(name, functions, c_tests) for name, functions in sorted(files.items())]
    heads = ["file", "functions", "lines", "executed", *(["by the C tests"] if c_tests else [])]
    rows = [heads, *rows, _row("all", suite.values(), c_tests)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(name: str, functions: Collection[Function], c_tests: Mapping[tuple[str, int], Function]) -> list[str]:
    total = sum(len(function.lines) for function in functions)
    begun = sum(bool(function.executed) for function in functions)
    executed = sum(len(function.executed) for function in functions)
    cells = [name, f"{begun} of {len(functions)}", str(total), _share(executed, total)]
    if c_tests:
        theirs = sum(len(_executed_by(c_tests, function)) for function in functions)
        cells.append(_share(theirs, total))
    return cells


def _executed_by(tests: Mapping[tuple[str, int], Function], function: Function) -> set[int]:
    other = tests.get((function.file, function.start))
    return other.executed & set(function.lines) if other else set()


def _share(part: int, total: int) -> str:
    return f"{part} ({100 * part / total:.1f} %)"


def details(suite: Functions, c_tests: Functions, tree: Path) -> list[str]:
    """Each function with the lines that the suite did not execute; those that the C tests executed are marked with C."""
    lines: list[str] = []
    for _, function in sorted(suite.items()):
        source = (tree / function.file).read_text(errors="replace").splitlines()
        left = sorted(set(function.lines) - function.executed)
        share = _share(len(function.executed), len(function.lines))
        lines.append(f"{function.file}:{function.start} {function.name}: {share} of {len(function.lines)}")
        theirs = _executed_by(c_tests, function)
        lines += [f"  {'C' if line in theirs else ' '} {line:6} {source[line - 1].rstrip()}" for line in left]
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
