# SPDX-License-Identifier: GPL-2.0-only
"""The checks of concurrent collections and of migrations can fail: real KVM's answers are falsified, and that is found."""

import random
import threading
from array import array
from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import Any

import pytest

from dirty_tracking import reset_ledger, writers
from dirty_tracking import ring as dirty_ring
from dirty_tracking.cell import PAGE
from dirty_tracking.collection_log import Collection, CollectionLog, Drop, Toggle
from dirty_tracking.collectors import Collectors, Worker, work_together
from dirty_tracking.migration import Migration, Pages
from dirty_tracking.ring import DirtyRing
from dirty_tracking.tracked_vm import FIRST_GPA, TrackedVm
from dirty_tracking.violations import ContractViolation, Kind, violated
from dirty_tracking.write_stream import WriteStream
from dirty_tracking.writers import SPARSER
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


def one_round(of: Collectors) -> None:
    """Two collectors; then some writes more, so that there is something for the last collection."""

    def collect() -> None:
        if of.ledger is not None:
            of.harvest()
        else:
            for area in of.vm.areas:
                of.collect(area)

    workers = [Worker(of.vm, f"worker{number}", [collect] * 3, random.Random(number), 300) for number in range(2)]
    work_together(of.vm, workers)
    write_more(of.vm, 300)
    of.check()


def write_more(vm: WritersVm, count: int) -> None:
    """Let the stopped vCPUs write so much more, or until a ring is full."""
    goal = sum(vm.writers.published()) + count
    vm.writers.let_go()
    vm.writers.wait(lambda: sum(vm.writers.published()) >= goal or vm.writers.any_ring_full(), "writing")
    vm.stop()


def check_fails(kvm: Kvm, mode: str, falsify: Callable[[Collectors], None], match: str) -> None:
    """A sound round passes, the falsified one does not."""
    with WritersVm(kvm, mode, SHAPES, streams(), 1024) as vm:
        of = Collectors(vm)
        vm.start()
        for area in vm.areas:
            of.switch(area, on=True, stopped=True)
        one_round(of)
        falsify(of)
        with pytest.raises(ContractViolation, match=match):
            one_round(of)


def drop_the_last(of: Collectors, bitmap: bytearray) -> None:
    if of.vm.writers.all_stopped():
        bitmap[:] = bytes(len(bitmap))


def drop_bits_all_the_time(of: Collectors, bitmap: bytearray) -> None:
    bitmap[0] = 0


@pytest.mark.parametrize("fault", [drop_the_last, drop_bits_all_the_time], ids=lambda fault: fault.__name__)
@pytest.mark.log_modes("bitmap")
def test_a_bitmap_that_lacks_pages(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str,
    fault: Callable[[Collectors, bytearray], None],
) -> None:  # fmt: skip
    check_fails(kvm, log_mode, lambda of: falsify_bitmaps(monkeypatch, lambda _slot, bitmap: fault(of, bitmap)), "LOST")


@pytest.mark.log_modes("bitmap")
def test_a_bitmap_with_a_page_too_many(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """The last page of the second slot, which nobody writes."""

    def add_its_last_page(slot: int, bitmap: bytearray) -> None:
        if slot == 2:
            bitmap[69 // 8] |= 1 << 69 % 8

    check_fails(kvm, log_mode, lambda _of: falsify_bitmaps(monkeypatch, add_its_last_page), "SPURIOUS")


@pytest.mark.log_modes("clear-log", "clear-log-unset")
def test_a_clear_of_more_than_was_asked(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """Pages written between GET and CLEAR lose their bits, and no GET has told of them."""
    honest = Vm.clear_dirty_log
    with WritersVm(kvm, log_mode, SHAPES, streams()) as vm:
        of = Collectors(vm)
        vm.start()
        for area in vm.areas:
            of.switch(area, on=True, stopped=True)
        of.check()

        def falsified(its: Vm, slot: int, bitmap: bytearray, first_page: int, num_pages: int) -> None:
            write_more(vm, 600)
            honest(its, slot, bytearray(b"\xff" * len(bitmap)), first_page, num_pages)

        with monkeypatch.context() as patch:
            patch.setattr(Vm, "clear_dirty_log", falsified)
            of.collect(vm.areas[0])
        with pytest.raises(ContractViolation, match="LOST"):
            of.check()


RING_FAULTS: dict[str, tuple[Callable[[Taken], Taken], str]] = {
    "loses an entry": (lambda taken: (taken[0][1:], taken[1][1:]), "LOST|harvested "),
    "adds an entry": (lambda taken: ([*taken[0], 2], [*taken[1], 69]), "SPURIOUS|harvested "),
    "names no slot": (lambda taken: ([77 for _ in taken[0]], taken[1]), "has an entry of slot 0x4d"),
}


@pytest.mark.parametrize("fault", RING_FAULTS.values(), ids=list(RING_FAULTS))
@pytest.mark.log_modes("ring")
def test_a_falsified_ring(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str,
    fault: tuple[Callable[[Taken], Taken], str],
) -> None:  # fmt: skip
    falsified, match = fault
    honest = DirtyRing.harvest
    check_fails(
        kvm,
        log_mode,
        lambda _of: monkeypatch.setattr(DirtyRing, "harvest", lambda ring, most=None: falsified(honest(ring, most))),
        match,
    )


@pytest.mark.log_modes("ring")
def test_entries_in_another_vcpus_ring(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """Nothing is lost, but the first vCPU's ring has what the second one wrote, and the other way round."""
    honest = reset_ledger.ResetLedger.harvest

    def falsified(ledger: reset_ledger.ResetLedger, vcpu: int, most: int | None = None) -> Any:
        return honest(ledger, 1 - vcpu, most)

    def positions(ledger: reset_ledger.ResetLedger, asked: Any) -> None:
        reset_up_to(ledger, asked[::-1])

    reset_up_to = reset_ledger.ResetLedger.reset_up_to

    def falsify(_of: Collectors) -> None:
        monkeypatch.setattr(reset_ledger.ResetLedger, "harvest", falsified)
        monkeypatch.setattr(reset_ledger.ResetLedger, "reset_up_to", positions)

    check_fails(kvm, log_mode, falsify, "SPURIOUS")


@pytest.mark.parametrize("answer", ["nothing", "all"])
@pytest.mark.log_modes("ring")
def test_a_reset_that_is_not_made(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str, answer: str) -> None:
    """Whether KVM says that it took nothing, or all."""

    def falsify(of: Collectors) -> None:
        ledger = of.ledger
        assert ledger is not None
        monkeypatch.setattr(
            Vm, "reset_dirty_rings", lambda _vm: ledger.harvested - ledger.taken if answer == "all" else 0
        )

    check_fails(kvm, log_mode, falsify, "leaves harvested entries")


@pytest.mark.parametrize("wrong_by", [-1, 1])
@pytest.mark.log_modes("dirty-ring")
def test_a_wrong_reset_count(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, wrong_by: int) -> None:
    honest = Vm.reset_dirty_rings
    check_fails(
        kvm, "dirty-ring", lambda _of: monkeypatch.setattr(Vm, "reset_dirty_rings", lambda vm: honest(vm) + wrong_by),
        "harvested ",
    )  # fmt: skip


def test_tracking_that_is_not_switched_on(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:

    def falsify(of: Collectors) -> None:
        for area in of.vm.areas:
            of.switch(area, on=False, stopped=True)
        monkeypatch.setattr(of.vm.vm, "set_flags", lambda *_arguments, **_named: None)
        for area in of.vm.areas:
            of.switch(area, on=True, stopped=True)

    check_fails(kvm, log_mode, falsify, "LOST" if log_mode in RING_MODES else "ENOENT while tracking was on")


def test_tracking_that_is_not_switched_off(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:

    def falsify(of: Collectors) -> None:
        monkeypatch.setattr(of.vm.vm, "set_flags", lambda *_arguments, **_named: None)
        for area in of.vm.areas:
            of.switch(area, on=False, stopped=True)

    check_fails(kvm, log_mode, falsify, "SPURIOUS" if log_mode in RING_MODES else "a bitmap while tracking was off")


def test_what_failed_first_is_told(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although another worker does not end in time then."""
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
            vm.start()
            work_together(vm, [Worker(vm, f"to {do.__name__}", [do], random.Random(1), 0) for do in (fail, hang)])
    finally:
        over.set()
        monkeypatch.undo()
        vm.close()
    assert any("'to hang'" in note and "did not end within 0.2 s" in note for note in caught.value.__notes__)


@pytest.mark.log_modes("dirty-ring")
def test_a_harvest_marks_nothing_before_all_is_read(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was marked could be taken back by another thread's reset, and come again in the same harvest."""
    monkeypatch.setattr(dirty_ring, "_CHUNK", 16)
    read_chunk = DirtyRing._read_chunk
    marked: list[int] = []

    def looked_at(ring: DirtyRing, *arguments: Any) -> int:
        marked.append(sum(bool(ring.entry(number).flags & uapi.KVM_DIRTY_GFN_F_RESET) for number in range(50)))
        return read_chunk(ring, *arguments)

    monkeypatch.setattr(DirtyRing, "_read_chunk", looked_at)
    with TrackedVm(kvm, "dirty-ring") as vm:
        vm.add_slot(1, FIRST_GPA, 50)
        vm.write(1, *range(50))
        assert vm.rings[0].harvest() == ([1] * 50, list(range(50)))
        assert marked == [0] * 5
        assert vm.vm.reset_dirty_rings() == 50


# --- the log, without KVM: what real timing shows now and then only ------------------------------------------------------

LINE = WriteStream(array("I", range(64)), 0)


def collection(
    start: int, end: int, before: int, after: int, pages: list[int], exact: bool = False, complete: bool = True
) -> Collection:
    return Collection(start, [before], exact, end, [after], 0, 64, [pages], complete)


def judged(*collections: Collection, streams: list[WriteStream] | None = None) -> None:
    log = CollectionLog(streams or [LINE], per_vcpu=False, initially_set=False)
    log.add(Toggle(0, [0], True, 1, [0], on=True, first=0))
    for one in collections:
        log.add(one)
    log.check([(0, 64)])


def test_a_write_that_an_overlapping_collection_has_is_not_lost() -> None:
    """Two collections at once: the second one lacks what the first one took, and that is right."""
    judged(
        collection(2, 5, 4, 8, [0, 1, 2, 3, 4]),
        collection(3, 4, 5, 6, []),
        collection(6, 7, 8, 8, [5, 6, 7], exact=True),
    )


def test_a_write_after_the_end_of_the_collection_that_has_its_page_is_lost() -> None:
    """Page 0 is in the first, but was written again since (write 64), and is not in the last."""
    with pytest.raises(ContractViolation, match="LOST"):
        judged(collection(2, 3, 60, 60, [*range(60)]), collection(4, 5, 66, 66, [1, 60, 61, 62, 63], exact=True))


def test_a_page_that_a_complete_collection_had_is_false_in_the_next() -> None:
    with pytest.raises(ContractViolation, match="SPURIOUS"):
        judged(collection(2, 3, 4, 4, [0, 1, 2, 3]), collection(4, 5, 5, 5, [3, 4], exact=True))


def test_a_page_that_was_left_by_a_partial_collection_is_not_false() -> None:
    judged(collection(2, 3, 4, 4, [0, 1], complete=False), collection(4, 5, 5, 5, [2, 3, 4], exact=True))


@pytest.mark.parametrize(("taken_back", "right"), [(True, True), (False, False)])
def test_a_write_under_way_has_two_entries_only_where_its_page_was_tracked_anew(taken_back: bool, right: bool) -> None:
    """Here because another vCPU's entry of the page was taken back meanwhile."""
    streams = [WriteStream(array("I", [3, 5, 1, 1]), 0), WriteStream(array("I", [5, 2, 2, 2]), 0)]
    log = CollectionLog(streams, per_vcpu=True, initially_set=False)
    log.add(Toggle(0, [0, 0], True, 1, [0, 0], on=True, first=0))
    first, second = ([[3], [5]], [[5, 5], []]) if taken_back else ([[3], []], [[5, 5], [5]])
    done = 1 if taken_back else 0
    log.add(Collection(2, [1, done], False, 3, [1, done], 0, 64, first))
    log.add(Collection(4, [2, 1], True, 5, [2, 1], 0, 64, second))
    with nullcontext() if right else pytest.raises(ContractViolation, match="DUPLICATE"):
        log.check([(0, 64)])


@pytest.mark.parametrize(("page", "dropped"), [(2, True), (2, False), (1, True)])
def test_a_write_under_way_has_two_entries_only_where_page_tables_were_dropped(page: int, dropped: bool) -> None:
    """Write 2, to page 2, was under way as a slot was deleted; that to page 1 was done."""
    log = CollectionLog([LINE], per_vcpu=True, initially_set=False)
    log.add(Toggle(0, [0], True, 1, [0], on=True, first=0))
    if dropped:
        log.add(Drop(2, [2], False, 3, [2]))
    log.add(Collection(4, [4], True, 5, [4], 0, 64, [sorted([0, 1, 2, 3, page])]))
    with nullcontext() if (page, dropped) == (2, True) else pytest.raises(ContractViolation, match="DUPLICATE"):
        log.check([(0, 64)])


@pytest.mark.parametrize(
    ("harvest", "last", "right"),
    [
        (None, ([3], [0, 1, 2, 2]), True),
        (([2], [0, 1]), ([3], [2, 2]), True),
        (([65], [*range(64), 0]), ([67], [1, 2, 2]), False),
    ],
    ids=["no-harvest", "under-way-in-the-harvest", "done-before-the-harvest"],
)
def test_what_tracked_pages_anew_before_the_last_harvest_is_no_reason(
    harvest: tuple[list[int], list[int]] | None, last: tuple[list[int], list[int]], right: bool
) -> None:
    """Write 2, under way as a slot was deleted, may have two entries; write 66, to the same page, has one."""
    log = CollectionLog([LINE], per_vcpu=True, initially_set=False)
    log.add(Toggle(0, [0], True, 1, [0], on=True, first=0))
    log.add(Drop(2, [2], False, 3, [2]))
    if harvest is not None:
        log.add(Collection(4, harvest[0], False, 5, harvest[0], 0, 64, [harvest[1]]))
    log.add(Collection(6, last[0], True, 7, last[0], 0, 64, [last[1]]))
    with nullcontext() if right else pytest.raises(ContractViolation, match="DUPLICATE"):
        log.check([(0, 64)])


@pytest.mark.parametrize(("told", "right"), [(range(64, 128), True), (range(64, 127), False)])
def test_all_pages_are_dirty_at_first_until_they_were_collected(told: range, right: bool) -> None:
    """The first half was collected by itself; then all, of which the second half has to be there still."""
    log = CollectionLog([LINE], per_vcpu=False, initially_set=True)
    log.add(Toggle(0, [0], True, 1, [0], on=True, first=0))
    log.add(Collection(2, [0], True, 3, [0], 0, 64, [[*range(64)]]))
    log.add(Collection(4, [0], True, 5, [0], 0, 128, [[*told]]))
    with nullcontext() if right else pytest.raises(ContractViolation, match="all pages are dirty at first"):
        log.check([(0, 128)])


def test_only_pages_of_the_collection_count_as_demanded() -> None:
    log = CollectionLog([LINE], per_vcpu=False, initially_set=False)
    log.add(Toggle(0, [0], True, 1, [0], on=True, first=32))
    log.add(Collection(2, [8], True, 3, [8], 32, 64, [[]]))
    log.check([(32, 64)])
    assert log.demanded == 0


@pytest.mark.parametrize(("entries", "right"), [(3, True), (4, False)])
def test_a_write_under_way_has_an_entry_for_each_of_its_page_that_is_taken_back(entries: int, right: bool) -> None:
    """The ring had page 1 twice, as one entry was left from before tracking was switched off and on; write 65 meets both."""
    log = CollectionLog([LINE], per_vcpu=True, initially_set=False)
    log.add(Toggle(0, [0], True, 1, [0], on=True, first=0))
    log.add(Toggle(2, [2], True, 3, [2], on=False, first=0))
    log.add(Toggle(4, [64], True, 5, [64], on=True, first=0))
    log.add(Collection(6, [65], False, 7, [65], 0, 64, [[0, 1, 0, 1]]))
    log.add(Collection(8, [66], True, 9, [66], 0, 64, [[1] * entries]))
    with nullcontext() if right else pytest.raises(ContractViolation, match="DUPLICATE"):
        log.check([(0, 64)])


def test_what_a_collection_takes_back_is_no_reason_for_its_own_entries() -> None:
    """It is taken back afterwards: page 2 has one write, and three entries in the same collection."""
    log = CollectionLog([LINE], per_vcpu=True, initially_set=False)
    log.add(Toggle(0, [0], True, 1, [0], on=True, first=0))
    log.add(Collection(2, [2], False, 3, [4], 0, 64, [[0, 1, 2, 2, 2]]))
    log.add(Collection(4, [4], True, 5, [4], 0, 64, [[3]]))
    with pytest.raises(ContractViolation, match="DUPLICATE"):
        log.check([(0, 64)])


@pytest.mark.log_modes("ring")
def test_a_ring_that_repeats_its_entries(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """Of real KVM, all that vCPU 0's ring has, twice; the count of what is reset is kept right."""
    honest = reset_ledger.ResetLedger.harvest

    def falsified(ledger: reset_ledger.ResetLedger, vcpu: int, most: int | None = None) -> Any:
        entries, position = honest(ledger, vcpu, most)
        return entries * 2 if vcpu == 0 else entries, position

    check_fails(
        kvm, log_mode, lambda _of: monkeypatch.setattr(reset_ledger.ResetLedger, "harvest", falsified), "DUPLICATE"
    )


# --- migrations ---------------------------------------------------------------------------------------------------------


class CopiesTooEarly(Migration):
    """Copies the pages as they were before they are tracked anew: a write in between is in no round."""

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
        WritersVm(kvm, mode, shapes, [WriteStream(pages, 0)], 4096, SPARSER) as vm,
        closing(kind(vm, enough=0, most_rounds=2)) as migration,
    ):
        vm.start()
        vm.writers.let_go()
        migration.run()
        migration.compare()


def test_a_copy_before_the_pages_are_tracked_anew(kvm: Kvm, log_mode: str) -> None:
    migrate(kvm, log_mode)
    with pytest.raises(ContractViolation, match="the copy differs from the source in slot"):
        migrate(kvm, log_mode, CopiesTooEarly)


@pytest.mark.log_modes("bitmap")
def test_a_migration_whose_bitmaps_lack_a_page(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:

    def empty_the_first_ones(slot: int, bitmap: bytearray) -> None:
        if slot == 1:
            bitmap[:] = bytes(len(bitmap))

    falsify_bitmaps(monkeypatch, empty_the_first_ones)
    with pytest.raises(ContractViolation, match="the copy differs from the source in slot 1"):
        migrate(kvm, log_mode)


@pytest.mark.log_modes("ring")
def test_a_migration_whose_ring_lacks_entries(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """The count of what was reset tells."""
    honest = DirtyRing.harvest
    monkeypatch.setattr(DirtyRing, "harvest", lambda ring, most=None: tuple(part[1:] for part in honest(ring, most)))
    with pytest.raises(ContractViolation, match=r"harvested \d+, reset \d+"):
        migrate(kvm, log_mode)
