# SPDX-License-Identifier: GPL-2.0-only
"""The host takes a slot's memory away and gives it back: KVM drops its mappings (MMU notifiers), and forgets no write.

What the guest wrote before is reported, and what it writes afterwards is tracked; the rest is not reported.
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from dirty_tracking.tracked_vm import FIRST_GPA, PAGE, TrackedVm
from kvm_util.kvm import Kvm
from kvm_util.memory import GuestMemory

SLOT = 1
NPAGES = 64 + 9
# What the host takes away
FIRST, END = 8, 66
INSIDE, OUTSIDE = [8, 9, 30, 65], [3, 66, 72]
MADV_REMOVE = 9  # mmap has no name for it
PROT_WRITABLE = mmap.PROT_READ | mmap.PROT_WRITE

Taking = Callable[[GuestMemory], AbstractContextManager[None]]


def call(name: str, memory: GuestMemory, argument: int) -> None:
    """madvise() or mprotect() of the pages FIRST to END - 1."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(ctypes.c_void_p(memory.hva + FIRST * PAGE), (END - FIRST) * PAGE, argument):
        raise OSError(ctypes.get_errno(), f"{name}({argument})")


@contextmanager
def discarded(memory: GuestMemory) -> Iterator[None]:
    """The pages are gone, with what was in them."""
    call("madvise", memory, MADV_REMOVE if memory.backing.shared else mmap.MADV_DONTNEED)
    yield


@contextmanager
def protected(memory: GuestMemory) -> Iterator[None]:
    """They were not writable for a moment."""
    call("mprotect", memory, mmap.PROT_READ)
    call("mprotect", memory, PROT_WRITABLE)
    yield


@contextmanager
def shared_with_a_child(memory: GuestMemory) -> Iterator[None]:
    """Another process has them too: who writes one first, gets a copy. The child does nothing, and ends with the context."""
    ours, its = os.pipe()
    child = os.fork()
    if not child:
        os.close(its)
        os.read(ours, 1)
        os._exit(0)
    os.close(ours)
    try:
        yield
    finally:
        os.close(its)
        os.waitpid(child, 0)


WAYS = [
    ("anonymous", discarded),
    ("anonymous", protected),
    ("anonymous", shared_with_a_child),
    ("shmem", discarded),
    ("shmem", protected),
]


@pytest.mark.parametrize(("backing", "taken"), WAYS, ids=[f"{backing}-{way.__name__}" for backing, way in WAYS])
def test_writes_around_it_are_reported(kvm: Kvm, log_mode: str, backing: str, taken: Taking) -> None:
    with TrackedVm(kvm, log_mode) as vm:
        memory = vm.add_slot(SLOT, FIRST_GPA, NPAGES, backing).memory
        vm.write(SLOT, *range(NPAGES))
        vm.assert_dirty("writes to all pages", {SLOT: range(NPAGES)})
        with taken(memory):
            vm.assert_dirty("nothing but that the host took pages away", {})
            vm.write(SLOT, *INSIDE, *OUTSIDE)
            vm.assert_dirty("writes after the host took pages away", {SLOT: INSIDE + OUTSIDE})
        vm.write(SLOT, *INSIDE, *OUTSIDE)
        with taken(memory):
            vm.assert_dirty("writes before the host took pages away", {SLOT: INSIDE + OUTSIDE})
        vm.write(SLOT, *INSIDE)
        with taken(memory):
            vm.write(SLOT, *INSIDE, *OUTSIDE)
            # What KVM maps anew for a store is in a ring once more.
            vm.assert_dirty("writes before and after", {SLOT: INSIDE + OUTSIDE}, writes_per_page=2)
        vm.write(SLOT, *INSIDE)
        vm.assert_dirty("writes after all that", {SLOT: INSIDE})
