# SPDX-License-Identifier: GPL-2.0-only
"""Falsified answers of KVM, between the ioctl and the library, until the patch is undone: the ways to plant a fault.

Rings stay consistent, as they would with such a KVM: KVM_RESET_DIRTY_RINGS counts the entries that user space got to see.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import pytest

from dirty_tracking.bitmap import bitmap_of, set_pages
from dirty_tracking.ring import DirtyRing
from kvm_util import ioctl, uapi
from kvm_util.vm import Memslot, Vm

# The ioctls whose errors are part of the contract of dirty logging
_CALLS = (
    *(uapi.KVM_GET_DIRTY_LOG, uapi.KVM_CLEAR_DIRTY_LOG, uapi.KVM_RESET_DIRTY_RINGS),
    *(uapi.KVM_ENABLE_CAP, uapi.KVM_SET_USER_MEMORY_REGION, uapi.KVM_SET_USER_MEMORY_REGION2, uapi.KVM_CREATE_VCPU),
)

Answer = tuple[int, int]  # result and errno of an ioctl
Entries = list[tuple[int, int]]  # a slot and an offset each


def falsify_bitmaps(patch: pytest.MonkeyPatch, fault: Callable[[Vm, int, bytearray], None]) -> None:
    """Have *fault*, which gets VM and slot, change each bitmap that KVM_GET_DIRTY_LOG filled."""
    honest = Vm.get_dirty_log

    def falsified(vm: Vm, slot: int, bitmap: bytearray) -> None:
        honest(vm, slot, bitmap)
        fault(vm, slot, bitmap)

    patch.setattr(Vm, "get_dirty_log", falsified)


def falsify_rings(patch: pytest.MonkeyPatch, fault: Callable[[DirtyRing, Entries], Entries]) -> None:
    """Have *fault* return other entries than those harvested; resets count them as if they had been in the ring."""
    harvest, reset = DirtyRing.harvest, Vm.reset_dirty_rings
    surplus = 0

    def falsified_harvest(ring: DirtyRing, most: int | None = None) -> tuple[list[int], list[int]]:
        nonlocal surplus
        entries = list(zip(*harvest(ring, most), strict=True))
        falsified = fault(ring, list(entries))
        surplus += len(falsified) - len(entries)
        return [slot for slot, _ in falsified], [offset for _, offset in falsified]

    def falsified_reset(vm: Vm) -> int:
        nonlocal surplus
        wanted = reset(vm) + surplus
        answer = max(wanted, 0)
        surplus = wanted - answer
        return answer

    patch.setattr(DirtyRing, "harvest", falsified_harvest)
    patch.setattr(Vm, "reset_dirty_rings", falsified_reset)


def falsify_pages(patch: pytest.MonkeyPatch, change: Callable[[list[int]], list[int]]) -> None:
    """Have *change* return other pages than a bitmap has, or a ring, in order; pages more in a ring are of its last slot."""

    def bitmap_has(_vm: Vm, _slot: int, bitmap: bytearray) -> None:
        bits = len(bitmap) * 8
        bitmap[:] = bitmap_of([page % bits for page in change(set_pages(bitmap))], bits)

    def ring_has(_ring: DirtyRing, entries: Entries) -> Entries:
        slots = [slot for slot, _ in entries] or [1]
        pages = change([offset for _, offset in entries])
        return list(zip_longest(slots[: len(pages)], pages, fillvalue=slots[-1]))

    falsify_bitmaps(patch, bitmap_has)
    falsify_rings(patch, ring_has)


def falsify_clears(patch: pytest.MonkeyPatch, fault: Callable[[Vm, int, bytearray, int], None]) -> None:
    """Have *fault* change what KVM_CLEAR_DIRTY_LOG is asked for: it gets VM, slot, mask and first page."""
    honest = Vm.clear_dirty_log

    def clear_dirty_log(vm: Vm, slot: int, bitmap: bytearray, first_page: int, num_pages: int) -> None:
        mask = bytearray(bitmap)
        fault(vm, slot, mask, first_page)
        honest(vm, slot, mask, first_page, num_pages)

    patch.setattr(Vm, "clear_dirty_log", clear_dirty_log)


def falsify_slots(patch: pytest.MonkeyPatch, fault: Callable[[Memslot, int, int], tuple[int, int]]) -> None:
    """Have *fault* return another gpa and other flags than an existing slot is to get; it gets the slot as KVM has it."""
    honest = Vm.set_user_memory_region
    real: dict[tuple[Vm, int], Memslot] = {}

    def set_user_memory_region(vm: Vm, slot: int, gpa: int, memory: Any, flags: int = 0) -> Memslot:
        seen = gpa, flags
        if slot in vm.memslots:
            seen = fault(real.get((vm, slot), vm.memslots[slot]), gpa, flags)
        memslot = honest(vm, slot, seen[0], memory, seen[1])
        real[vm, slot] = replace(memslot)
        memslot.gpa, memslot.flags = gpa, flags  # as the library believes
        return memslot

    patch.setattr(Vm, "set_user_memory_region", set_user_memory_region)


def falsify_ioctls(patch: pytest.MonkeyPatch, fault: Callable[[int, int, int], Answer], modules: str = "") -> None:
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


# The same as a plugin for a run in a process of its own: every written page is lost
LOSING_PLUGIN = """
from kvm_util.vm import Vm
honest = Vm.get_dirty_log
def losing(vm, slot, bitmap):
    honest(vm, slot, bitmap)
    bitmap[:] = bytes(len(bitmap))
Vm.get_dirty_log = losing
"""
