# SPDX-License-Identifier: GPL-2.0-only
"""What the host can do with the memory of a memslot, so that KVM's MMU notifier zaps SPTEs of it, or ages them.

Each is a context, and concerns the pages FIRST to END - 1; what it does is done when the context begins.
"""

import ctypes
import errno
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest

from dirty_tracking.vm import PAGE
from kvm_util.memory import HUGE_PAGE_SIZE, GuestMemory
from kvm_util.userfault import WriteProtectedPages
from selftests.memory.damon import age_pages, why_no_damon

FIRST, END = 8, 66
SIZE = (END - FIRST) * PAGE
MADV_REMOVE, MADV_PAGEOUT, MADV_COLLAPSE, MADV_SOFT_OFFLINE = 9, 21, 25, 101  # mmap has no names for these
PROT_WRITABLE = mmap.PROT_READ | mmap.PROT_WRITE
# <sys/mman.h>, <linux/mman.h>
MAP_FIXED, MREMAP_MAYMOVE, MREMAP_FIXED = 0x10, 1, 2
KSM = Path("/sys/kernel/mm/ksm")
CLEAR_REFS, PAGEMAP = Path("/proc/self/clear_refs"), Path("/proc/self/pagemap")
SOFT_DIRTY, SWAPPED, FRAME = 1 << 55, 1 << 62, (1 << 55) - 1  # in an entry of pagemap
NO_PAGEMAP = "this kernel shows no page frames (CONFIG_PROC_PAGE_MONITOR)"
SWAPS, DROP_CACHES = Path("/proc/swaps"), Path("/proc/sys/vm/drop_caches")
RAM_DISK, SWAP_MAGIC = Path("/dev/ram0"), b"SWAPSPACE2"
DEADLINE = 30.0

Invalidation = Callable[[GuestMemory], AbstractContextManager[None]]

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, memory: GuestMemory, argument: int) -> None:
    """madvise() or mprotect() of the pages FIRST to END - 1."""
    call_at(name, start_of(memory), SIZE, argument)


def call_at(name: str, hva: int, size: int, argument: int) -> None:
    """madvise() or mprotect() of *size* bytes at *hva*."""
    if getattr(libc, name)(ctypes.c_void_p(hva), ctypes.c_size_t(size), argument):
        raise OSError(ctypes.get_errno(), f"{name}({argument})")


def way_to_discard(memory: GuestMemory) -> int:
    """The advice that discards pages and their contents."""
    return MADV_REMOVE if memory.backing.shared else mmap.MADV_DONTNEED


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
    call("madvise", memory, way_to_discard(memory))
    yield


@contextmanager
def collapsed(memory: GuestMemory) -> Iterator[None]:
    """Discard the pages, which splits the huge page that they are in, and have the host make a huge page of it again."""
    call("madvise", memory, way_to_discard(memory))
    for _ in range(50):
        try:
            call_at("madvise", memory.hva, HUGE_PAGE_SIZE, MADV_COLLAPSE)
        except OSError as error:
            if error.errno == errno.EINVAL:
                pytest.skip("MADV_COLLAPSE is refused for such memory (it needs Linux 6.1, and a later one if shared)")
            if error.errno == errno.ENOMEM:  # no huge page is free
                break
            if error.errno not in (errno.EAGAIN, errno.EBUSY):  # such as a page that is being reclaimed
                raise
        else:
            break
    if not memory.transparent_huge_size():
        pytest.skip(
            "MADV_COLLAPSE made no huge page, the host's memory is fragmented (echo 1 > /proc/sys/vm/compact_memory)"
        )
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


@contextmanager
def merged_by_ksm(memory: GuestMemory) -> Iterator[None]:
    """Have KSM replace all of the pages, which have the same content, by one; after the context it makes copies again."""
    call("madvise", memory, mmap.MADV_MERGEABLE)
    settings = {KSM / "pages_to_scan": "1000", KSM / "sleep_millisecs": "1", KSM / "run": "1"}
    before = {file: file.read_text() for file in settings}
    try:
        for file, value in settings.items():
            file.write_text(value)
        until = time.monotonic() + DEADLINE
        while int((KSM / "pages_sharing").read_text()) < END - FIRST - 1:
            if time.monotonic() > until:
                pytest.skip(f"KSM did not merge the pages within {DEADLINE:g} s")
            time.sleep(0.01)
        (KSM / "run").write_text("0")
        yield
    finally:
        (KSM / "run").write_text("2")
        for file, value in before.items():
            file.write_text(value)


@contextmanager
def aged(memory: GuestMemory) -> Iterator[None]:
    """Have DAMON, which looks at what is in use, clear the accessed bit of each page some times (kvm_age_gfn())."""
    age_pages(memory.hva + page * PAGE for page in range(FIRST, END))
    yield


def pagemap_entry(hva: int) -> int:
    """What the host says about the page at *hva* (admin-guide/mm/pagemap.rst)."""
    with PAGEMAP.open("rb", buffering=0) as pagemap:
        pagemap.seek(hva // PAGE * 8)
        return int.from_bytes(pagemap.read(8), "little")


def migrate_page(hva: int) -> None:
    """Have the host move the page at *hva* to another page frame, and retire the old one."""
    until = time.monotonic() + DEADLINE
    while True:
        try:
            return call_at("madvise", hva, PAGE, MADV_SOFT_OFFLINE)
        except OSError as error:
            # Someone else has a reference, or has isolated the page, for a moment: get_any_page(), mm/memory-failure.c.
            if error.errno not in (errno.EBUSY, errno.EIO):
                raise
            if time.monotonic() > until:
                pytest.skip(f"the host did not migrate a page within {DEADLINE:g} s: {error.strerror}")
            time.sleep(0.01)


def why_no_migration() -> str | None:
    """Why pages cannot be migrated one by one; None if they can."""
    if not PAGEMAP.exists():
        return NO_PAGEMAP
    with closing(mmap.mmap(-1, PAGE)) as memory:
        memory[0] = 1
        try:
            migrate_page(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        except OSError as error:
            reasons = {errno.EINVAL: "CONFIG_MEMORY_FAILURE", errno.EOPNOTSUPP: "vm.enable_soft_offline"}
            needs = f" ({reasons[error.errno]})" if error.errno in reasons else ""
            return f"madvise(MADV_SOFT_OFFLINE): {error.strerror}{needs}"
    return None


@contextmanager
def migrated(memory: GuestMemory) -> Iterator[None]:
    """Migrate some of the pages to other page frames, as compaction, NUMA balancing and memory hot-unplug do."""
    # Few of them: each costs a page frame for good, and its block is of no use for huge pages.
    for page in (FIRST, FIRST + 1, (FIRST + END) // 2, END - 1):
        hva = memory.hva + page * PAGE
        before = pagemap_entry(hva) & FRAME
        migrate_page(hva)
        assert before != pagemap_entry(hva) & FRAME != 0, f"page {page} is where it was"
    yield


def why_no_swap() -> str | None:
    """Why there is no disk in memory to swap to; None if there is."""
    if not PAGEMAP.exists():
        return NO_PAGEMAP
    if not SWAPS.exists():
        return "this kernel does not swap (CONFIG_SWAP)"
    return None if RAM_DISK.exists() else f"this kernel has no {RAM_DISK} to swap to (CONFIG_BLK_DEV_RAM)"


@contextmanager
def swap_space() -> Iterator[None]:
    """Swap to a disk in memory."""
    with RAM_DISK.open("r+b") as disk:
        pages = disk.seek(0, os.SEEK_END) // PAGE
        # union swap_header, <linux/swap.h>
        disk.seek(1024)
        disk.write(struct.pack("=III", 1, pages - 1, 0))
        disk.seek(PAGE - len(SWAP_MAGIC))
        disk.write(SWAP_MAGIC)
    if libc.swapon(bytes(RAM_DISK), 0):
        raise OSError(ctypes.get_errno(), f"swapon({RAM_DISK})")
    try:
        yield
    finally:
        if libc.swapoff(bytes(RAM_DISK)):
            raise OSError(ctypes.get_errno(), f"swapoff({RAM_DISK})")


@contextmanager
def swapped_out(memory: GuestMemory) -> Iterator[None]:
    """Write the pages to swap space; the next access to each reads it again, into a newly allocated page frame."""
    with swap_space():
        until = time.monotonic() + DEADLINE
        while left := [page for page in range(FIRST, END) if not pagemap_entry(memory.hva + page * PAGE) & SWAPPED]:
            if time.monotonic() > until:
                pytest.skip(f"the host did not swap out all pages within {DEADLINE:g} s; {len(left)} are left")
            # Pages that are in the LRU batch of another CPU stay; this empties the batches (lru_add_drain_all()).
            DROP_CACHES.write_text("1")
            call("madvise", memory, MADV_PAGEOUT)
        yield


def why_no_soft_dirty_bits() -> str | None:
    """Why there are no soft-dirty bits, or none that this process can clear; None if it can."""
    try:
        CLEAR_REFS.write_text("4")
        with closing(mmap.mmap(-1, PAGE)) as memory:
            memory[0] = 1
            written = pagemap_entry(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    except OSError as error:
        return f"soft-dirty bits cannot be cleared and read (/proc/PID/clear_refs, pagemap): {error.strerror}"
    return None if written & SOFT_DIRTY else "this kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)"


@contextmanager
def soft_dirty_bits_cleared(_memory: GuestMemory) -> Iterator[None]:
    """Write-protect all of the process's pages to see which are written, as CRIU does (admin-guide/mm/soft-dirty.rst)."""
    CLEAR_REFS.write_text("4")
    yield


# Why this kernel cannot do it, or None
WHY_NOT: dict[Invalidation, Callable[[], str | None]] = {
    soft_dirty_bits_cleared: why_no_soft_dirty_bits,
    merged_by_ksm: lambda: None if KSM.exists() else "this kernel has no KSM (CONFIG_KSM)",
    aged: why_no_damon,
    migrated: why_no_migration,
    swapped_out: why_no_swap,
}
# These change settings of the whole host, or cost it page frames.
HOST_WIDE = (merged_by_ksm, aged, migrated, swapped_out)
