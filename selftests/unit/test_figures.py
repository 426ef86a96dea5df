# SPDX-License-Identifier: GPL-2.0-only
"""The figures of a run: how long its phases and KVM's calls take."""

import time
from typing import Any

import pytest

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from dirty_tracking.modes import LOG_MODES, smallest_ring
from dirty_tracking.run_evidence import Figures
from dirty_tracking.timings import Timings
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB
from kvm_util.vm import Vm

DELAY = 0.02
CALLS = {"get": "get_dirty_log", "clear": "clear_dirty_log", "reset": "reset_dirty_rings"}


def figures_of(kvm: Kvm, log_mode: str, ring_count: int = 4096, **settings: Any) -> Figures:
    """The figures of a short run."""
    cell = Cell(log_mode, "48bit-4k", "anonymous", "cooperative", "sparse", 1)
    chosen = Settings(**{"iterations": 4, "interval": 1.0, "test_mem": 4 * MIB, "seed": 1} | settings)
    with DirtyLogRun(kvm, cell, Settings(**vars(chosen) | {"ring_count": ring_count})) as run:
        return run.run()


def test_summary_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase has its number, sum, percentiles by rank and longest time, in milliseconds; one that fails is left out."""
    clock = iter([moment for number in range(100, 0, -1) for moment in (0.0, number / 1000)] + [0.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timings = Timings()
    for _ in range(100):
        with timings.time("get"):
            pass
    with pytest.raises(OSError, match="EIO"), timings.time("clear"):
        raise OSError("EIO")
    expected = {"count": 100, "total": 5050.0, "p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert timings.summary() == {"get": expected}
    assert timings.total("get") == pytest.approx(5.05)
    assert timings.total("reset") == 0


def test_phases_of_a_run(kvm: Kvm, log_mode: str) -> None:
    """Each call has a time for each of its collections, and the phases together take no longer than the run."""
    mode = LOG_MODES[log_mode]
    figures = figures_of(kvm, log_mode)
    calls = ["harvest", "reset"] if mode.uses_ring else ["get", "clear"] if mode.manual else ["get"]
    counts = {phase: times["count"] for phase, times in figures.phases.items()}
    assert {phase: counts.pop(phase) for phase in ("populate", "enable", "dirty", "disable")} == {
        "populate": 1, "enable": 1, "dirty": 4, "disable": 1
    }  # fmt: skip
    running = figures.collections - 4
    assert counts == dict.fromkeys(calls, 4) | {f"{call}_running": running for call in calls if running}
    alone = ("populate", "enable", "dirty", "disable", *calls)
    assert sum(figures.phases[phase]["total"] for phase in alone) < 1000 * figures.seconds
    assert figures.exits >= 4
    assert figures.writes_per_second == pytest.approx(
        1000 * figures.writes / figures.phases["dirty"]["total"], rel=1e-3
    )


def test_figures_of_each_iteration(kvm: Kvm, log_mode: str) -> None:
    """Each iteration has its number of dirty pages, and with rings the most entries that one of them had."""
    ring_count = smallest_ring(kvm) if LOG_MODES[log_mode].uses_ring else 0
    figures = figures_of(kvm, log_mode, ring_count)
    assert len(figures.dirty_by_iteration) == 4
    assert sum(figures.dirty_by_iteration) == figures.dirty
    assert len(figures.ring_fill_by_iteration) == (4 if ring_count else 0)
    assert all(0 < fill <= ring_count for fill in figures.ring_fill_by_iteration)
    # All 1024 pages are written in the first iteration.
    assert not ring_count or figures.ring_fill_by_iteration[0] > ring_count // 2


@pytest.mark.parametrize("call", CALLS)
def test_slow_call_shows_in_its_phase(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A delay in one of KVM's calls is in that call's times, and in no other's."""
    original = getattr(Vm, CALLS[call])

    def slow(vm: Vm, *arguments: Any) -> Any:
        time.sleep(DELAY)
        return original(vm, *arguments)

    log_mode = "dirty-ring" if call == "reset" else "clear-log-unset"
    if reason := LOG_MODES[log_mode].supported(kvm):
        pytest.skip(reason)
    monkeypatch.setattr(Vm, CALLS[call], slow)
    phases = figures_of(kvm, log_mode).phases
    others = {"reset": ["harvest"], "get": ["clear"], "clear": ["get"]}[call]
    assert phases[call]["p50"] >= 1000 * DELAY
    assert all(phases[other]["p50"] < 1000 * DELAY for other in others)


def test_stalled_time_of_full_rings(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vCPU is stalled as long as its full ring waits for the collector; with a ring that never fills, not at all."""
    if reason := LOG_MODES["dirty-ring"].supported(kvm):
        pytest.skip(reason)
    assert figures_of(kvm, "dirty-ring").stalled_seconds == 0
    original = Vm.reset_dirty_rings

    def slow(vm: Vm) -> int:
        time.sleep(DELAY)
        return original(vm)

    monkeypatch.setattr(Vm, "reset_dirty_rings", slow)
    figures = figures_of(kvm, "dirty-ring", smallest_ring(kvm))
    assert figures.ring_full_exits
    assert figures.stalled_seconds >= figures.ring_full_exits * DELAY / 2
