# SPDX-License-Identifier: GPL-2.0-only
"""Runs on real KVM whose answers are falsified between the ioctl and the judge: each fault is a violation.

A fault is planted after :data:`SOUND_ITERATIONS`, and the iterations until it is found are printed at the end of the run.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from dirty_tracking.bitmap import set_pages
from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from dirty_tracking.memory_check import WORDS_PER_PAGE, MemoryCheck
from dirty_tracking.report import DirtyReport
from dirty_tracking.ring import DirtyRing
from dirty_tracking.violations import ContractViolation, Kind
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB
from kvm_util.vm import Vm
from selftests.unit.mutants.faults import falsify_bitmaps

ITERATIONS = 80
SOUND_ITERATIONS = 2  # complete iterations before a fault is planted
SETTINGS = Settings(iterations=ITERATIONS, interval=2.0, ring_count=1024, test_mem=8 * MIB, seed=1)


Entries = tuple[list[int], list[int]]


@dataclass
class Planter:
    """The state of a fault in a run.

    :ivar planted: the iteration in which the fault first took effect
    :ivar kept: pages that a fault holds back for a later report
    """

    run: DirtyLogRun
    draw: random.Random = field(default_factory=lambda: random.Random(1))
    planted: int | None = None
    kept: list[int] = field(default_factory=list)
    seen: int = 0

    @property
    def ready(self) -> bool:
        return self.run.figures.iterations >= SOUND_ITERATIONS

    def plant(self) -> None:
        self.planted = self.planted or self.run.figures.iterations + 1

    @property
    def fresh(self) -> bool:
        """Whether a fault that is planted once has to be planted now.

        Only while the vCPUs are stopped: a write during a collection may also be reported by the next one.
        """
        return self.ready and self.planted is None and self.run.writers.all_stopped()

    def is_ten_thousandth(self) -> bool:
        """Count one more reported page; the fault counts as planted from the first on.

        It has an effect only while the vCPUs are stopped: a write during a collection may also be reported later.
        """
        self.plant()
        self.seen += 1
        if self.seen < 10_000 or not self.run.writers.all_stopped():
            return False
        self.seen -= 10_000
        return True

    def not_written_soon(self, reported: list[int]) -> int:
        """A page that is neither reported nor written within the next hundred writes."""
        done = self.run.writers.published()[0]
        busy = set(reported).union(self.run.streams[0].between(done, done + 100))
        return next(page for page in self.draw.sample(range(self.run.memslot.npages), 300) if page not in busy)


# --- faults in a bitmap: change it in place ---------------------------------------------------------------------------


def flip(bitmap: bytearray, page: int) -> None:
    bitmap[page // 8] ^= 1 << page % 8


def drop_a_bit(planter: Planter, bitmap: bytearray) -> None:
    if planter.fresh and (pages := set_pages(bitmap)):
        flip(bitmap, planter.draw.choice(pages))
        planter.plant()


def add_a_bit(planter: Planter, bitmap: bytearray) -> None:
    if planter.fresh:
        flip(bitmap, planter.not_written_soon(set_pages(bitmap)))
        planter.plant()


def lose_a_word(planter: Planter, bitmap: bytearray) -> None:
    if planter.fresh and (pages := set_pages(bitmap)):
        word = planter.draw.choice(pages) // 64
        bitmap[word * 8 : word * 8 + 8] = bytes(8)
        planter.plant()


def shift_by_a_page(planter: Planter, bitmap: bytearray) -> None:
    if planter.fresh and any(bitmap):
        shifted = int.from_bytes(bitmap, "little") << 1 & (1 << len(bitmap) * 8) - 1
        bitmap[:] = shifted.to_bytes(len(bitmap), "little")
        planter.plant()


def report_too_early(planter: Planter, bitmap: bytearray) -> None:
    """A page whose write comes only in a later iteration."""
    if planter.fresh:
        flip(bitmap, first_future_page(planter, set_pages(bitmap)))
        planter.plant()


def report_too_late(planter: Planter, bitmap: bytearray) -> None:
    """A page held back until the next iteration."""
    if planter.fresh and (pages := set_pages(bitmap)):
        planter.kept = [planter.draw.choice(pages)]
        flip(bitmap, planter.kept[0])
        planter.plant()
    elif planter.kept and planter.run.figures.iterations >= (planter.planted or 0):
        page = planter.kept.pop()
        bitmap[page // 8] |= 1 << page % 8


def set_a_tail_bit(planter: Planter, bitmap: bytearray) -> None:
    """A bit of the last word that is no page of the slot."""
    if planter.fresh:
        flip(bitmap, planter.run.memslot.npages)
        planter.plant()


def lose_one_in_ten_thousand(planter: Planter, bitmap: bytearray) -> None:
    for page in set_pages(bitmap) if planter.ready else ():
        if planter.is_ten_thousandth():
            flip(bitmap, page)


BITMAP_FAULTS = [
    drop_a_bit, add_a_bit, lose_a_word, shift_by_a_page, report_too_early, report_too_late, set_a_tail_bit,
    lose_one_in_ten_thousand,
]  # fmt: skip


# --- faults in the mask of CLEAR: as a KVM would fail that clears other pages than the mask has ---------------------------


def clear_all_but_one(planter: Planter, bitmap: bytearray) -> None:
    """The page left out is the one that the guest writes last: a page written at once would be dirty anyway."""
    if planter.fresh and (pages := set_pages(bitmap)):
        done = planter.run.writers.published()[0]
        upcoming = planter.run.streams[0].between(done, done + 16384).tolist()
        flip(bitmap, max(pages, key=lambda page: upcoming.index(page) if page in upcoming else len(upcoming)))
        planter.plant()


def clear_everything(planter: Planter, bitmap: bytearray) -> None:
    """Also the pages written after GET, which were never reported; after a pause, so that there are some."""
    if planter.ready and not planter.run.writers.all_stopped():
        time.sleep(0.005)
        bitmap[:] = b"\xff" * len(bitmap)
        planter.plant()


CLEAR_FAULTS = [clear_all_but_one, clear_everything]


# --- faults in a ring's entries: return other ones ----------------------------------------------------------------------


def entries_of_their_own(pages: list[int]) -> list[int]:
    """The positions of entries whose page has only one: of two entries, one may be missing and the page not lost."""
    counts = Counter(pages)
    return [at for at, page in enumerate(pages) if counts[page] == 1]


def lose_an_entry(planter: Planter, slots: list[int], pages: list[int]) -> Entries:
    if planter.fresh and (single := entries_of_their_own(pages)):
        at = planter.draw.choice(single)
        planter.plant()
        return slots[:at] + slots[at + 1 :], pages[:at] + pages[at + 1 :]
    return slots, pages


def repeat_an_entry(planter: Planter, slots: list[int], pages: list[int]) -> Entries:
    """As often as the page was ever written: each write since the last collection may have an entry of its own."""
    if planter.fresh and pages:
        at = planter.draw.randrange(len(pages))
        again = planter.run.streams[0].between(0, planter.run.writers.published()[0] + 1).tolist().count(pages[at])
        planter.plant()
        return slots[:at] + slots[at : at + 1] * again + slots[at:], pages[:at] + pages[at : at + 1] * again + pages[
            at:
        ]
    return slots, pages


def name_another_slot(planter: Planter, slots: list[int], pages: list[int]) -> Entries:
    if planter.fresh and pages:
        slots[planter.draw.randrange(len(slots))] += 1
        planter.plant()
    return slots, pages


def name_another_address_space(planter: Planter, slots: list[int], pages: list[int]) -> Entries:
    if planter.fresh and pages:
        slots[planter.draw.randrange(len(slots))] |= 1 << 16
        planter.plant()
    return slots, pages


def offset_off_by_one(planter: Planter, slots: list[int], pages: list[int]) -> Entries:
    if planter.fresh and (single := entries_of_their_own(pages)):
        pages[planter.draw.choice(single)] += 1
        planter.plant()
    return slots, pages


def add_an_entry(planter: Planter, slots: list[int], pages: list[int]) -> Entries:
    if planter.fresh:
        planter.plant()
        return [*slots, 1], [*pages, planter.not_written_soon(pages)]
    return slots, pages


def entry_too_early(planter: Planter, slots: list[int], pages: list[int]) -> Entries:
    if planter.fresh:
        planter.plant()
        return [*slots, 1], [*pages, first_future_page(planter, pages)]
    return slots, pages


def entry_too_late(planter: Planter, slots: list[int], pages: list[int]) -> Entries:
    if planter.fresh and (single := entries_of_their_own(pages)):
        planter.plant()
        planter.kept = [pages.pop(single[-1])]
        return slots[:-1], pages
    if planter.kept and planter.run.figures.iterations >= (planter.planted or 0):
        return [*slots, 1], [*pages, planter.kept.pop()]
    return slots, pages


def lose_one_entry_in_ten_thousand(planter: Planter, slots: list[int], pages: list[int]) -> Entries:
    if not planter.ready:
        return slots, pages
    kept = [at for at in range(len(pages)) if not planter.is_ten_thousandth()]
    return [slots[at] for at in kept], [pages[at] for at in kept]


RING_FAULTS = [
    lose_an_entry, repeat_an_entry, name_another_slot, name_another_address_space, offset_off_by_one, add_an_entry,
    entry_too_early, entry_too_late, lose_one_entry_in_ten_thousand,
]  # fmt: skip


def first_future_page(planter: Planter, reported: list[int]) -> int:
    """A page that is written within the next thousand writes, but not within the next hundred."""
    done = planter.run.writers.published()[0]
    near = set(planter.run.streams[0].between(done, done + 100)).union(reported)
    return next(page for page in planter.run.streams[0].between(done + 500, done + 1000) if page not in near)


# --- the tests ----------------------------------------------------------------------------------------------------------


EXPECTED: dict[Callable[..., Any], Kind] = {
    **dict.fromkeys([drop_a_bit, lose_a_word, report_too_late, lose_one_in_ten_thousand, clear_everything], Kind.LOST),
    **dict.fromkeys([shift_by_a_page, add_a_bit, report_too_early, clear_all_but_one], Kind.SPURIOUS),
    set_a_tail_bit: Kind.BAD_OFFSET,
    **dict.fromkeys([lose_an_entry, entry_too_late, offset_off_by_one], Kind.LOST),
    **dict.fromkeys([add_an_entry, entry_too_early], Kind.SPURIOUS),
    **dict.fromkeys([name_another_slot, name_another_address_space], Kind.WRONG_SLOT),
    repeat_an_entry: Kind.DUPLICATE,
    lose_one_entry_in_ten_thousand: Kind.RESET_COUNT,
}


@contextmanager
def caught(kvm: Kvm, request: pytest.FixtureRequest, mode: str, kind: Kind, vcpus: int = 1) -> Iterator[Planter]:
    """Start a run in *mode*, let the body plant a fault, and expect a violation of *kind*."""
    cell = Cell(mode, "48bit-4k", "anonymous", "cooperative", "sparse", vcpus)
    with DirtyLogRun(kvm, cell, SETTINGS) as run:
        planter = Planter(run)
        yield planter
        with pytest.raises(ContractViolation) as error:
            run.run()
        assert planter.planted, "the fault was never planted, so it did not cause this failure"
        assert kind in {finding.kind for finding in error.value.violations}
        iterations = error.value.violations[0].iteration - planter.planted + 1
        planted_fault = request.node.callspec.params.get("fault")
        name = (
            planted_fault.__name__
            if planted_fault
            else request.node.originalname.removeprefix("test_").removesuffix("_is_found")
        )
        request.node.user_properties += [("fault", name), ("fault_in", mode), ("caught_within", iterations)]
        assert 1 <= iterations <= 2 or "ten_thousand" in request.node.name


@pytest.mark.log_modes("bitmap")
@pytest.mark.parametrize("fault", BITMAP_FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.mutants
def test_false_bitmap_is_found(
    kvm: Kvm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, log_mode: str,
    fault: Callable[[Planter, bytearray], None],
) -> None:  # fmt: skip
    """Each way to falsify the bitmap of KVM_GET_DIRTY_LOG has its kind of violation."""
    with caught(kvm, request, log_mode, EXPECTED[fault]) as planter:
        falsify_bitmaps(monkeypatch, lambda _vm, _slot, bitmap: fault(planter, bitmap))


@pytest.mark.log_modes("clear")
@pytest.mark.parametrize("fault", CLEAR_FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.mutants
def test_wrong_clear_is_found(
    kvm: Kvm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, log_mode: str,
    fault: Callable[[Planter, bytearray], None],
) -> None:  # fmt: skip
    """A KVM_CLEAR_DIRTY_LOG of other pages than requested is a violation."""
    clear_dirty_log = Vm.clear_dirty_log
    with caught(kvm, request, log_mode, EXPECTED[fault]) as planter:

        def falsified(vm: Vm, slot: int, bitmap: bytearray, first_page: int, num_pages: int) -> None:
            asked = bytearray(bitmap)  # the log mode's own copy stays: it is what GET reported
            fault(planter, asked)
            clear_dirty_log(vm, slot, asked, first_page, num_pages)

        monkeypatch.setattr(Vm, "clear_dirty_log", falsified)


@pytest.mark.log_modes("ring")
@pytest.mark.parametrize("fault", RING_FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.mutants
def test_false_ring_entries_are_found(
    kvm: Kvm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, log_mode: str,
    fault: Callable[[Planter, list[int], list[int]], Entries],
) -> None:  # fmt: skip
    """Each way to falsify harvested ring entries has its kind of violation."""
    harvest = DirtyRing.harvest
    with caught(kvm, request, log_mode, EXPECTED[fault]) as planter:
        monkeypatch.setattr(DirtyRing, "harvest", lambda ring: fault(planter, *harvest(ring)))


@pytest.mark.log_modes("ring")
@pytest.mark.mutants
def test_entry_in_the_wrong_ring_is_found(
    kvm: Kvm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, log_mode: str
) -> None:
    """A ring entry of a page that only another vCPU wrote is SPURIOUS."""
    with caught(kvm, request, log_mode, Kind.SPURIOUS, vcpus=2) as planter:
        collect = planter.run.mode.collect

        def falsified(*arguments: Any, **options: Any) -> DirtyReport:
            report = collect(*arguments, **options)
            if planter.fresh:
                own = planter.run.streams[0].between(0, planter.run.writers.published()[0] + 1)
                recent = set(own[-2000:])
                first, second = report.sources
                at = next((at for at, page in enumerate(second.offsets) if page not in recent), None)
                if at is not None:
                    first.add(second.slots.pop(at), [second.offsets.pop(at)])
                    planter.plant()
            return report

        monkeypatch.setattr(planter.run.mode, "collect", falsified)


@pytest.mark.log_modes("ring")
@pytest.mark.parametrize("wrong_by", [-1, 1])
@pytest.mark.mutants
def test_wrong_reset_count_is_found(
    kvm: Kvm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, log_mode: str, wrong_by: int
) -> None:
    """A KVM_RESET_DIRTY_RINGS that returns one entry more or less than it reset is a violation."""
    reset_dirty_rings = Vm.reset_dirty_rings
    with caught(kvm, request, log_mode, Kind.RESET_COUNT) as planter:

        def falsified(vm: Vm) -> int:
            count = reset_dirty_rings(vm)
            if planter.fresh and count:
                planter.plant()
                return count + wrong_by
            return count

        monkeypatch.setattr(Vm, "reset_dirty_rings", falsified)


@pytest.mark.log_modes("ring")
@pytest.mark.mutants
def test_reset_without_effect_is_found(
    kvm: Kvm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, log_mode: str
) -> None:
    """A KVM_RESET_DIRTY_RINGS that resets nothing is a violation, and is not repeated forever."""
    reset_dirty_rings = Vm.reset_dirty_rings
    with caught(kvm, request, log_mode, Kind.RESET_COUNT) as planter:

        def falsified(vm: Vm) -> int:
            if not planter.ready:
                return reset_dirty_rings(vm)
            planter.plant()
            return 0

        monkeypatch.setattr(Vm, "reset_dirty_rings", falsified)


@pytest.mark.mutants
def test_wrong_value_in_memory_is_found(
    kvm: Kvm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, log_mode: str
) -> None:
    """A page with an older value, as if a reported write had been lost, is a violation."""
    check = MemoryCheck.check
    with caught(kvm, request, log_mode, Kind.VALUE) as planter:

        def falsified(its: MemoryCheck, iteration: int, done: list[int]) -> object:
            if planter.fresh:
                planter.plant()
                page = planter.run.streams[0].between(done[0] - 10, done[0] - 9)[0]
                planter.run.memslot.memory.words[page * WORDS_PER_PAGE] -= 1
            return check(its, iteration, done)

        monkeypatch.setattr(MemoryCheck, "check", falsified)


@pytest.mark.mutants
def test_page_lost_in_a_running_collection(
    kvm: Kvm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, log_mode: str
) -> None:
    """A page is LOST if a collection lacks it that ran beside the vCPU and began after the write."""
    with caught(kvm, request, log_mode, Kind.LOST) as planter:
        collect = planter.run.mode.collect
        seen = [0]  # writes that the collection before may have reported

        def falsified(vm: Vm, kick: Callable[[], None] | None, **options: Any) -> DirtyReport:
            written = planter.run.writers.published()[0] - 50  # the collection's own count was taken a moment ago
            report = collect(vm, kick, **options)
            since, seen[0] = seen[0], planter.run.writers.published()[0] + 1
            if planter.ready and planter.planted is None and kick is not None and not planter.run.writers.all_stopped():
                long_done = set(planter.run.streams[0].between(since, max(since, written)))
                (source,) = report.sources
                page = next((page for page in source.offsets if page in long_done), None)
                if page is not None:
                    source.offsets = [other for other in source.offsets if other != page]
                    del source.slots[len(source.offsets) :]
                    report.reset = report.harvested
                    planter.plant()
            return report

        monkeypatch.setattr(planter.run.mode, "collect", falsified)


def test_run_without_a_fault_passes(kvm: Kvm, log_mode: str) -> None:
    """A run without a planted fault passes in each log mode."""
    cell = Cell(log_mode, "48bit-4k", "anonymous", "forced", "sparse", 2)
    with DirtyLogRun(kvm, cell, SETTINGS) as run:
        assert run.run().iterations == ITERATIONS


def test_each_kind_of_violation_has_a_fault() -> None:
    """Each kind of violation is the expected one of a planted fault, here or in test_runs_end_well.py."""
    here = {*EXPECTED.values(), Kind.RESET_COUNT, Kind.VALUE}
    stuck = {Kind.STUCK, Kind.GAP}  # test_runs_end_well.py: test_ring_that_stays_full
    assert here | stuck == set(Kind) - {Kind.OTHER}
    assert set(EXPECTED) == {*BITMAP_FAULTS, *RING_FAULTS, *CLEAR_FAULTS}
