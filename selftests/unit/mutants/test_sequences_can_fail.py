# SPDX-License-Identifier: GPL-2.0-only
"""Random operation sequences can fail: with KVM's results falsified, the search must find a short failing sequence."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dirty_tracking.bitmap import BITS_PER_WORD
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
from kvm_util.vm import Vm
from runner import ROOT
from selftests.scenarios.test_sequences import RING_RESET_BUG

SEEDS = range(6)  # as many as in test_sequences.py without --thorough
MARKER = uapi.KVM_DIRTY_GFN_F_DIRTY | uapi.KVM_DIRTY_GFN_F_RESET
SOUND = [Create(1, 0, 70), Write(1, range(10)), Collect()]


# 190 entries, then ten more, in a ring with a soft limit of 192 (448 of 1024 entries with PML).
FULL = [
    Create(1, 0, 70), Create(2, 1, 130), *(Write(1, range(first, first + 35)) for first in (0, 35)),
    *(Write(2, range(first, first + 30)) for first in (0, 30, 60, 90)), Write(2, range(120, 130)),
]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A way in which KVM could fail.

    :ivar most: how many steps the shortest failing sequence may have
    """

    name: str
    modes: tuple[str, ...]
    target: type
    method: str
    falsify: Callable[[Any], Any]
    most: int


BITMAPS = ("dirty-log", "clear-log")
MANUAL = ("clear-log-unset",)
RINGS = ("dirty-ring",)


def on_bitmap(change: Callable[[bytearray], None]) -> Callable[[Any], Any]:
    def falsify(honest: Any) -> Any:
        def get_dirty_log(vm: Vm, slot: int, bitmap: bytearray) -> None:
            honest(vm, slot, bitmap)
            change(bitmap)

        return get_dirty_log

    return falsify


def drop_last_bit(bitmap: bytearray) -> None:
    for index in reversed(range(len(bitmap))):
        if bitmap[index]:
            bitmap[index] &= ~(1 << bitmap[index].bit_length() - 1)
            return


def add_bit(bitmap: bytearray) -> None:
    bitmap[0] |= 1


def add_bit_behind_end(bitmap: bytearray) -> None:
    if len(bitmap) * 8 > BITS_PER_WORD:
        bitmap[-1] |= 0x80


def on_entries(change: Callable[[Entries], Entries]) -> Callable[[Any], Any]:
    return lambda honest: lambda *arguments: change(honest(*arguments))


def on_each(change: Callable[[list[int]], list[int]]) -> Callable[[Entries], Entries]:
    """Change slots and offsets in the same way."""
    return lambda taken: (change(taken[0]), change(taken[1]))


def clear_all_of_range(honest: Any) -> Any:
    def clear_dirty_log(vm: Vm, slot: int, bitmap: bytearray, first_page: int, num_pages: int) -> None:
        honest(vm, slot, bytearray(b"\xff" * len(bitmap)), first_page, num_pages)

    return clear_dirty_log


def clear_first_word(honest: Any) -> Any:
    def clear_dirty_log(vm: Vm, slot: int, bitmap: bytearray, first_page: int, num_pages: int) -> None:
        honest(vm, slot, bitmap[:8] + bytes(len(bitmap) - 8), first_page, num_pages)

    return clear_dirty_log


def claimed_reset(_honest: Any) -> Any:
    """Return the number of harvested entries, and reset none."""

    def reset_dirty_rings(vm: Vm) -> int:
        taken = 0
        for vcpu in vm.vcpus:
            with closing(DirtyRing.of(vcpu, 256)) as ring:
                taken += [ring.entry(number).flags for number in range(ring.entries)].count(MARKER)
        return taken

    return reset_dirty_rings


def on_region(change: Callable[[Vm, int, int, int], tuple[int, int]]) -> Callable[[Any], Any]:
    """*change* takes VM, slot, gpa and flags, and returns the gpa and flags that are passed to KVM."""

    def falsify(honest: Any) -> Any:
        def set_user_memory_region(vm: Vm, slot: int, gpa: int, memory: Any, flags: int = 0) -> Any:
            seen_gpa, seen_flags = change(vm, slot, gpa, flags)
            memslot = honest(vm, slot, seen_gpa, memory, seen_flags)
            memslot.gpa, memslot.flags = gpa, flags
            return memslot

        return set_user_memory_region

    return falsify


def stays_off(vm: Vm, slot: int, gpa: int, flags: int) -> tuple[int, int]:
    return gpa, 0 if slot in vm.memslots else flags


def stays_on(vm: Vm, slot: int, gpa: int, flags: int) -> tuple[int, int]:
    return gpa, flags or (vm.memslots[slot].flags if slot in vm.memslots else 0)


def stays_where_it_is(vm: Vm, slot: int, gpa: int, flags: int) -> tuple[int, int]:
    return (vm.memslots[slot].gpa if slot in vm.memslots else gpa), flags


def move_forgets(honest: Any) -> Any:
    def set_user_memory_region(vm: Vm, slot: int, gpa: int, memory: Any, flags: int = 0) -> Any:
        if slot in vm.memslots and vm.memslots[slot].gpa != gpa:
            honest(vm, slot, vm.memslots[slot].gpa, memory, 0)
        return honest(vm, slot, gpa, memory, flags)

    return set_user_memory_region


FAULTS = [
    Fault("drops a bit", BITMAPS, Vm, "get_dirty_log", on_bitmap(drop_last_bit), 3),
    Fault("adds a bit", BITMAPS, Vm, "get_dirty_log", on_bitmap(add_bit), 4),
    Fault("adds a bit behind the end", ("dirty-log",), Vm, "get_dirty_log", on_bitmap(add_bit_behind_end), 2),
    Fault("skips CLEAR", MANUAL, Vm, "clear_dirty_log", lambda _honest: lambda *_arguments: None, 4),
    Fault("clears what was not asked for", MANUAL, Vm, "clear_dirty_log", clear_all_of_range, 4),
    Fault("clears the first word only", MANUAL, Vm, "clear_dirty_log", clear_first_word, 4),
    Fault("stays off", ("dirty-log", "dirty-ring"), Vm, "set_user_memory_region", on_region(stays_off), 4),
    Fault("stays on", ("dirty-log", "dirty-ring"), Vm, "set_user_memory_region", on_region(stays_on), 5),
    Fault("does not move", ("clear-log",), Vm, "set_user_memory_region", on_region(stays_where_it_is), 4),
    Fault("forgets when it moves", ("dirty-log",), Vm, "set_user_memory_region", move_forgets, 4),
    Fault("does not push an entry", RINGS, DirtyRing, "peek", on_entries(on_each(lambda part: part[:-1])), 2),
    Fault("pushes an entry twice", RINGS, DirtyRing, "peek", on_entries(on_each(lambda part: part[:1] + part)), 2),
    Fault("changes a slot", RINGS, DirtyRing, "peek", on_entries(lambda taken: ([9 for _ in taken[0]], taken[1])), 2),
    Fault("swaps entries", RINGS, DirtyRing, "peek", on_entries(on_each(lambda part: part[::-1])), 2),
    Fault("loses an entry", RINGS, DirtyRing, "harvest", on_entries(on_each(lambda part: part[1:])), 3),
    Fault("repeats an entry", RINGS, DirtyRing, "harvest", on_entries(on_each(lambda part: part + part[-1:])), 3),
    Fault("resets nothing", RINGS, Vm, "reset_dirty_rings", lambda _honest: lambda _vm: 0, 4),
    Fault("resets nothing, and says it did", RINGS, Vm, "reset_dirty_rings", claimed_reset, 4),
]


@pytest.mark.parametrize(
    ("fault", "log_mode"),
    [pytest.param(fault, mode, id=f"{mode}-{fault.name}") for fault in FAULTS for mode in fault.modes],
    indirect=["log_mode"],
)
@pytest.mark.mutants
@pytest.mark.slow
def test_fault_is_found_and_shrunk(
    kvm: Kvm, host: Host, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], fault: Fault, log_mode: str,
) -> None:  # fmt: skip
    """The search finds each fault in the default rounds; its short script fails with the fault, and passes without."""

    def run(steps: Sequence[Step]) -> None:
        run_sequence(kvm, host, log_mode, steps)

    monkeypatch.setattr(fault.target, fault.method, fault.falsify(getattr(fault.target, fault.method)))
    found = search(run, LOG_MODES[log_mode].uses_ring, SEEDS)
    assert found is not None, "no sequence failed"
    failure = found[1]
    assert len(failure.sequence.steps) <= fault.most, failure.sequence.script
    with pytest.raises(SystemExit, match=log_mode):
        exec(failure.sequence.script, {})
    monkeypatch.undo()
    exec(failure.sequence.script, {})
    assert f"KVM and the model agree in all of {len(failure.sequence.steps)} steps" in capsys.readouterr().out


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


def test_excluded_known_bug_is_listed() -> None:
    """The known bug whose steps are excluded is in known_bugs.toml."""
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
    monkeypatch.setattr(Vm, "get_dirty_log", on_bitmap(drop_last_bit)(Vm.get_dirty_log))
    with pytest.raises(SequenceFailed, match=r"^dirty-log: step 3, Collect\(\): slot 1: LOST \(.*\): page 9$"):
        run_sequence(kvm, host, "dirty-log", SOUND)


FAULTY_PLUGIN = """
from kvm_util.vcpu import Vcpu
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
    done = run_pytest(f"{python} -m pytest '{TEST}' -p faulty --soak 60 --seed 3", tmp_path)
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
