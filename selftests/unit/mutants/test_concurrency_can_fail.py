# SPDX-License-Identifier: GPL-2.0-only
"""The checks of concurrent collections and of migrations fail when an answer of real KVM is falsified."""

import random
import threading
from array import array
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from dirty_tracking import ring as dirty_ring
from dirty_tracking import shared_rings, writers
from dirty_tracking.migration import Migration, Pages
from dirty_tracking.race import Worker, race
from dirty_tracking.ring import DirtyRing
from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.shared_log import SharedLog
from dirty_tracking.shared_rings import SharedRings
from dirty_tracking.violations import ContractViolation, Kind, violated
from dirty_tracking.vm import FIRST_GPA, PAGE
from dirty_tracking.write_stream import WriteStream
from dirty_tracking.writers import Pace
from dirty_tracking.writers_vm import WritersVm
from kvm_util import uapi
from kvm_util.kvm import Kvm
from kvm_util.vm import Vm
from selftests.unit.mutants.faults import falsify_bitmaps

SHAPES = [(130, "anonymous"), (70, "anonymous")]
NPAGES = 200
BITMAP_MODES = ["dirty-log", "clear-log", "clear-log-unset"]
RING_MODES = ["dirty-ring", "dirty-ring-plain"]
Taken = tuple[list[int], list[int]]


def streams(vcpus: int = 2) -> list[WriteStream]:
    """Each vCPU writes pages of its own, so that a lost page is not reported for the other one."""
    draw = random.Random(1)
    return [WriteStream(array("I", [draw.randrange(vcpu, 150, vcpus) for _ in range(256)]), 0) for vcpu in range(vcpus)]


def one_round(log: SharedLog) -> None:
    """Two collectors; then some writes more, so that there is something for the last collection."""

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


def write_more(vm: WritersVm, count: int) -> None:
    """Let the stopped vCPUs make *count* more writes, or write until a ring is full."""
    goal = sum(vm.writers.published()) + count
    vm.writers.resume()
    vm.writers.wait(lambda: sum(vm.writers.published()) >= goal or vm.writers.any_ring_full(), "writing")
    vm.stop()


def check_fails(kvm: Kvm, mode: str, falsify: Callable[[SharedLog], None], match: str) -> None:
    """A sound round passes, the falsified one does not."""
    with WritersVm(kvm, mode, SHAPES, streams(), 1024) as vm:
        log = SharedLog(vm)
        vm.populate()
        log.set_all_logging(on=True)
        one_round(log)
        falsify(log)
        with pytest.raises(ContractViolation, match=match):
            one_round(log)


def drop_the_last(log: SharedLog, bitmap: bytearray) -> None:
    if log.vm.writers.all_stopped():
        bitmap[:] = bytes(len(bitmap))


def drop_bits_all_the_time(log: SharedLog, bitmap: bytearray) -> None:
    bitmap[0] = 0


@pytest.mark.parametrize("fault", [drop_the_last, drop_bits_all_the_time], ids=lambda fault: fault.__name__)
@pytest.mark.log_modes("bitmap")
@pytest.mark.mutants
def test_bitmap_without_some_pages(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str,
    fault: Callable[[SharedLog, bytearray], None],
) -> None:  # fmt: skip
    """Pages that are missing in the last bitmap, or in all, are LOST."""
    check_fails(
        kvm, log_mode, lambda log: falsify_bitmaps(monkeypatch, lambda _vm, _slot, bitmap: fault(log, bitmap)), "LOST"
    )


@pytest.mark.log_modes("bitmap")
@pytest.mark.mutants
def test_bitmap_with_an_extra_page(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """A page that no vCPU writes and that is in a bitmap is SPURIOUS."""

    def add_its_last_page(_vm: Vm, slot: int, bitmap: bytearray) -> None:
        if slot == 2:
            bitmap[69 // 8] |= 1 << 69 % 8

    check_fails(kvm, log_mode, lambda _of: falsify_bitmaps(monkeypatch, add_its_last_page), "SPURIOUS")


@pytest.mark.log_modes("clear-log", "clear-log-unset")
@pytest.mark.mutants
def test_clear_of_more_than_its_mask(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """Pages that are written between GET and CLEAR, and that CLEAR clears beyond its mask, are LOST."""
    honest = Vm.clear_dirty_log
    with WritersVm(kvm, log_mode, SHAPES, streams()) as vm:
        log = SharedLog(vm)
        vm.populate()
        log.set_all_logging(on=True)
        log.check()

        def falsified(its: Vm, slot: int, bitmap: bytearray, first_page: int, num_pages: int) -> None:
            write_more(vm, 600)
            honest(its, slot, bytearray(b"\xff" * len(bitmap)), first_page, num_pages)

        with monkeypatch.context() as patch:
            patch.setattr(Vm, "clear_dirty_log", falsified)
            log.collect(vm.slots[0])
        with pytest.raises(ContractViolation, match="LOST"):
            log.check()


RING_FAULTS: dict[str, tuple[Callable[[Taken], Taken], str]] = {
    "loses an entry": (lambda taken: (taken[0][1:], taken[1][1:]), "LOST|harvested "),
    "adds an entry": (lambda taken: ([*taken[0], 2], [*taken[1], 69]), "SPURIOUS|harvested "),
    "names no slot": (lambda taken: ([77 for _ in taken[0]], taken[1]), "WRONG_SLOT .* slot 0x4d"),
}


@pytest.mark.parametrize("fault", RING_FAULTS.values(), ids=list(RING_FAULTS))
@pytest.mark.log_modes("ring")
@pytest.mark.mutants
def test_falsified_ring_entries(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str,
    fault: tuple[Callable[[Taken], Taken], str],
) -> None:  # fmt: skip
    """Missing, extra and misplaced ring entries are violations."""
    falsified, match = fault
    honest = DirtyRing.harvest
    check_fails(
        kvm,
        log_mode,
        lambda _of: monkeypatch.setattr(DirtyRing, "harvest", lambda ring, most=None: falsified(honest(ring, most))),
        match,
    )


@pytest.mark.log_modes("ring")
@pytest.mark.mutants
def test_entries_in_another_vcpus_ring(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """Entries in the ring of a vCPU that did not write their pages are SPURIOUS."""
    harvest, reset_up_to = SharedRings.harvest, SharedRings.reset_up_to

    def falsify(_of: SharedLog) -> None:
        monkeypatch.setattr(SharedRings, "harvest", lambda rings, vcpu, most=None: harvest(rings, 1 - vcpu, most))
        monkeypatch.setattr(SharedRings, "reset_up_to", lambda rings, positions: reset_up_to(rings, positions[::-1]))

    check_fails(kvm, log_mode, falsify, "SPURIOUS")


@pytest.mark.parametrize("answer", ["nothing", "all"])
@pytest.mark.log_modes("ring")
@pytest.mark.mutants
def test_reset_without_effect(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str, answer: str) -> None:
    """A reset that leaves harvested entries is a violation, whatever count it returns."""
    monkeypatch.setattr(shared_rings, "HANG_TIMEOUT", 0.5)

    def falsify(log: SharedLog) -> None:
        rings = log.vm.mode.rings(log.vm.vm)

        def harvested(_vm: Vm) -> int:
            flags = (ring.entry(number).flags for ring in rings for number in range(ring.entries))
            return sum(bool(its & uapi.KVM_DIRTY_GFN_F_RESET) for its in flags)

        monkeypatch.setattr(Vm, "reset_dirty_rings", harvested if answer == "all" else lambda _vm: 0)

    check_fails(kvm, log_mode, falsify, "leaves harvested entries")


@pytest.mark.parametrize("wrong_by", [-1, 1])
@pytest.mark.log_modes("dirty-ring")
@pytest.mark.mutants
def test_wrong_reset_count(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, wrong_by: int) -> None:
    """A reset that returns one entry more or less than it reset is a violation."""
    honest = Vm.reset_dirty_rings
    check_fails(
        kvm, "dirty-ring", lambda _of: monkeypatch.setattr(Vm, "reset_dirty_rings", lambda vm: honest(vm) + wrong_by),
        "harvested ",
    )  # fmt: skip


@pytest.mark.mutants
def test_logging_that_stays_disabled(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """Dirty logging that stays disabled when it is enabled loses writes, or has no bitmap."""

    def falsify(log: SharedLog) -> None:
        log.set_all_logging(on=False)
        monkeypatch.setattr(log.vm.vm, "set_flags", lambda *_arguments, **_named: None)
        log.set_all_logging(on=True)

    check_fails(kvm, log_mode, falsify, "LOST" if log_mode in RING_MODES else "ENOENT while dirty logging was enabled")


@pytest.mark.mutants
def test_logging_that_stays_enabled(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """Dirty logging that stays enabled when it is disabled reports pages, or has a bitmap."""

    def falsify(log: SharedLog) -> None:
        monkeypatch.setattr(log.vm.vm, "set_flags", lambda *_arguments, **_named: None)
        log.set_all_logging(on=False)

    check_fails(
        kvm, log_mode, falsify, "SPURIOUS" if log_mode in RING_MODES else "a bitmap while dirty logging was disabled"
    )


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
    monkeypatch.setattr(dirty_ring, "_CHUNK", 16)
    read_chunk = DirtyRing._read_chunk
    marked: list[int] = []

    def looked_at(ring: DirtyRing, *arguments: Any) -> int:
        marked.append(sum(bool(ring.entry(number).flags & uapi.KVM_DIRTY_GFN_F_RESET) for number in range(50)))
        return read_chunk(ring, *arguments)

    monkeypatch.setattr(DirtyRing, "_read_chunk", looked_at)
    with ScriptedVm(kvm, "dirty-ring") as vm:
        vm.add_slot(1, FIRST_GPA, 50)
        vm.write(1, *range(50))
        assert vm.rings[0].harvest() == ([1] * 50, list(range(50)))
        assert marked == [0] * 5
        assert vm.vm.reset_dirty_rings() == 50


@pytest.mark.log_modes("ring")
@pytest.mark.mutants
def test_ring_with_repeated_entries(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """Ring entries that are returned twice are DUPLICATE."""
    honest = SharedRings.harvest

    def falsified(rings: SharedRings, vcpu: int, most: int | None = None) -> Any:
        slots, offsets, position = honest(rings, vcpu, most)
        return (slots * 2, offsets * 2, position) if vcpu == 0 else (slots, offsets, position)

    check_fails(kvm, log_mode, lambda _of: monkeypatch.setattr(SharedRings, "harvest", falsified), "DUPLICATE")


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
        for slot, its in pages.items():
            for page in its:
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


@pytest.mark.log_modes("bitmap")
@pytest.mark.mutants
def test_migration_without_some_pages(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """A migration whose bitmaps lack written pages ends with a wrong copy."""

    def empty_the_first_ones(_vm: Vm, slot: int, bitmap: bytearray) -> None:
        if slot == 1:
            bitmap[:] = bytes(len(bitmap))

    falsify_bitmaps(monkeypatch, empty_the_first_ones)
    with pytest.raises(ContractViolation, match=r"slot 1: LOST .* the copy differs from the source"):
        migrate(kvm, log_mode)


@pytest.mark.log_modes("ring")
@pytest.mark.mutants
def test_migration_without_ring_entries(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """A migration that harvests fewer entries than are reset fails by the reset count."""
    honest = DirtyRing.harvest
    monkeypatch.setattr(DirtyRing, "harvest", lambda ring, most=None: tuple(part[1:] for part in honest(ring, most)))
    with pytest.raises(ContractViolation, match=r"harvested \d+, reset \d+"):
        migrate(kvm, log_mode)
