# SPDX-License-Identifier: GPL-2.0-only
"""KVM write-protects a large memslot while others wait for its MMU lock: a walk that yields forgets no page."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import FIRST_GPA
from kvm_util.kvm import Kvm
from kvm_util.memory import GIB, GuestMemory
from selftests.memory.invalidations import call_at, way_to_discard

pytestmark = pytest.mark.threads

SLOT, OTHER = 1, 2
NPAGES, AT_ONCE = 3 * 4096, 4096
WRITTEN = 600


@contextmanager
def contended_lock(memory: GuestMemory) -> Iterator[None]:
    """While the context lasts, a thread has the host discard *memory*, for which KVM takes its MMU lock to write."""
    ended = threading.Event()

    def discard() -> None:
        while not ended.is_set():
            call_at("madvise", memory.hva, memory.size, way_to_discard(memory))

    thread = threading.Thread(target=discard, name="discarding", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.log_modes("dirty-log", "clear-log", "dirty-ring")
def test_large_slot_under_contention(kvm: Kvm, log_mode: str, draw: random.Random, thorough: bool) -> None:
    """All pages of a large memslot are write-protected while others wait for KVM's MMU lock.

    With TDP the walk may give way to them (tdp_mmu_iter_cond_resched()); that it does so in a run is not shown. Shadow paging
    has another walk, which gives way by itself (walk_slot_rmaps()).
    """
    with ScriptedVm(kvm, log_mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES, logged=False)
        other = vm.add_slot(OTHER, 2 * GIB, 1, logged=False).memory
        vm.write(OTHER, 0)
        for first in range(0, NPAGES, AT_ONCE):
            vm.write(SLOT, *range(first, first + AT_ONCE))
        for _ in range(20 if thorough else 1):
            with contended_lock(other):
                vm.enable_dirty_logging(SLOT)
            for _ in range(2):
                pages = draw.sample(range(NPAGES), WRITTEN)
                vm.write(SLOT, *pages)
                with contended_lock(other):
                    vm.assert_dirty("writes to some pages", {SLOT: pages})
            vm.disable_dirty_logging(SLOT)
