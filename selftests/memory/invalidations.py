# SPDX-License-Identifier: GPL-2.0-only
"""What the host can do with the memory of a memslot, so that KVM's MMU notifier zaps SPTEs of it, or ages them.

Each is a context, and concerns the pages FIRST to END - 1; what it does is done when the context begins.
"""

import ctypes
import errno
import mmap
import os
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
MADV_REMOVE, MADV_COLLAPSE = 9, 25  # mmap has no names for these
PROT_WRITABLE = mmap.PROT_READ | mmap.PROT_WRITE
# <sys/mman.h>, <linux/mman.h>
MAP_FIXED, MREMAP_MAYMOVE, MREMAP_FIXED = 0x10, 1, 2
KSM = Path("/sys/kernel/mm/ksm")
CLEAR_REFS, PAGEMAP = Path("/proc/self/clear_refs"), Path("/proc/self/pagemap")
SOFT_DIRTY = 1 << 55  # in an entry of pagemap
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


def why_no_soft_dirty_bits() -> str | None:
    """Why there are no soft-dirty bits, or none that this process can clear; None if it can."""
    try:
        CLEAR_REFS.write_text("4")
        with closing(mmap.mmap(-1, PAGE)) as memory, PAGEMAP.open("rb", buffering=0) as pagemap:
            memory[0] = 1
            pagemap.seek(ctypes.addressof(ctypes.c_char.from_buffer(memory)) // PAGE * 8)
            written = int.from_bytes(pagemap.read(8), "little")
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
}
# These change settings of the whole host.
HOST_WIDE = (merged_by_ksm, aged)
