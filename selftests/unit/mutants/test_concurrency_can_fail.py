# SPDX-License-Identifier: GPL-2.0-only
"""The checks of concurrent collections and of migrations fail on real KVM with a planted mutant."""

import random
import threading
import time
from array import array
from contextlib import closing

import pytest

from dirty_tracking import ring as dirty_ring
from dirty_tracking import shared_rings, writers
from dirty_tracking.memory_copy import Pages
from dirty_tracking.migration import Migration
from dirty_tracking.race import Worker, race
from dirty_tracking.ring import DirtyRing
from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.shared_log import SharedLog
from dirty_tracking.violations import ContractViolation, Kind, violated
from dirty_tracking.vm import FIRST_GPA, PAGE
from dirty_tracking.write_stream import WriteStream
from dirty_tracking.writers import Pace
from dirty_tracking.writers_vm import WritersVm
from kvm_util import uapi
from kvm_util.kvm import Kvm
from selftests.unit.mutants.catalogue import MUTANTS, Mutant, under_each_mutant
from selftests.unit.mutants.faults import falsify_clears, falsify_pages

SHAPES = [(130, "anonymous"), (70, "anonymous")]
# A mutant shows in the first, as a rule. But a page whose last entry is lost has others, where KVM makes each write itself.
ROUNDS = 30


def streams(vcpus: int = 2) -> list[WriteStream]:
    """Each vCPU writes pages of its own, so that a lost page is not reported for the other one."""
    draw = random.Random(1)
    return [WriteStream(array("I", [draw.randrange(vcpu, 150, vcpus) for _ in range(256)]), 0) for vcpu in range(vcpus)]


def write_more(vm: WritersVm, count: int) -> None:
    """Let the stopped vCPUs make *count* more writes, or write until a ring is full."""
    goal = sum(vm.writers.published()) + count
    vm.writers.resume()
    vm.writers.wait(lambda: sum(vm.writers.published()) >= goal or vm.writers.any_ring_full(), "writing")
    vm.stop()


def check_round(log: SharedLog) -> None:
    """Two collectors beside the vCPUs, and dirty logging disabled and enabled, with some writes before each check."""

    def collect() -> None:
        if log.rings is not None:
            log.harvest()
        else:
            for slot in log.vm.slots:
                log.collect(slot)

    workers = [Worker(log.vm, f"worker{number}", [collect] * 3, random.Random(number), 300) for number in range(2)]
    race(log.vm, workers)
    write_more(log.vm, 300)
    log.check()
    for on in (False, True):
        log.set_all_logging(on)
        write_more(log.vm, 300)
        log.check()
    log.check()  # nothing was written since


@under_each_mutant()
@pytest.mark.mutants
def test_race_fails_under_mutant(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, mutant: Mutant, log_mode: str) -> None:
    """Two threads that collect beside the vCPUs find nothing on KVM as it is, and each mutant that makes a wrong report."""
    # so that the vCPUs write between GET and CLEAR
    falsify_clears(monkeypatch, lambda _vm, _slot, _mask, _first_page: time.sleep(0.002))
    with WritersVm(kvm, log_mode, SHAPES, streams(), 1024) as vm:
        log = SharedLog(vm)
        vm.populate()
        log.set_all_logging(on=True)
        check_round(log)
        monkeypatch.setattr(shared_rings, "HANG_TIMEOUT", 0.5)
        mutant.plant(monkeypatch)
        with pytest.raises(ContractViolation) as caught:
            for _ in range(ROUNDS):
                check_round(log)
        assert mutant.kinds & caught.value.kinds


@pytest.mark.mutants
def test_first_failure_is_reported(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first worker's failure is the one reported, although another worker does not end in time after it."""
    monkeypatch.setattr(writers, "_JOIN_TIMEOUT", 0.2)
    began, over = threading.Event(), threading.Event()

    def fail() -> None:
        began.wait()
        raise violated(Kind.OTHER, "what failed first")

    def hang() -> None:
        began.set()
        over.wait()

    vm = WritersVm(kvm, "dirty-log", SHAPES, streams())
    try:
        with pytest.raises(ContractViolation, match="what failed first") as caught, vm:
            vm.populate()
            race(vm, [Worker(vm, f"to {do.__name__}", [do], random.Random(1), 0) for do in (fail, hang)])
    finally:
        over.set()
        monkeypatch.undo()
        for worker in vm.writers.helpers:
            worker.join()
        vm.close()
    assert any("'to hang'" in note and "did not end within 0.2 s" in note for note in caught.value.__notes__)


@pytest.mark.log_modes("dirty-ring")
@pytest.mark.mutants
def test_harvest_reads_before_it_marks(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harvest marks no entry before it has read all: another thread's reset could free it meanwhile."""
    monkeypatch.setattr(dirty_ring, "_FIRST_BLOCK", 16)
    monkeypatch.setattr(dirty_ring, "_GROWTH", 1)
    parts = DirtyRing._parts  # which each step asks: four blocks of flags, the entries, and the marks
    marked: list[int] = []

    def looked_at(ring: DirtyRing, position: int, count: int) -> list[tuple[int, int]]:
        marked.append(sum(bool(ring.entry(number).flags & uapi.KVM_DIRTY_GFN_F_RESET) for number in range(50)))
        return parts(ring, position, count)

    monkeypatch.setattr(DirtyRing, "_parts", looked_at)
    with ScriptedVm(kvm, "dirty-ring") as vm:
        vm.add_slot(1, FIRST_GPA, 50)
        vm.write(1, *range(50))
        assert list(zip(*vm.rings[0].harvest(), strict=True)) == [(1, page) for page in range(50)]
        assert marked == [0] * 6
        assert vm.vm.reset_dirty_rings() == 50


# --- migrations ---------------------------------------------------------------------------------------------------------


class CopiesTooEarly(Migration):
    """Copies the pages as they were before they are write-protected again: a write in between is in no round."""

    def transfer(self, stopped: bool) -> tuple[int, Pages]:
        early = {slot: bytes(memslot.memory.view) for slot, memslot in self.vm.vm.memslots.items()}
        writers = self.vm.writers
        if not stopped:
            goal = writers.published()[0] + 300
            writers.wait(lambda: writers.published()[0] >= goal or writers.any_ring_full(), "writing")
        reported, pages = self.collect(stopped)
        for slot, reported_pages in pages.items():
            for page in reported_pages:
                where = slice(page * PAGE, (page + 1) * PAGE)
                self.copies[slot][where] = early[slot][where]
        return reported, pages


def migrate(kvm: Kvm, mode: str, kind: type[Migration] = Migration) -> None:
    """The vCPU comes back to a page only after as many writes as it makes in several rounds."""
    shapes = [(2000, "anonymous")]
    pages = array("I", range(1984))
    with (
        WritersVm(kvm, mode, shapes, [WriteStream(pages, 0)], 4096, Pace.VERY_SPARSE) as vm,
        closing(kind(vm, enough=0, most_rounds=2)) as migration,
    ):
        vm.populate()
        vm.writers.resume()
        migration.run()
        migration.verify()


@pytest.mark.mutants
def test_copy_before_write_protection(kvm: Kvm, log_mode: str) -> None:
    """A migration that copies pages before they are write-protected again ends with a wrong copy."""
    migrate(kvm, log_mode)
    with pytest.raises(ContractViolation, match="the copy differs from the source"):
        migrate(kvm, log_mode, CopiesTooEarly)


@pytest.mark.mutants
def test_migration_without_any_page(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """A migration whose reports lack written pages ends with a wrong copy."""
    falsify_pages(monkeypatch, lambda _pages: [])
    with pytest.raises(ContractViolation, match=r"slot 1: LOST .* the copy differs from the source"):
        migrate(kvm, log_mode)


@pytest.mark.log_modes("ring")
@pytest.mark.mutants
def test_migration_with_wrong_reset_count(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """A migration in which KVM resets fewer entries than were harvested fails by the reset count."""
    MUTANTS["reset-count-low"].plant(monkeypatch)
    with pytest.raises(ContractViolation, match=r"harvested \d+, reset \d+"):
        migrate(kvm, log_mode)
