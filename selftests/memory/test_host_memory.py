# SPDX-License-Identifier: GPL-2.0-only
"""The host changes its mapping of a memslot: KVM's MMU notifier zaps its SPTEs, and the dirty log loses no write."""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager

import pytest

from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util.kvm import Kvm
from kvm_util.memory import GuestMemory
from kvm_util.userfault import WriteProtectedPages

SLOT = 1
NPAGES = 64 + 9
# The pages whose mapping the host changes
FIRST, END = 8, 66
INSIDE, OUTSIDE = [8, 9, 30, 65], [3, 66, 72]
MADV_REMOVE = 9  # mmap has no name for it
PROT_WRITABLE = mmap.PROT_READ | mmap.PROT_WRITE

SIZE = (END - FIRST) * PAGE
# <sys/mman.h>, <linux/mman.h>
MAP_FIXED, MREMAP_MAYMOVE, MREMAP_FIXED = 0x10, 1, 2

Invalidation = Callable[[GuestMemory], AbstractContextManager[None]]

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, memory: GuestMemory, argument: int) -> None:
    """madvise() or mprotect() of the pages FIRST to END - 1."""
    if getattr(libc, name)(ctypes.c_void_p(start_of(memory)), SIZE, argument):
        raise OSError(ctypes.get_errno(), f"{name}({argument})")


def start_of(memory: GuestMemory) -> int:
    """The hva of page FIRST."""
    return memory.hva + FIRST * PAGE


def map_at(hva: int) -> None:
    """Map SIZE bytes of new private memory at *hva*, in place of what is there."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    libc.mmap.restype = ctypes.c_void_p
    if libc.mmap(ctypes.c_void_p(hva), ctypes.c_size_t(SIZE), PROT_WRITABLE, private, -1, ctypes.c_long(0)) != hva:
        raise OSError(ctypes.get_errno(), "mmap")


def move_pages(old: int, new: int) -> None:
    """Move SIZE bytes of mapped memory from hva *old* to *new*."""
    libc.mremap.restype = ctypes.c_void_p
    size, flags = ctypes.c_size_t(SIZE), MREMAP_MAYMOVE | MREMAP_FIXED
    if libc.mremap(ctypes.c_void_p(old), size, size, flags, ctypes.c_void_p(new)) != new:
        raise OSError(ctypes.get_errno(), "mremap")


@contextmanager
def discarded(memory: GuestMemory) -> Iterator[None]:
    """Discard the pages and their contents."""
    call("madvise", memory, MADV_REMOVE if memory.backing.shared else mmap.MADV_DONTNEED)
    yield


@contextmanager
def protected(memory: GuestMemory) -> Iterator[None]:
    """Make the pages read-only for a moment."""
    call("mprotect", memory, mmap.PROT_READ)
    call("mprotect", memory, PROT_WRITABLE)
    yield


@contextmanager
def replaced(memory: GuestMemory) -> Iterator[None]:
    """Map other memory at the same hva."""
    map_at(start_of(memory))
    yield


@contextmanager
def moved(memory: GuestMemory) -> Iterator[None]:
    """Move the pages to another hva, and back."""
    with closing(mmap.mmap(-1, SIZE)) as elsewhere:
        spare = ctypes.addressof(ctypes.c_char.from_buffer(elsewhere))
        # What moves leaves a hole, which is filled at once: another thread's mapping could go there.
        move_pages(start_of(memory), spare)
        map_at(start_of(memory))
        move_pages(spare, start_of(memory))
        map_at(spare)
    yield


@contextmanager
def write_protected_by_userfaultfd(memory: GuestMemory) -> Iterator[None]:
    """Write-protect the pages, as a snapshot of a running guest does, and end that."""
    with WriteProtectedPages(start_of(memory), SIZE):
        pass
    yield


@contextmanager
def shared_with_a_child(_memory: GuestMemory) -> Iterator[None]:
    """Share the pages with a child process until the context ends: the next write to each copies it."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    os.close(read_end)
    try:
        yield
    finally:
        os.close(write_end)
        os.waitpid(child, 0)


INVALIDATIONS = [
    ("anonymous", discarded),
    ("anonymous", protected),
    ("anonymous", replaced),
    ("anonymous", moved),
    ("anonymous", write_protected_by_userfaultfd),
    ("anonymous", shared_with_a_child),
    ("shmem", discarded),
    ("shmem", protected),
    ("shmem", replaced),
    ("shmem", moved),
]


@pytest.mark.parametrize(
    ("backing", "invalidation"), INVALIDATIONS, ids=[f"{backing}-{way.__name__}" for backing, way in INVALIDATIONS]
)
def test_dirty_log_survives_mmu_notifier(kvm: Kvm, log_mode: str, backing: str, invalidation: Invalidation) -> None:
    """Writes before and after an MMU notifier invalidation are reported, and the invalidation itself dirties no page."""
    with ScriptedVm(kvm, log_mode) as vm:
        memory = vm.add_slot(SLOT, FIRST_GPA, NPAGES, backing).memory
        vm.write(SLOT, *range(NPAGES))
        vm.assert_dirty("writes to all pages", {SLOT: range(NPAGES)})
        with invalidation(memory):
            vm.assert_dirty("an invalidation without writes", {})
            vm.write(SLOT, *INSIDE, *OUTSIDE)
            vm.assert_dirty("writes after an invalidation", {SLOT: INSIDE + OUTSIDE})
        vm.write(SLOT, *INSIDE, *OUTSIDE)
        with invalidation(memory):
            vm.assert_dirty("writes before an invalidation", {SLOT: INSIDE + OUTSIDE})
        vm.write(SLOT, *INSIDE)
        with invalidation(memory):
            vm.write(SLOT, *INSIDE, *OUTSIDE)
            # A store to a page that was zapped faults, and KVM pushes the page again.
            vm.assert_dirty("writes before and after an invalidation", {SLOT: INSIDE + OUTSIDE}, writes_per_page=2)
        vm.write(SLOT, *INSIDE)
        vm.assert_dirty("writes when all invalidations are over", {SLOT: INSIDE})
