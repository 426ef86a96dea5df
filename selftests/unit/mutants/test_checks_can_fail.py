# SPDX-License-Identifier: GPL-2.0-only
"""Single operations, and runs of the matrix, on real KVM with a planted mutant: each is a violation.

In a run a mutant is planted after :data:`SOUND_ITERATIONS`; the iterations until it is found are printed at the end.
"""

import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from dirty_tracking.memory_check import WORDS_PER_PAGE, MemoryCheck
from dirty_tracking.report import DirtyReport
from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.violations import ContractViolation, Kind
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util.ioctl import KvmError
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB
from kvm_util.vm import Vm
from selftests.unit.mutants.catalogue import MUTANTS, Mutant, under_each_mutant
from selftests.unit.mutants.faults import falsify_clears

SLOT, OTHER = 1, 2
NPAGES = 70
WRITTEN = [3, 64, 69]
ITERATIONS = 80
SOUND_ITERATIONS = 2  # complete iterations before a mutant is planted
SETTINGS = Settings(iterations=ITERATIONS, interval=2.0, ring_count=1024, test_mem=8 * MIB, seed=1)


def check_reports(vm: ScriptedVm) -> None:
    """Report the same pages twice, nothing, what is written to another slot, and what toggled dirty logging leaves."""
    for number in range(2):
        vm.write(SLOT, *WRITTEN)
        vm.assert_dirty(f"writes {number}", {SLOT: WRITTEN})
    vm.assert_dirty("nothing", {})
    vm.write(OTHER, 5)
    vm.assert_dirty("a write to the other slot", {OTHER: [5]})
    vm.disable_dirty_logging(SLOT)
    vm.write(SLOT, 1)
    vm.assert_dirty("a write without dirty logging", {})
    vm.enable_dirty_logging(SLOT)
    vm.write(SLOT, *WRITTEN)
    vm.assert_dirty("writes after enabling it", {SLOT: WRITTEN})


@under_each_mutant("clear-takes-whole-range")  # nothing is written between GET and CLEAR
@pytest.mark.mutants
def test_wrong_report_of_each_mutant(
    kvm: Kvm, emulates: bool, monkeypatch: pytest.MonkeyPatch, mutant: Mutant, log_mode: str
) -> None:
    """assert_dirty(), which most contract tests end with, fails under each mutant that makes a wrong report."""
    if emulates and mutant.name == "reset-ignored":
        # mark_page_dirty_in_slot() (virt/kvm/kvm_main.c) pushes each write that KVM makes itself, write-protected or not.
        pytest.skip("this backend makes each write itself, and needs no write protection to see it")
    with ScriptedVm(kvm, log_mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.add_slot(OTHER, FIRST_GPA + NPAGES * PAGE, NPAGES)
        check_reports(vm)
        mutant.plant(monkeypatch)
        with pytest.raises((ContractViolation, KvmError)):
            check_reports(vm)


# --- runs of the matrix -------------------------------------------------------------------------------------------------


@dataclass
class Planter:
    """Plants a fault in a run.

    :ivar planted: the iteration in which it was planted
    """

    run: DirtyLogRun
    planted: int | None = None

    def is_due(self, stopped: bool = True) -> bool:
        """Whether a fault is to be planted now, for the first time: in a collection with the vCPUs *stopped*, or not."""
        iterations = self.run.figures.iterations
        return iterations >= SOUND_ITERATIONS and self.planted is None and self.run.writers.all_stopped() == stopped

    def plant(self) -> None:
        self.planted = self.run.figures.iterations + 1


@contextmanager
def caught(
    kvm: Kvm, request: pytest.FixtureRequest, mode: str, kinds: Set[Kind], vcpus: int = 1, within: int = 3
) -> Iterator[Planter]:
    """Start a run in *mode*, let the body plant a fault, and expect a violation of one of *kinds* in so many iterations."""
    cell = Cell(mode, "48bit-4k", "anonymous", "cooperative", "sparse", vcpus)
    with DirtyLogRun(kvm, cell, SETTINGS) as run:
        planter = Planter(run)
        yield planter
        with pytest.raises(ContractViolation) as error:
            run.run()
        assert planter.planted, "the fault was never planted, so it did not cause this failure"
        assert kinds & error.value.kinds
        iterations = error.value.violations[0].iteration - planter.planted + 1
        name = request.node.originalname.removeprefix("test_")
        if "mutant" in request.node.callspec.params:
            name = request.node.callspec.params["mutant"].name
        request.node.user_properties += [("fault", name), ("fault_in", mode), ("caught_within", iterations)]
        assert 1 <= iterations <= within


# These show only if the guest then writes, or does not write, a certain page.
LATE = {
    *("page-repeated", "clear-skips-page", "clear-takes-whole-range"),
    *("reset-ignored", "get-leaves-page-writable", "clear-leaves-page-writable", "reset-leaves-page-writable"),
}


@pytest.mark.parametrize("vcpus", [1, 2])
@under_each_mutant("logging-stays-off", "logging-stays-on")  # a run enables dirty logging once
@pytest.mark.mutants
def test_run_fails_under_mutant(
    kvm: Kvm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, mutant: Mutant, log_mode: str, vcpus: int
) -> None:
    """A run finds each mutant that makes a wrong report, most of them in the first report that is wrong."""
    within = ITERATIONS if mutant.name in LATE else 3
    with caught(kvm, request, log_mode, mutant.kinds, vcpus, within) as planter:
        collect = planter.run.mode.collect

        def planting(*arguments: Any, **options: Any) -> DirtyReport:
            if planter.is_due():
                planter.plant()
                mutant.plant(monkeypatch)
            return collect(*arguments, **options)

        monkeypatch.setattr(planter.run.mode, "collect", planting)
        # so that the vCPU writes between GET and CLEAR
        falsify_clears(monkeypatch, lambda _vm, _slot, _mask, _first_page: time.sleep(0.002))


@pytest.mark.mutants
def test_wrong_value_in_memory_is_found(
    kvm: Kvm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, log_mode: str
) -> None:
    """A page with an older value, as if a reported write had been lost, is a violation."""
    check = MemoryCheck.check
    with caught(kvm, request, log_mode, {Kind.VALUE}) as planter:

        def falsified(memory: MemoryCheck, iteration: int, done: list[int]) -> object:
            if planter.is_due():
                planter.plant()
                page = planter.run.streams[0].between(done[0] - 10, done[0] - 9)[0]
                planter.run.memslot.memory.words[page * WORDS_PER_PAGE] -= 1
            return check(memory, iteration, done)

        monkeypatch.setattr(MemoryCheck, "check", falsified)


@pytest.mark.mutants
def test_page_lost_in_a_running_collection(
    kvm: Kvm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, log_mode: str
) -> None:
    """A page is LOST if a collection lacks it that ran beside the vCPU and began after the write."""
    with caught(kvm, request, log_mode, {Kind.LOST}) as planter:
        collect = planter.run.mode.collect
        seen = 0  # writes that the collection before may have reported

        def falsified(vm: Vm, kick: Callable[[], None] | None, **options: Any) -> DirtyReport:
            nonlocal seen
            written = planter.run.writers.published()[0] - 50  # the collection's own count was taken a moment ago
            report = collect(vm, kick, **options)
            since, seen = seen, planter.run.writers.published()[0] + 1
            if kick is not None and planter.is_due(stopped=False):
                long_done = set(planter.run.streams[0].between(since, max(since, written)))
                (source,) = report.sources
                page = next((page for page in source.offsets if page in long_done), None)
                if page is not None:
                    source.offsets = [other for other in source.offsets if other != page]
                    source.slots = source.slots[: len(source.offsets)]
                    report.reset = report.harvested
                    planter.plant()
            return report

        monkeypatch.setattr(planter.run.mode, "collect", falsified)


@pytest.mark.log_modes("dirty-ring")
@pytest.mark.parametrize(("ring_count", "lapped"), [(1024, True), (1 << 40, False)])
@pytest.mark.mutants
def test_violations_and_a_lapped_ring(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, ring_count: int, lapped: bool) -> None:
    """A violation says whether a vCPU made more writes between two collections than its ring has entries."""
    cell = Cell("dirty-ring", "48bit-4k", "anonymous", "cooperative", "sparse", 1)
    MUTANTS["page-lost"].plant(monkeypatch)
    with DirtyLogRun(kvm, cell, replace(SETTINGS, ring_count=65536, test_mem=16 * MIB)) as run:
        # The ring that KVM has is not overrun; the run, of 4096 writes at least, is compared with one of another size.
        run.settings = replace(run.settings, ring_count=ring_count)
        with pytest.raises(ContractViolation) as error:
            run.run()
    assert {violation.ring_lapped for violation in error.value.violations} == {lapped}


def test_each_kind_of_violation_has_a_fault() -> None:
    """Each kind of violation is what a planted fault causes, here or in test_runs_end_well.py."""
    here = {Kind.VALUE}.union(*(mutant.kinds for mutant in MUTANTS.values()))
    stuck = {Kind.STUCK, Kind.GAP}  # test_runs_end_well.py: test_ring_that_stays_full
    assert here | stuck == set(Kind) - {Kind.OTHER}
