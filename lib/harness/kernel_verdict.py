# SPDX-License-Identifier: GPL-2.0-only
"""The verdict of a run on the kernel, in one line that a user can quote."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from harness.table import UNTESTED, counts_of_tests
from kvm_util.wording import counted
from runner.boot_outcome import BootOutcome


class Verdict(Enum):
    """The verdicts on a kernel; each value is the text that is shown."""

    GOOD = "good"
    BAD = "bad"
    CANNOT = "cannot be tested"
    NONE = "no verdict"


@dataclass(frozen=True)
class RunSummary:
    """What the verdict is based on.

    :ivar kernel: number of tests of the kernel, by the test's verdict
    :ivar own: number of the suite's tests of itself, by the test's verdict
    :ivar planned: number of collected tests
    :ivar uncollected: number of test files that could not be collected
    :ivar stopped: why the run stopped early, in a word; empty if it did not
    :ivar kernel_reports: number of reports in the kernel's log, and of new taint flags, that no known bug explains
    :ivar end: how the booted kernel ended: ``ending`` and ``text`` as in the results file; empty on this host
    :ivar untested: if no test ran on KVM, the reasons with their number of tests; else None
    """

    kernel: Counter[str]
    own: Counter[str] = field(default_factory=Counter)
    planned: int = 0
    uncollected: int = 0
    stopped: str = ""
    kernel_reports: int = 0
    end: Mapping[str, Any] = field(default_factory=dict)
    untested: Counter[str] | None = None


def describe_system(host: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """The kernel, its KVM and where they ran, in words; the parameters are those of ``run_report.Facts``."""
    kvm = "KVM" if host["backend"] == "unknown" else host["backend"]
    if machine:
        how = "emulated" if machine["emulated"] else "virtualized"
        return f"{host['kernel']}, {kvm} in QEMU {machine['qemu']} ({how})"
    return f"{host['kernel']}, {kvm} on this host"


def verdict_on_kernel(summary: RunSummary) -> tuple[Verdict, str]:
    """The verdict, and the line that states it with reason and counts."""
    ended = BootOutcome[summary.end["ending"]] if summary.end else BootOutcome.FINISHED
    counts = counts_of_tests(summary.kernel)
    ran = sum(summary.kernel.values()) + sum(summary.own.values()) - summary.kernel["not run"] - summary.own["not run"]
    stopped = summary.stopped or ("stopped" if ran < summary.planned else "")
    if stopped:
        results = counts_of_tests(summary.kernel - Counter({"not run": summary.kernel["not run"]}))
        of = f" of {counted(summary.planned, 'test')}" if summary.planned else f" {'test' if ran == 1 else 'tests'}"
        counts = f"{stopped}: {ran}{of} ran" + (f" ({results})" if results else "")
    if summary.kernel["FAIL"] or summary.kernel_reports or ended.exit_status == 1:
        died = [ended.value] if ended.exit_status == 1 else []
        reports = [f"{counted(summary.kernel_reports, 'report')} of the kernel"] if summary.kernel_reports else []
        verdict, reasons = Verdict.BAD, [*died, *reports]
    elif ended is not BootOutcome.FINISHED:
        verdict, reasons = Verdict.CANNOT, [summary.end["text"].removeprefix(f"{BootOutcome.NOT_TESTED.value}: ")]
    elif summary.uncollected:
        files = counted(summary.uncollected, "file")
        words = "; ".join(filter(None, [f"{files} of tests could not be collected", counts]))
        return Verdict.NONE, f"{words}: {Verdict.NONE.value}{_own(summary)}"
    elif stopped:
        return Verdict.NONE, f"{counts}: {Verdict.NONE.value}{_own(summary)}"
    elif summary.untested is not None and (summary.kernel or summary.own):
        verdict, reasons = Verdict.CANNOT, [_untested(summary.untested)]
    elif any(summary.kernel[result] for result in summary.kernel if result not in UNTESTED):
        verdict, reasons = Verdict.GOOD, []
    else:
        own = _own(summary).removeprefix("; ") or "no test was selected"
        return Verdict.NONE, f"{Verdict.NONE.value}: {own}"
    return verdict, f"{verdict.value}: {'; '.join(filter(None, [*reasons, counts]))}{_own(summary)}"


def _own(summary: RunSummary) -> str:
    return f"; the suite's own tests: {counts_of_tests(summary.own)}" if summary.own.total() else ""


def _untested(reasons: Counter[str]) -> str:
    if not reasons:
        return "no test ran on KVM: none that was selected needs it"
    ((first, _),) = reasons.most_common(1)
    others = len(reasons) - 1
    more = f" (and {counted(others, 'other reason')}, above)" if others else ""
    return f"no test ran on KVM: {first}{more}"
