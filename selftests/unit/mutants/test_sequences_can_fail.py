# SPDX-License-Identifier: GPL-2.0-only
"""Random operation sequences can fail: with KVM's results falsified, the search must find a short failing sequence."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from dirty_tracking.modes import LOG_MODES
from dirty_tracking.platform import uses_pml
from dirty_tracking.ring import DirtyRing, Entries
from dirty_tracking.sequence_search import search
from dirty_tracking.sequences import Collect, Create, SequenceFailed, Step, Write, run_sequence, script
from harness import known_bugs
from kvm_util import uapi
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.vcpu import Vcpu
from kvm_util.wording import counted
from runner import ROOT
from selftests.scenarios.test_sequences import RING_RESET_BUG
from selftests.unit.mutants.catalogue import MUTANTS

SEEDS = range(6)  # as many as in test_sequences.py without --thorough
SOUND = [Create(1, 0, 70), Write(1, range(10)), Collect()]


# 190 entries, then ten more, in a ring with a soft limit of 192 (448 of 1024 entries with PML).
FULL = [
    Create(1, 0, 70), Create(2, 1, 130), *(Write(1, range(first, first + 35)) for first in (0, 35)),
    *(Write(2, range(first, first + 30)) for first in (0, 30, 60, 90)), Write(2, range(120, 130)),
]  # fmt: skip


# The mutants in log modes that can show them, and how many steps the shortest failing sequence may have
MOST_STEPS = {
    "page-lost": 3,
    "page-added": 4,
    "page-beyond-end": 3,
    "page-repeated": 4,
    "entry-of-another-slot": 3,
    "entry-in-another-ring": 3,
    "entries-reversed": 3,
    "clear-ignored": 4,
    "clear-skips-page": 4,
    "clear-takes-whole-range": 4,
    "reset-undone": 4,
    "reset-ignored": 4,
    "logging-stays-off": 4,
    "logging-stays-on": 5,
    "move-ignored": 4,
    "move-forgets-pages": 4,
}
# clear-log and dirty-ring-plain differ from these only in how they are enabled.
MODES = ("dirty-log", "clear-log-unset", "dirty-ring")


@pytest.mark.parametrize(
    ("name", "log_mode"),
    [(name, mode) for name in MOST_STEPS for mode in MODES if mode in MUTANTS[name].modes],
    indirect=["log_mode"],
)
@pytest.mark.mutants
@pytest.mark.slow
def test_mutant_is_found_and_shrunk(
    kvm: Kvm, host: Host, capsys: pytest.CaptureFixture[str], name: str, log_mode: str
) -> None:
    """The search finds each mutant in the default rounds; its short script fails with the mutant, and passes without."""

    def run(steps: Sequence[Step]) -> None:
        with planted(name):
            run_sequence(kvm, host, log_mode, steps)

    found = search(run, LOG_MODES[log_mode].uses_ring, SEEDS)
    assert found is not None, "no sequence failed"
    failure = found[1]
    assert len(failure.sequence.steps) <= MOST_STEPS[name], failure.sequence.script
    with planted(name), pytest.raises(SystemExit, match=log_mode):
        exec(failure.sequence.script, {})
    exec(failure.sequence.script, {})
    steps = counted(len(failure.sequence.steps), "step")
    assert f"KVM and the model agree in all of {steps}\n" in capsys.readouterr().out


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Plant a mutant anew: it must not remember the VM of another sequence."""
    with pytest.MonkeyPatch.context() as patch:
        MUTANTS[name].plant(patch)
        yield


PUSHES: dict[str, Callable[[Entries], Entries]] = {
    "lacks-an-entry": lambda entries: (entries[0][:-1], entries[1][:-1]),
    "has-an-entry-twice": lambda entries: ([*entries[0][:1], *entries[0]], [*entries[1][:1], *entries[1]]),
    "names-another-slot": lambda entries: ([9 for _ in entries[0]], entries[1]),
    "reversed": lambda entries: (entries[0][::-1], entries[1][::-1]),
}


@pytest.mark.parametrize("change", PUSHES.values(), ids=PUSHES)
@pytest.mark.log_modes("dirty-ring")
@pytest.mark.mutants
def test_wrong_pushes_are_found(
    kvm: Kvm, host: Host, monkeypatch: pytest.MonkeyPatch, change: Callable[[Entries], Entries]
) -> None:
    """A sequence fails at the write for which KVM pushes other entries than the model predicts."""
    honest = DirtyRing.peek
    monkeypatch.setattr(DirtyRing, "peek", lambda ring: change(honest(ring)))
    with pytest.raises(SequenceFailed, match="step 2, "):
        run_sequence(kvm, host, "dirty-ring", SOUND)


@pytest.mark.usefixtures("kvm")
def test_script_runs_standalone() -> None:
    """The script of a sequence runs in a Python process of its own."""
    done = subprocess.run(
        [sys.executable, "-"],
        input=script("dirty-log", SOUND),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env=os.environ | {"PYTHONPATH": "lib"},
    )
    assert (done.returncode, done.stdout) == (0, "dirty-log: KVM and the model agree in all of 3 steps\n"), done.stderr


def test_allowed_known_bug_is_listed() -> None:
    """The known bug that the model allows for is in known_bugs.toml."""
    assert RING_RESET_BUG in {bug.id for bug in known_bugs.load()}


@pytest.mark.parametrize("exit_reason", [uapi.KVM_EXIT_DIRTY_RING_FULL, uapi.KVM_EXIT_HLT], ids=["too-early", "never"])
@pytest.mark.log_modes("dirty-ring")
@pytest.mark.mutants
def test_wrong_ring_full_exit_is_found(kvm: Kvm, host: Host, monkeypatch: pytest.MonkeyPatch, exit_reason: int) -> None:
    """A sequence fails when KVM_EXIT_DIRTY_RING_FULL comes before the ring is full, or never."""
    if uses_pml(host):
        pytest.skip("with PML the smallest ring has more entries than this sequence pushes")
    run_sequence(kvm, host, "dirty-ring", [*FULL, Write(1, (0,))])
    honest = Vcpu.kvm_run
    early = exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL

    def falsified(vcpu: Vcpu) -> int:
        code = honest(vcpu)
        if early or vcpu.run.exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL:
            vcpu.run.exit_reason = exit_reason
        return code

    monkeypatch.setattr(Vcpu, "kvm_run", falsified)
    with pytest.raises(SequenceFailed, match="DIRTY_RING_FULL, with 35 entries used" if early else "its ring|HLT"):
        run_sequence(kvm, host, "dirty-ring", [*FULL, Write(1, (0,))])


@pytest.mark.mutants
def test_failure_names_its_step(kvm: Kvm, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of a failed sequence has the log mode, the step that failed and the violation."""
    MUTANTS["page-lost"].plant(monkeypatch)
    with pytest.raises(SequenceFailed, match=r"^dirty-log: step 3, Collect\(\): slot 1: LOST \(.*\): page 9$"):
        run_sequence(kvm, host, "dirty-log", SOUND)


# It loses a slot's first page: some rounds do not show that.
FAULTY_PLUGIN = """
from kvm_util.vm import Vm
honest = Vm.get_dirty_log
def falsified(vm, slot, bitmap):
    honest(vm, slot, bitmap)
    bitmap[0] &= 0xFE
Vm.get_dirty_log = falsified
"""
TEST = "selftests/scenarios/test_sequences.py::test_random_operation_sequences[dirty-log]"


def run_pytest(command: str, tmp_path: Path) -> "subprocess.CompletedProcess[str]":
    (tmp_path / "faulty.py").write_text(FAULTY_PLUGIN)
    return subprocess.run(
        f"{command} --results={tmp_path / 'results'}", shell=True, cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'lib'}"}, timeout=300,
    )  # fmt: skip


@pytest.mark.mutants
@pytest.mark.slow
@pytest.mark.usefixtures("kvm")
def test_failure_shows_script_and_command(tmp_path: Path) -> None:
    """The printed command finds the same sequence again, also where a later round of a soak run failed."""
    python = shlex.quote(sys.executable)
    done = run_pytest(f"{python} -m pytest '{TEST}' -p faulty --soak 60 --seed 3 --emit-c", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    for expected in (
        "dirty-log: step",
        "LOST",
        "kernel   ",
        "PYTHONPATH=lib .venv/bin/python -",
    ):
        assert expected in done.stdout
    script_text = re.search(r"^from dirty_tracking\.sequences import .*?^\]\)$", done.stdout, re.MULTILINE | re.DOTALL)
    command = re.search(r"^reproduce (.*)$", done.stdout, re.MULTILINE)
    assert script_text and command
    again = run_pytest(f"{command[1]} -p faulty", tmp_path)
    assert again.returncode == 1, again.stdout + again.stderr
    assert script_text[0] in again.stdout
    assert "must_report(" in done.stdout and "must_report(" in again.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("kvm")
def test_soak_run_takes_its_time(tmp_path: Path) -> None:
    """A run with ``--soak`` goes on for that many seconds, passes, and leaves no files of Hypothesis."""
    begin = time.monotonic()
    done = run_pytest(f"{shlex.quote(sys.executable)} -m pytest '{TEST}' --soak 3", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - begin >= 3
    assert not (ROOT / ".hypothesis").exists()


@pytest.mark.parametrize("value", ["0", "x"])
def test_invalid_soak_time_is_rejected(value: str, tmp_path: Path) -> None:
    """A soak time that is no positive number is a usage error that names it."""
    done = run_pytest(f"{shlex.quote(sys.executable)} -m pytest '{TEST}' --soak {value}", tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"--soak: {value}" in done.stderr.replace("'", "")


def test_seed_alone_decides_sequences(tmp_path: Path) -> None:
    """A seed generates the same sequences whatever modules are loaded, and Hypothesis writes no files."""
    program = """
import sys
for name in sys.argv[1:]: __import__(name)
from dirty_tracking.sequence_search import search
from selftests.scenarios import test_sequences
made = []
search(made.append, False, range(3))
print(made)
"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, *modules], capture_output=True, text=True, cwd=tmp_path, timeout=60,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'lib'}"}, check=True,
        ).stdout
        for modules in ((), ("dirty_tracking.judge", "runner.qemu", "conftest"))
    ]  # fmt: skip
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 1000
    assert not list(tmp_path.iterdir())
