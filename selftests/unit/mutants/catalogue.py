# SPDX-License-Identifier: GPL-2.0-only
"""The mutants: ways in which KVM could get dirty logging wrong, each planted between the ioctl and the library.

A mutant changes as little as makes its bug: one page of each report, one entry of each ring.
"""

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest

from dirty_tracking.bitmap import set_pages
from dirty_tracking.modes import LOG_MODES, RingMode
from dirty_tracking.report import DirtyReport
from dirty_tracking.ring import DirtyRing
from dirty_tracking.ring import Entries as RingEntries
from dirty_tracking.violations import Kind
from kvm_util import uapi
from kvm_util.memory import HOST_PAGE_SIZE
from kvm_util.vm import Memslot, Vm
from selftests.unit.mutants.faults import (
    Answer,
    Entries,
    falsify_bitmaps,
    falsify_clears,
    falsify_ioctls,
    falsify_pages,
    falsify_rings,
    falsify_slots,
)

ALL = frozenset(LOG_MODES)
RING = frozenset(name for name, mode in LOG_MODES.items() if mode.uses_ring)
BITMAP = ALL - RING
AUTOMATIC = frozenset({"dirty-log"})
MANUAL = BITMAP - AUTOMATIC


@dataclass(frozen=True)
class Mutant:
    """A KVM with one bug.

    :ivar modes: the log modes that can show it
    :ivar plant: plants it until the patch is undone
    :ivar kinds: the violations of which it causes at least one; none for a bug that is not in the reports
    :ivar hangs_writers: whether tests with writer threads would wait for what this KVM never does
    """

    name: str
    modes: frozenset[str]
    plant: Callable[[pytest.MonkeyPatch], None]
    kinds: frozenset[Kind]
    hangs_writers: bool


MUTANTS: dict[str, Mutant] = {}
_Plant = Callable[[pytest.MonkeyPatch], None]


def _mutant(modes: frozenset[str], *kinds: Kind, hangs_writers: bool = False) -> Callable[[_Plant], _Plant]:
    def add(plant: _Plant) -> _Plant:
        name = plant.__name__.replace("_", "-")
        MUTANTS[name] = Mutant(name, modes, plant, frozenset(kinds), hangs_writers)
        return plant

    return add


def _set_bits(bitmap: bytearray, pages: list[int], on: bool = True) -> None:
    """Set the bits of those *pages* that *bitmap* has, or clear them."""
    for page in pages:
        if page < len(bitmap) * 8:
            bitmap[page // 8] &= ~(1 << page % 8)
            bitmap[page // 8] |= on << page % 8


def _last(bitmap: bytearray) -> list[int]:
    """The last page that is set, if one is."""
    return set_pages(bitmap)[-1:]


def under_each_mutant(*unseen: str) -> pytest.MarkDecorator:
    """Parametrize a test with each mutant but *unseen* that violates the rules of reports, in each log mode that shows it."""
    return pytest.mark.parametrize(
        ("mutant", "log_mode"),
        [
            pytest.param(mutant, mode, id=f"{mutant.name}-{mode}")
            for mutant in MUTANTS.values()
            if mutant.kinds and mutant.name not in unseen
            for mode in LOG_MODES
            if mode in mutant.modes
        ],
        indirect=["log_mode"],
    )


# --- reports ------------------------------------------------------------------------------------------------------------


@_mutant(ALL, Kind.LOST)
def page_lost(patch: pytest.MonkeyPatch) -> None:
    """The last page of each report is missing from it."""
    falsify_pages(patch, lambda pages: pages[:-1])


@_mutant(ALL, Kind.SPURIOUS)
def page_added(patch: pytest.MonkeyPatch) -> None:
    """Each report has the first page that is not in it as well."""

    def add(pages: list[int]) -> list[int]:
        known = set(pages)
        return [*pages, next(page for page in count() if page not in known)]

    falsify_pages(patch, add)


@_mutant(ALL, Kind.LOST, Kind.SPURIOUS)
def page_moved(patch: pytest.MonkeyPatch) -> None:
    """In each report the page after the last one stands for the last one."""
    falsify_pages(patch, lambda pages: [*pages[:-1], *(page + 1 for page in pages[-1:])])


@_mutant(ALL, Kind.SPURIOUS, Kind.DUPLICATE)
def page_repeated(patch: pytest.MonkeyPatch) -> None:
    """The last page of each report is reported twice: in the slot's next bitmap again, in a ring by two entries."""
    before: dict[tuple[Vm, int], list[int]] = {}

    def bitmap_repeats(vm: Vm, slot: int, bitmap: bytearray) -> None:
        kept = before.get((vm, slot), [])
        before[vm, slot] = _last(bitmap)
        _set_bits(bitmap, kept)

    falsify_bitmaps(patch, bitmap_repeats)
    falsify_rings(patch, lambda _ring, entries: entries + entries[-1:])


@_mutant(ALL, Kind.BAD_OFFSET)
def page_beyond_end(patch: pytest.MonkeyPatch) -> None:
    """Each bitmap has the last bit of its last word set, and the last entry of each harvest is beyond any slot's end."""
    falsify_bitmaps(patch, lambda _vm, _slot, bitmap: _set_bits(bitmap, [len(bitmap) * 8 - 1]))
    falsify_rings(
        patch, lambda _ring, entries: entries[:-1] + [(slot, offset | 1 << 40) for slot, offset in entries[-1:]]
    )


@_mutant(RING, Kind.WRONG_SLOT, Kind.BAD_OFFSET, Kind.SPURIOUS)
def entry_of_another_slot(patch: pytest.MonkeyPatch) -> None:
    """The last entry of each harvest has the number of the slot after its own."""
    falsify_rings(patch, lambda _ring, entries: entries[:-1] + [(slot + 1, offset) for slot, offset in entries[-1:]])


@_mutant(RING, Kind.LOST, Kind.SPURIOUS, Kind.DUPLICATE)
def entry_in_another_ring(patch: pytest.MonkeyPatch) -> None:
    """The last entry of each harvest is in the ring that is harvested next, and not in its own."""
    kept: Entries = []

    def move(_ring: DirtyRing, entries: Entries) -> Entries:
        nonlocal kept
        moved, kept = kept, entries[-1:]
        return moved + entries[:-1]

    falsify_rings(patch, move)


@_mutant(RING)
def entries_reversed(patch: pytest.MonkeyPatch) -> None:
    """A ring has its entries in the reverse order of the writes."""
    falsify_rings(patch, lambda _ring, entries: entries[::-1])


# --- what write-protects the pages again --------------------------------------------------------------------------------


@_mutant(AUTOMATIC, Kind.LOST)
def get_leaves_page_writable(patch: pytest.MonkeyPatch) -> None:
    """KVM_GET_DIRTY_LOG does not write-protect the last page that it reports: the next one lacks it."""
    writable: dict[tuple[Vm, int], list[int]] = {}

    def get(vm: Vm, slot: int, bitmap: bytearray) -> None:
        missed = writable.get((vm, slot), [])
        writable[vm, slot] = _last(bitmap)
        _set_bits(bitmap, missed, on=False)

    falsify_bitmaps(patch, get)


@_mutant(MANUAL, Kind.LOST)
def clear_leaves_page_writable(patch: pytest.MonkeyPatch) -> None:
    """KVM_CLEAR_DIRTY_LOG does not write-protect the last page of its mask: until the next one, no write to it is logged."""
    writable: dict[tuple[Vm, int], list[int]] = {}

    def clear(vm: Vm, slot: int, mask: bytearray, first_page: int) -> None:
        last = _last(mask)
        _set_bits(mask, [page - first_page for page in writable.get((vm, slot), []) if page >= first_page])
        writable[vm, slot] = [first_page + page for page in last]

    falsify_clears(patch, clear)
    falsify_bitmaps(patch, lambda vm, slot, bitmap: _set_bits(bitmap, writable.get((vm, slot), []), on=False))


@_mutant(RING, Kind.LOST)
def reset_leaves_page_writable(patch: pytest.MonkeyPatch) -> None:
    """KVM_RESET_DIRTY_RINGS does not write-protect the page of a ring's last entry: the next harvest lacks it."""
    writable: dict[DirtyRing, Entries] = {}

    def harvest(ring: DirtyRing, entries: Entries) -> Entries:
        missed = writable.get(ring, [])
        writable[ring] = entries[-1:] or missed
        return [entry for entry in entries if entry not in missed]

    falsify_rings(patch, harvest)


@_mutant(MANUAL, Kind.SPURIOUS, hangs_writers=True)
def clear_ignored(patch: pytest.MonkeyPatch) -> None:
    """KVM_CLEAR_DIRTY_LOG succeeds and does nothing."""
    patch.setattr(Vm, "clear_dirty_log", lambda *_arguments: None)


@_mutant(MANUAL, Kind.SPURIOUS)
def clear_skips_page(patch: pytest.MonkeyPatch) -> None:
    """KVM_CLEAR_DIRTY_LOG does not clear the last page of its mask."""
    falsify_clears(patch, lambda _vm, _slot, mask, _first_page: _set_bits(mask, _last(mask), on=False))


@_mutant(MANUAL, Kind.LOST)
def clear_takes_whole_range(patch: pytest.MonkeyPatch) -> None:
    """KVM_CLEAR_DIRTY_LOG clears all pages from the first to the last that it is asked about, set in the mask or not."""

    def clear(_vm: Vm, _slot: int, mask: bytearray, _first_page: int) -> None:
        mask[:] = b"\xff" * len(mask)

    falsify_clears(patch, clear)


@_mutant(MANUAL, Kind.LOST)
def clear_zeroes_mask(patch: pytest.MonkeyPatch) -> None:
    """KVM_CLEAR_DIRTY_LOG zeroes the mask, which it is only to read."""
    honest = Vm.clear_dirty_log

    def clear_dirty_log(vm: Vm, slot: int, bitmap: bytearray, first_page: int, num_pages: int) -> None:
        honest(vm, slot, bitmap, first_page, num_pages)
        bitmap[:] = bytes(len(bitmap))

    patch.setattr(Vm, "clear_dirty_log", clear_dirty_log)


@_mutant(RING, Kind.LOST, Kind.RESET_COUNT, Kind.STUCK, hangs_writers=True)
def reset_ignored(patch: pytest.MonkeyPatch) -> None:
    """KVM_RESET_DIRTY_RINGS returns how many entries were harvested since the last call, and resets none."""
    harvest = DirtyRing.harvest
    harvested = 0

    def counting_harvest(ring: DirtyRing, most: int | None = None) -> RingEntries:
        nonlocal harvested
        entries = harvest(ring, most)
        harvested += len(entries[0])
        return entries

    def reset_dirty_rings(_vm: Vm) -> int:
        nonlocal harvested
        answer, harvested = harvested, 0
        return answer

    patch.setattr(DirtyRing, "harvest", counting_harvest)
    patch.setattr(Vm, "reset_dirty_rings", reset_dirty_rings)


@_mutant(RING, Kind.RESET_COUNT, hangs_writers=True)
def reset_undone(patch: pytest.MonkeyPatch) -> None:
    """KVM_RESET_DIRTY_RINGS resets nothing, and returns 0."""
    patch.setattr(Vm, "reset_dirty_rings", lambda _vm: 0)


@_mutant(RING, Kind.RESET_COUNT)
def reset_count_high(patch: pytest.MonkeyPatch) -> None:
    """KVM_RESET_DIRTY_RINGS returns one more than it reset."""
    honest = Vm.reset_dirty_rings
    patch.setattr(Vm, "reset_dirty_rings", lambda vm: honest(vm) + 1)


@_mutant(RING, Kind.RESET_COUNT)
def reset_count_low(patch: pytest.MonkeyPatch) -> None:
    """KVM_RESET_DIRTY_RINGS returns one less than it reset, if it reset anything."""
    honest = Vm.reset_dirty_rings
    patch.setattr(Vm, "reset_dirty_rings", lambda vm: max(honest(vm) - 1, 0))


@_mutant(RING, Kind.RESET_COUNT)
def reset_in_parts(patch: pytest.MonkeyPatch) -> None:
    """KVM_RESET_DIRTY_RINGS leaves half of the entries to the next call, without any signal; only the counts say so here."""
    honest = Vm.reset_dirty_rings
    left = 0

    def reset_dirty_rings(vm: Vm) -> int:
        nonlocal left
        left, count = divmod(honest(vm) + left, 2)
        return left + count

    patch.setattr(Vm, "reset_dirty_rings", reset_dirty_rings)


def _mark_too(patch: pytest.MonkeyPatch, wrong_gfn: Callable[[Memslot, int], int]) -> None:
    """Have KVM log each page a second time, at *wrong_gfn* of its memslot and offset, if a memslot after its own is there."""
    pending: dict[tuple[Vm, int], list[int]] = {}
    collected: list[Vm] = []

    def also(vm: Vm, slot: int, page: int) -> Entries:
        gfn = wrong_gfn(vm.memslots[slot], page) if slot in vm.memslots else -1
        offsets = {other: gfn - memslot.gpa // HOST_PAGE_SIZE for other, memslot in vm.memslots.items()}
        return [(other, offset) for other, offset in offsets.items() if 0 <= offset < vm.memslots[other].npages]

    def bitmap_has(vm: Vm, slot: int, bitmap: bytearray) -> None:
        for page in set_pages(bitmap):
            for other, offset in also(vm, slot, page):
                pending.setdefault((vm, other), []).append(offset)
        _set_bits(bitmap, pending.pop((vm, slot), []))

    def ring_has(_ring: DirtyRing, entries: Entries) -> Entries:
        return entries + [wrong for vm in collected for slot, page in entries for wrong in also(vm, slot, page)]

    honest = RingMode._take

    def take(mode: RingMode, vm: Vm, slots: Iterable[int], stopped: bool) -> DirtyReport:
        collected[:] = [vm]
        return honest(mode, vm, slots, stopped)

    patch.setattr(RingMode, "_take", take)
    falsify_bitmaps(patch, bitmap_has)
    falsify_rings(patch, ring_has)


@_mutant(ALL)
def host_address_marked(patch: pytest.MonkeyPatch) -> None:
    """KVM logs each page once more by its host address, as if that were its gpa (on s390 until commit 898885477e0f)."""
    _mark_too(patch, lambda memslot, page: memslot.memory.hva // HOST_PAGE_SIZE + page)


@_mutant(ALL)
def byte_address_marked(patch: pytest.MonkeyPatch) -> None:
    """KVM logs each page once more by its gpa, as if that were its gfn."""
    _mark_too(patch, lambda memslot, page: memslot.gpa + page * HOST_PAGE_SIZE)


# --- slots --------------------------------------------------------------------------------------------------------------


@_mutant(ALL, Kind.LOST)
def logging_stays_off(patch: pytest.MonkeyPatch) -> None:
    """Enabling dirty logging for a slot that exists has no effect."""
    log = uapi.KVM_MEM_LOG_DIRTY_PAGES
    falsify_slots(patch, lambda real, gpa, flags: (gpa, flags if real.flags & log else flags & ~log))


@_mutant(ALL, Kind.SPURIOUS)
def logging_stays_on(patch: pytest.MonkeyPatch) -> None:
    """Disabling dirty logging for a slot has no effect."""
    log = uapi.KVM_MEM_LOG_DIRTY_PAGES
    falsify_slots(patch, lambda real, gpa, flags: (gpa, flags | real.flags & log))


@_mutant(ALL)
def move_ignored(patch: pytest.MonkeyPatch) -> None:
    """Moving a slot has no effect."""
    falsify_slots(patch, lambda real, _gpa, flags: (real.gpa, flags))


@_mutant(AUTOMATIC)
def move_forgets_pages(patch: pytest.MonkeyPatch) -> None:
    """Moving a slot discards its bitmap."""
    honest = Vm.set_user_memory_region

    def set_user_memory_region(vm: Vm, slot: int, gpa: int, memory: Any, flags: int = 0) -> Memslot:
        if slot in vm.memslots and vm.memslots[slot].gpa != gpa:
            honest(vm, slot, vm.memslots[slot].gpa, memory, 0)
        return honest(vm, slot, gpa, memory, flags)

    patch.setattr(Vm, "set_user_memory_region", set_user_memory_region)


# --- errors -------------------------------------------------------------------------------------------------------------


@_mutant(ALL)
def wrong_errno(patch: pytest.MonkeyPatch) -> None:
    """Each ioctl of dirty logging that fails does so with EXDEV."""
    falsify_ioctls(patch, lambda _request, result, code: (result, errno.EXDEV if result < 0 else code))


@_mutant(ALL)
def refusal_missing(patch: pytest.MonkeyPatch) -> None:
    """An ioctl of dirty logging that KVM refuses returns 0 and does nothing."""

    def accept(request: int, result: int, code: int) -> Answer:
        makes_file = request == uapi.KVM_CREATE_VCPU  # 0 would be a file of somebody else's
        return (0, 0) if result < 0 and not makes_file else (result, code)

    falsify_ioctls(patch, accept)


@_mutant(ALL)
def call_refused(patch: pytest.MonkeyPatch) -> None:
    """Each ioctl of dirty logging that a test makes without the library takes effect, and fails with EXDEV."""
    falsify_ioctls(patch, lambda *_answer: (-1, errno.EXDEV), "selftests.")
