# SPDX-License-Identifier: GPL-2.0-only
"""The mutants: ways in which KVM could get dirty logging wrong, each planted between the ioctl and the library.

A mutant changes as little as makes its bug: one page of each report, one entry of each ring. Rings stay consistent, as they
would with such a KVM: KVM_RESET_DIRTY_RINGS counts the entries that user space got to see, unless the count is the bug.
"""

import errno
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest

from dirty_tracking.bitmap import set_pages
from dirty_tracking.modes import LOG_MODES
from dirty_tracking.ring import DirtyRing
from kvm_util import ioctl, uapi
from kvm_util.vm import Memslot, Vm
from selftests.unit.mutants.faults import falsify_bitmaps

ALL = frozenset(LOG_MODES)
RING = frozenset(name for name, mode in LOG_MODES.items() if mode.uses_ring)
BITMAP = ALL - RING
AUTOMATIC = frozenset({"dirty-log"})
MANUAL = BITMAP - AUTOMATIC

# The ioctls whose errors are part of the contract of dirty logging
_CALLS = (
    *(uapi.KVM_GET_DIRTY_LOG, uapi.KVM_CLEAR_DIRTY_LOG, uapi.KVM_RESET_DIRTY_RINGS),
    *(uapi.KVM_ENABLE_CAP, uapi.KVM_SET_USER_MEMORY_REGION, uapi.KVM_SET_USER_MEMORY_REGION2, uapi.KVM_CREATE_VCPU),
)

Entries = tuple[list[int], list[int]]  # their slots and their offsets
Answer = tuple[int, int]  # result and errno of an ioctl


@dataclass(frozen=True)
class Mutant:
    """A KVM with one bug.

    :ivar modes: the log modes that can show it
    :ivar plant: plants it until the patch is undone
    :ivar hangs_writers: whether tests with writer threads would wait for what this KVM never does
    """

    name: str
    modes: frozenset[str]
    plant: Callable[[pytest.MonkeyPatch], None]
    hangs_writers: bool

    @property
    def text(self) -> str:
        """What is wrong with this KVM, in a sentence."""
        return (self.plant.__doc__ or "").partition("\n")[0]


MUTANTS: dict[str, Mutant] = {}
_Plant = Callable[[pytest.MonkeyPatch], None]


def _mutant(modes: frozenset[str], hangs_writers: bool = False) -> Callable[[_Plant], _Plant]:
    def add(plant: _Plant) -> _Plant:
        name = plant.__name__.replace("_", "-")
        MUTANTS[name] = Mutant(name, modes, plant, hangs_writers)
        return plant

    return add


# --- seams --------------------------------------------------------------------------------------------------------------


def _falsify_rings(patch: pytest.MonkeyPatch, fault: Callable[[DirtyRing, Entries], Entries]) -> None:
    """Have *fault* return other entries than those harvested; resets count them as if they had been in the ring."""
    harvest, reset = DirtyRing.harvest, Vm.reset_dirty_rings
    surplus = 0

    def falsified_harvest(ring: DirtyRing, most: int | None = None) -> Entries:
        nonlocal surplus
        honest = harvest(ring, most)
        before = len(honest[0])
        falsified = fault(ring, honest)
        surplus += len(falsified[0]) - before
        return falsified

    def falsified_reset(vm: Vm) -> int:
        nonlocal surplus
        wanted = reset(vm) + surplus
        answer = max(wanted, 0)
        surplus = wanted - answer
        return answer

    patch.setattr(DirtyRing, "harvest", falsified_harvest)
    patch.setattr(Vm, "reset_dirty_rings", falsified_reset)


def _falsify_clears(patch: pytest.MonkeyPatch, fault: Callable[[Vm, int, bytearray, int, int], None]) -> None:
    """Have *fault* change what KVM_CLEAR_DIRTY_LOG is asked for: VM, slot, mask, first page, number of pages."""
    honest = Vm.clear_dirty_log

    def clear_dirty_log(vm: Vm, slot: int, bitmap: bytearray, first_page: int, num_pages: int) -> None:
        mask = bytearray(bitmap)
        fault(vm, slot, mask, first_page, num_pages)
        honest(vm, slot, mask, first_page, num_pages)

    patch.setattr(Vm, "clear_dirty_log", clear_dirty_log)


def _falsify_flags(patch: pytest.MonkeyPatch, fault: Callable[[int, int], int]) -> None:
    """Have *fault* return other flags than a slot is to get; it gets the slot's former ones, and those asked for."""
    honest = Vm.set_user_memory_region
    real: dict[tuple[Vm, int], int] = {}

    def set_user_memory_region(vm: Vm, slot: int, gpa: int, memory: Any, flags: int = 0) -> Memslot:
        key = vm, slot
        if slot in vm.memslots:
            real[key] = fault(real.get(key, vm.memslots[slot].flags), flags)
        else:
            real[key] = flags
        memslot = honest(vm, slot, gpa, memory, real[key])
        memslot.flags = flags  # as the library believes
        return memslot

    patch.setattr(Vm, "set_user_memory_region", set_user_memory_region)


def _falsify_ioctls(patch: pytest.MonkeyPatch, fault: Callable[[int, int, int], Answer], modules: str = "") -> None:
    """Have *fault*, which gets request, result and errno, answer the ioctls of dirty logging.

    :param modules: how the names begin of the modules whose calls are concerned
    """
    honest = ioctl.raw_ioctl

    def raw_ioctl(fd: int, request: int, arg: Any = None) -> Answer:
        answer = honest(fd, request, arg)
        return fault(request, *answer) if request in _CALLS else answer

    for name, module in list(sys.modules.items()):
        if name.startswith(modules) and vars(module).get("raw_ioctl") is honest:
            patch.setattr(module, "raw_ioctl", raw_ioctl)


def _set_bit(bitmap: bytearray, page: int, on: bool = True) -> None:
    if on:
        bitmap[page // 8] |= 1 << page % 8
    else:
        bitmap[page // 8] &= ~(1 << page % 8)


def _last(bitmap: bytearray) -> list[int]:
    """The last page that is set, if one is."""
    return set_pages(bitmap)[-1:]


# --- reports ------------------------------------------------------------------------------------------------------------


@_mutant(ALL)
def page_lost(patch: pytest.MonkeyPatch) -> None:
    """The last page of each report is missing from it."""

    def bitmap_lacks_page(_vm: Vm, _slot: int, bitmap: bytearray) -> None:
        for page in _last(bitmap):
            _set_bit(bitmap, page, on=False)

    falsify_bitmaps(patch, bitmap_lacks_page)
    _falsify_rings(patch, lambda _ring, entries: (entries[0][:-1], entries[1][:-1]))


@_mutant(ALL)
def page_added(patch: pytest.MonkeyPatch) -> None:
    """Each report has the first page that is not in it as well."""

    def bitmap_has_page(_vm: Vm, _slot: int, bitmap: bytearray) -> None:
        pages = set(set_pages(bitmap))
        _set_bit(bitmap, next((page for page in range(len(bitmap) * 8) if page not in pages), 0))

    def ring_has_page(_ring: DirtyRing, entries: Entries) -> Entries:
        slots, offsets = entries
        pages = set(offsets)
        return [*slots, slots[-1] if slots else 1], [*offsets, next(page for page in count() if page not in pages)]

    falsify_bitmaps(patch, bitmap_has_page)
    _falsify_rings(patch, ring_has_page)


@_mutant(ALL)
def page_moved(patch: pytest.MonkeyPatch) -> None:
    """In each report the page after the last one stands for the last one."""

    def bitmap_has_next(_vm: Vm, _slot: int, bitmap: bytearray) -> None:
        for page in _last(bitmap):
            _set_bit(bitmap, page, on=False)
            _set_bit(bitmap, (page + 1) % (len(bitmap) * 8))

    falsify_bitmaps(patch, bitmap_has_next)
    _falsify_rings(
        patch, lambda _ring, entries: (entries[0], [*entries[1][:-1], *(offset + 1 for offset in entries[1][-1:])])
    )


@_mutant(ALL)
def page_repeated(patch: pytest.MonkeyPatch) -> None:
    """The last page of each report is reported twice: in the slot's next bitmap again, in a ring by two entries."""
    before: dict[tuple[Vm, int], list[int]] = {}

    def bitmap_repeats(vm: Vm, slot: int, bitmap: bytearray) -> None:
        kept = before.get((vm, slot), [])
        before[vm, slot] = _last(bitmap)
        for page in kept:
            if page < len(bitmap) * 8:
                _set_bit(bitmap, page)

    falsify_bitmaps(patch, bitmap_repeats)
    _falsify_rings(patch, lambda _ring, entries: (entries[0] + entries[0][-1:], entries[1] + entries[1][-1:]))


@_mutant(RING)
def entry_of_another_slot(patch: pytest.MonkeyPatch) -> None:
    """The last entry of each harvest has the number of the slot after its own."""
    _falsify_rings(
        patch, lambda _ring, entries: ([*entries[0][:-1], *(slot + 1 for slot in entries[0][-1:])], entries[1])
    )


@_mutant(RING)
def entries_reversed(patch: pytest.MonkeyPatch) -> None:
    """A ring has its entries in the reverse order of the writes."""
    _falsify_rings(patch, lambda _ring, entries: (entries[0][::-1], entries[1][::-1]))


# --- what write-protects the pages again --------------------------------------------------------------------------------


@_mutant(AUTOMATIC)
def get_leaves_page_writable(patch: pytest.MonkeyPatch) -> None:
    """KVM_GET_DIRTY_LOG does not write-protect the last page that it reports: the next one lacks it."""
    writable: dict[tuple[Vm, int], list[int]] = {}

    def get(vm: Vm, slot: int, bitmap: bytearray) -> None:
        missed = writable.get((vm, slot), [])
        writable[vm, slot] = _last(bitmap)
        for page in missed:
            if page < len(bitmap) * 8:
                _set_bit(bitmap, page, on=False)

    falsify_bitmaps(patch, get)


@_mutant(MANUAL)
def clear_leaves_page_writable(patch: pytest.MonkeyPatch) -> None:
    """KVM_CLEAR_DIRTY_LOG does not write-protect the last page of its mask: until the next one, no GET has it."""
    writable: dict[tuple[Vm, int], list[int]] = {}

    def clear(vm: Vm, slot: int, mask: bytearray, first_page: int, _num_pages: int) -> None:
        writable[vm, slot] = [first_page + page for page in _last(mask)]

    def get(vm: Vm, slot: int, bitmap: bytearray) -> None:
        for page in writable.get((vm, slot), []):
            if page < len(bitmap) * 8:
                _set_bit(bitmap, page, on=False)

    _falsify_clears(patch, clear)
    falsify_bitmaps(patch, get)


@_mutant(RING)
def reset_leaves_page_writable(patch: pytest.MonkeyPatch) -> None:
    """KVM_RESET_DIRTY_RINGS does not write-protect the page of a ring's last entry: the next harvest lacks it."""
    writable: dict[DirtyRing, tuple[int, int]] = {}

    def harvest(ring: DirtyRing, entries: Entries) -> Entries:
        pairs = list(zip(*entries, strict=True))
        seen = [pair for pair in pairs if pair != writable.get(ring)]
        if pairs:
            writable[ring] = pairs[-1]
        return [slot for slot, _ in seen], [offset for _, offset in seen]

    _falsify_rings(patch, harvest)


@_mutant(MANUAL, hangs_writers=True)
def clear_ignored(patch: pytest.MonkeyPatch) -> None:
    """KVM_CLEAR_DIRTY_LOG succeeds and does nothing."""
    patch.setattr(Vm, "clear_dirty_log", lambda *_arguments: None)


@_mutant(MANUAL)
def clear_skips_page(patch: pytest.MonkeyPatch) -> None:
    """KVM_CLEAR_DIRTY_LOG does not clear the last page of its mask."""

    def clear(_vm: Vm, _slot: int, mask: bytearray, _first_page: int, _num_pages: int) -> None:
        for page in _last(mask):
            _set_bit(mask, page, on=False)

    _falsify_clears(patch, clear)


@_mutant(MANUAL)
def clear_takes_whole_range(patch: pytest.MonkeyPatch) -> None:
    """KVM_CLEAR_DIRTY_LOG clears all pages from the first to the last that it is asked about, set in the mask or not."""

    def clear(_vm: Vm, _slot: int, mask: bytearray, _first_page: int, _num_pages: int) -> None:
        mask[:] = b"\xff" * len(mask)

    _falsify_clears(patch, clear)


@_mutant(MANUAL)
def clear_zeroes_mask(patch: pytest.MonkeyPatch) -> None:
    """KVM_CLEAR_DIRTY_LOG zeroes the mask, which it is only to read."""
    honest = Vm.clear_dirty_log

    def clear_dirty_log(vm: Vm, slot: int, bitmap: bytearray, first_page: int, num_pages: int) -> None:
        honest(vm, slot, bitmap, first_page, num_pages)
        bitmap[:] = bytes(len(bitmap))

    patch.setattr(Vm, "clear_dirty_log", clear_dirty_log)


@_mutant(RING, hangs_writers=True)
def reset_ignored(patch: pytest.MonkeyPatch) -> None:
    """KVM_RESET_DIRTY_RINGS returns how many entries were harvested since the last call, and resets none."""
    harvest = DirtyRing.harvest
    harvested = 0

    def counting_harvest(ring: DirtyRing, most: int | None = None) -> Entries:
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


@_mutant(RING, hangs_writers=True)
def reset_undone(patch: pytest.MonkeyPatch) -> None:
    """KVM_RESET_DIRTY_RINGS resets nothing, and returns 0."""
    patch.setattr(Vm, "reset_dirty_rings", lambda _vm: 0)


@_mutant(RING)
def reset_count_high(patch: pytest.MonkeyPatch) -> None:
    """KVM_RESET_DIRTY_RINGS returns one more than it reset."""
    honest = Vm.reset_dirty_rings
    patch.setattr(Vm, "reset_dirty_rings", lambda vm: honest(vm) + 1)


@_mutant(RING)
def reset_count_low(patch: pytest.MonkeyPatch) -> None:
    """KVM_RESET_DIRTY_RINGS returns one less than it reset, if it reset anything."""
    honest = Vm.reset_dirty_rings
    patch.setattr(Vm, "reset_dirty_rings", lambda vm: max(honest(vm) - 1, 0))


# --- slots --------------------------------------------------------------------------------------------------------------


@_mutant(ALL)
def logging_stays_off(patch: pytest.MonkeyPatch) -> None:
    """Enabling dirty logging for a slot that exists has no effect."""
    log = uapi.KVM_MEM_LOG_DIRTY_PAGES
    _falsify_flags(patch, lambda before, asked: asked if before & log else asked & ~log)


@_mutant(ALL)
def logging_stays_on(patch: pytest.MonkeyPatch) -> None:
    """Disabling dirty logging for a slot has no effect."""
    log = uapi.KVM_MEM_LOG_DIRTY_PAGES
    _falsify_flags(patch, lambda before, asked: asked | before & log)


# --- errors -------------------------------------------------------------------------------------------------------------


@_mutant(ALL)
def wrong_errno(patch: pytest.MonkeyPatch) -> None:
    """Each ioctl of dirty logging that fails does so with EXDEV."""
    _falsify_ioctls(patch, lambda _request, result, code: (result, errno.EXDEV if result < 0 else code))


@_mutant(ALL)
def refusal_missing(patch: pytest.MonkeyPatch) -> None:
    """An ioctl of dirty logging that KVM refuses returns 0 and does nothing."""

    def accept(request: int, result: int, code: int) -> Answer:
        makes_file = request == uapi.KVM_CREATE_VCPU  # 0 would be a file of somebody else's
        return (0, 0) if result < 0 and not makes_file else (result, code)

    _falsify_ioctls(patch, accept)


@_mutant(ALL)
def call_refused(patch: pytest.MonkeyPatch) -> None:
    """Each ioctl of dirty logging that a test makes without the library takes effect, and fails with EXDEV."""
    _falsify_ioctls(patch, lambda *_answer: (-1, errno.EXDEV), "selftests.")
