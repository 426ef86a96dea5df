# SPDX-License-Identifier: GPL-2.0-only
"""The tables and the one exit status of runs on several kernels or hosts."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from harness.table import cross_table, cross_table_of_tests, skipped_everywhere
from kvm_util.wording import counted
from runner.kernel_runs import Planned, RunResult
from runner.run_verdicts import INTERRUPTED, NOT_RUN, USAGE_ERROR, print_line, verdict_of
from runner.store import shown


def conclude(planned: Sequence[Planned], results: Sequence[RunResult], folder: Path) -> int:
    """Print the tables of all runs and their verdicts, and keep the tables in *folder*; returns the exit status of all."""
    lines = _summary(planned, results)
    try:
        (folder / "table.txt").write_text("\n".join(lines) + "\n")
    except OSError as error:
        lines.append(f"THE TABLE IS NOT KEPT: {error.filename}: {error.strerror}")
    verdicts = Counter(verdict_of(result.status) for result in results)
    words = ", ".join(f"{number} {word}" for word, number in verdicts.items())
    lines += ["", f"{counted(len(results), 'run')}: {words}; files: {shown(folder)}"]
    print_line("\n".join(["", *lines]))
    statuses = {result.status for result in results}
    if 1 in statuses:
        return 1
    return max(statuses) if max(statuses) >= USAGE_ERROR or NOT_RUN not in statuses else INTERRUPTED


def _summary(planned: Sequence[Planned], results: Sequence[RunResult]) -> list[str]:
    """The tables of all runs, with a letter for each, and the verdict behind each letter."""
    names = [chr(ord("A") + index) if index < 26 else f"Z{index - 25}" for index in range(len(results))]
    legend = [
        f"{name}  {_title(run, result)}: {result.verdict}"
        for name, run, result in zip(names, planned, results, strict=True)
    ]
    columns = {name: result for name, result in zip(names, results, strict=True) if result.status != NOT_RUN}
    cells, tests = [result.cells for result in columns.values()], [result.tests for result in columns.values()]
    lines = [*cross_table([*columns], cells), ""] if any(cells) else []
    lines += [*cross_table_of_tests([*columns], tests), ""] if any(tests) else []
    lines += legend
    if nowhere := skipped_everywhere(tests):
        lines += ["", f"{counted(len(nowhere), 'test')} ran in none of these runs:", *(f"  {test}" for test in nowhere)]
    return lines


def _title(planned: Planned, result: RunResult) -> str:
    """The kernel with its parameters, or the host with its kernel if that is known."""
    if planned.file is None:
        return f"{result.release}  {result.parameters or 'defaults'}"
    return planned.kernel + (f"  {result.release}" if result.release != planned.kernel else "")
