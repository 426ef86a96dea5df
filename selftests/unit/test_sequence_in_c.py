# SPDX-License-Identifier: GPL-2.0-only
"""Failing operation sequences as C programs: what is compiled, what it finds on this host's KVM, and where it is printed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from dirty_tracking import sequences
from dirty_tracking.modes import LOG_MODES
from dirty_tracking.sequence_in_c import InBothLanguages, c_program
from dirty_tracking.sequences import (
    Clear,
    Collect,
    Create,
    Delete,
    FailedSequence,
    Get,
    Harvest,
    HostWrite,
    Load,
    Move,
    Reset,
    SetDirtyLogging,
    Step,
    Write,
)
from dirty_tracking.violations import Kind, Violation

GCC = ["gcc", "-Wall", "-Wextra", "-Werror", "-O2"]
RING_ENTRIES = 1024
COMMON: list[Step] = [
    Create(1, 0, 70), Create(2, 1, 130), Write(1, range(35)), Load(2, (1, 2, 9)), HostWrite(1, (1,)), Collect(),
    Write(2, (5, 6, 64), 1), SetDirtyLogging(1, False), Write(1, (3,)), SetDirtyLogging(1, True), Move(2, 3),
    Write(2, (7,)), Delete(1), Create(1, 0, 64), Collect(),
]  # fmt: skip
BITMAP_END: list[Step] = [Clear(2, 64, 66, range(64, 130, 2)), Clear(2, 0, 64, ()), Write(1, (63,)), Get(1)]
RING_END: list[Step] = [Write(1, (62,), 1), Harvest(1, 1), Reset(), Write(1, (63,))]
REPORTED, CLEAN = 63, 9  # pages of slot 1 that KVM reports, and does not report, in the last step


def program_of(mode: str, folder: Path, *violations: Violation) -> Path:
    """The program of a sequence in log mode *mode* whose last step had *violations*, compiled strictly."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc (apt install gcc libc6-dev)")
    steps = (*COMMON, *(RING_END if LOG_MODES[mode].uses_ring else BITMAP_END))
    source = folder / "sequence.c"
    source.write_text(c_program(FailedSequence(mode, steps, violations, RING_ENTRIES)))
    done = subprocess.run([*GCC, "-o", folder / "sequence", source], capture_output=True, text=True, check=False)
    if "linux/kvm.h: No such file" in done.stderr:
        pytest.skip("no <linux/kvm.h> (apt install linux-libc-dev)")
    assert done.returncode == 0, done.stderr
    return folder / "sequence"


@pytest.mark.parametrize("mode", LOG_MODES)
def test_c_program_compiles_alone(mode: str, tmp_path: Path) -> None:
    """A sequence of all kinds of steps compiles without a warning, and needs no other file."""
    program_of(mode, tmp_path, Violation(Kind.LOST, "", 1, (REPORTED, CLEAN)))


def test_sequences_here_have_all_steps() -> None:
    """The sequences of this file have each kind of step."""
    kinds = {kind for kind in vars(sequences).values() if isinstance(kind, type) and issubclass(kind, Step)}
    used = {type(step) for step in (*COMMON, *BITMAP_END, *RING_END)}
    assert {kind for kind in kinds if kind.__name__[0] != "_"} - {Step} == used


def test_unknown_step_is_refused() -> None:
    """A kind of step that no C function is known for is an error that names it."""
    with pytest.raises(NotImplementedError, match="Step object"):
        c_program(FailedSequence("dirty-log", (Step(),), (), RING_ENTRIES))


VERDICTS = {
    "as-before": ([Violation(Kind.LOST, "", 1, (REPORTED,)), Violation(Kind.SPURIOUS, "", 1, (CLEAN,))], 0, "has to"),
    "lost": ([Violation(Kind.LOST, "", 1, (REPORTED, CLEAN))], 1, f"lost: slot 1, page {CLEAN} was written"),
    "spurious": ([Violation(Kind.SPURIOUS, "", 1, (REPORTED,))], 1, f"spurious: slot 1, page {REPORTED} is reported 1"),
    "once": ([Violation(Kind.DUPLICATE, "", 1, (REPORTED,))], 0, "has to"),
    "not-checked": (
        [Violation(Kind.OTHER, 'the "guest" is 100% \\n lost, ' * 20)], 4, "here: OTHER: the 'guest' is 100' 'n lost",
    ),
    "no-such-slot": ([Violation(Kind.SPURIOUS, "", 1 << 24, (3,))], 4, "not checked here: slot 16777216"),
    "no-such-page": ([Violation(Kind.LOST, "", 1, (1 << 40,))], 4, "not checked here: slot 1"),
}  # fmt: skip


@pytest.mark.parametrize(("violations", "status", "text"), VERDICTS.values(), ids=VERDICTS)
@pytest.mark.usefixtures("kvm")
def test_verdict_of_a_c_program(
    log_mode: str, violations: list[Violation], status: int, text: str, tmp_path: Path
) -> None:
    """The program's exit status is 1 exactly if KVM's last report has the difference, and it names the page."""
    done = subprocess.run(
        program_of(log_mode, tmp_path, *violations), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, text in done.stdout + done.stderr) == (status, True), done.stdout + done.stderr


def test_failure_has_script_and_program() -> None:
    """With --emit-c a failure's report and data have the script and the program."""
    violation = Violation(Kind.LOST, "page 3", 1, (3,))
    evidence = InBothLanguages(FailedSequence("dirty-log", (Create(1, 0, 70), Get(1)), (violation,), RING_ENTRIES))
    data, text = evidence.data(), "\n".join(evidence.lines())
    assert data["script"].strip() in text and data["c_program"].strip() in text
    assert "must_report(1, PAGES({ 3, 1 }));" in data["c_program"]
    assert "KVM breaks the contract of dirty logging: slot 1: LOST (written but not reported): page 3" in text
