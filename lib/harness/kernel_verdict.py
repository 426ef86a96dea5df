# SPDX-License-Identifier: GPL-2.0-only
"""What a run says of the kernel, in one line that a person can quote."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from harness.table import UNTESTED, counts_of_tests
from kvm_util.wording import counted
from runner.ending import Ending


class Word(Enum):
    """The verdicts; each value is what is shown."""

    GOOD = "good"
    BAD = "bad"
    CANNOT = "cannot be tested"
    NONE = "no verdict"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    :ivar kernel: how many of the tests that judge the kernel have each verdict
    :ivar own: the same of the suite's tests of itself
    :ivar planned: how many tests there were to be
    :ivar uncollected: how many files of tests could not be collected
    :ivar stopped: what ended the run before its end
    :ivar log_reports: how many reports of the kernel's log are explained by no known bug
    :ivar end: how the booted kernel ended: the ``ending`` and ``text`` of the results file
    :ivar untested: why no test ran on KVM, each reason with the number of tests; None where one did
    """

    kernel: Counter[str]
    own: Counter[str] = field(default_factory=Counter)
    planned: int = 0
    uncollected: int = 0
    stopped: str = ""
    log_reports: int = 0
    end: Mapping[str, Any] = field(default_factory=dict)
    untested: Counter[str] | None = None


def place(host: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """Which kernel and KVM, and where they ran, from the facts of the results file."""
    kvm = "KVM" if host["backend"] == "unknown" else host["backend"]
    if machine:
        how = "emulated" if machine["emulated"] else "virtualized"
        return f"{host['kernel']}, {kvm} in QEMU {machine['qemu']} ({how})"
    return f"{host['kernel']}, {kvm} on this host"


def judge(outcome: Outcome) -> tuple[Word, str]:
    """The verdict, and the text that says it with its reason and the counts."""
    ending = Ending[outcome.end["ending"]] if outcome.end else Ending.FINISHED
    counts = counts_of_tests(outcome.kernel)
    ran = sum(outcome.kernel.values()) + sum(outcome.own.values()) - outcome.kernel["not run"] - outcome.own["not run"]
    stopped = outcome.stopped or ("stopped" if ran < outcome.planned else "")
    if stopped:
        of = f" of {outcome.planned}" if outcome.planned else ""
        tests = "test" if (outcome.planned or ran) == 1 else "tests"
        came_to = counts_of_tests(
            Counter({word: number for word, number in outcome.kernel.items() if word != "not run"})
        )
        counts = f"{stopped}: {ran}{of} {tests} ran" + (f" ({came_to})" if came_to else "")
    if outcome.kernel["FAIL"] or outcome.log_reports or ending.exit_status == 1:
        in_log = f"{counted(outcome.log_reports, 'report')} in the kernel's log" if outcome.log_reports else ""
        died = ending.value if ending.exit_status == 1 else ""
        word, text = Word.BAD, "; ".join(filter(None, (died, in_log, counts)))
    elif ending is not Ending.FINISHED:
        why = outcome.end["text"].removeprefix(f"{Ending.NOT_TESTED.value}: ")
        word, text = Word.CANNOT, "; ".join(filter(None, (why, counts)))
    elif outcome.uncollected:
        files = counted(outcome.uncollected, "file")
        return Word.NONE, f"{files} of tests could not be collected; {counts}: {Word.NONE.value}{_own(outcome)}"
    elif stopped:
        return Word.NONE, f"{counts}: {Word.NONE.value}{_own(outcome)}"
    elif outcome.untested is not None and (outcome.kernel or outcome.own):
        word, text = Word.CANNOT, "; ".join(filter(None, (_untested(outcome.untested), counts)))
    elif any(outcome.kernel[verdict] for verdict in outcome.kernel if verdict not in UNTESTED):
        word, text = Word.GOOD, counts
    else:
        own = _own(outcome).removeprefix("; ") or "no test was selected"
        return Word.NONE, f"{Word.NONE.value}: {own}"
    return word, f"{word.value}: {text}{_own(outcome)}"


def _own(outcome: Outcome) -> str:
    return f"; the suite's own tests: {counts_of_tests(outcome.own)}" if outcome.own.total() else ""


def _untested(reasons: Counter[str]) -> str:
    if not reasons:
        return "no test ran on KVM: none that was selected needs it"
    ((first, _),) = reasons.most_common(1)
    others = len(reasons) - 1
    more = f" (and {counted(others, 'other reason')}, above)" if others else ""
    return f"no test ran on KVM: {first}{more}"
