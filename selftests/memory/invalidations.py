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

FIRST, END = 8, 66
SIZE = (END - FIRST) * PAGE
MADV_REMOVE, MADV_COLLAPSE = 9, 25  # mmap has no names for these
PROT_WRITABLE = mmap.PROT_READ | mmap.PROT_WRITE
# <sys/mman.h>, <linux/mman.h>
MAP_FIXED, MREMAP_MAYMOVE, MREMAP_FIXED = 0x10, 1, 2
KSM, DAMON = Path("/sys/kernel/mm/ksm"), Path("/sys/kernel/mm/damon/admin")
CLEAR_REFS = Path("/proc/self/clear_refs")
# A user of DAMON that has it for itself, in Linux 6.17 and later
DAMON_STAT = Path("/sys/module/damon_stat/parameters/enabled")
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
                pytest.skip(
                    "this kernel has no MADV_COLLAPSE for such memory (private: Linux 6.1; shared: a later one)"
                )
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
    for name, value in {"pages_to_scan": 1000, "sleep_millisecs": 1, "run": 1}.items():
        (KSM / name).write_text(str(value))
    try:
        until = time.monotonic() + DEADLINE
        while int((KSM / "pages_sharing").read_text()) < END - FIRST - 1:
            if time.monotonic() > until:
                pytest.skip(f"KSM did not merge the pages within {DEADLINE:g} s")
            time.sleep(0.01)
        (KSM / "run").write_text("0")
        yield
    finally:
        (KSM / "run").write_text("2")


@contextmanager
def aged(memory: GuestMemory) -> Iterator[None]:
    """Have DAMON, which looks at what is in use, clear the accessed bit of each page some times (kvm_age_gfn())."""
    kdamond = DAMON / "kdamonds/0"
    context = kdamond / "contexts/0"
    regions = context / "targets/0/regions"

    def write(path: Path, value: object) -> None:
        path.write_text(str(value))

    if DAMON_STAT.exists():
        write(DAMON_STAT, "N")
    write(DAMON / "kdamonds/nr_kdamonds", 1)
    write(kdamond / "contexts/nr_contexts", 1)
    try:
        write(context / "operations", "fvaddr")
    except OSError:
        pytest.skip("this kernel's DAMON does not know virtual addresses (CONFIG_DAMON_VADDR)")
    # Each page is a region of its own, of which each sampling clears the bit, and none are joined meanwhile.
    write(context / "monitoring_attrs/intervals/sample_us", 1000)
    write(context / "monitoring_attrs/intervals/aggr_us", 100_000_000)
    write(context / "targets/nr_targets", 1)
    write(context / "targets/0/pid_target", os.getpid())
    write(regions / "nr_regions", END - FIRST)
    for index in range(END - FIRST):
        for name, page in (("start", FIRST + index), ("end", FIRST + index + 1)):
            write(regions / str(index) / name, memory.hva + page * PAGE)
    write(kdamond / "state", "on")
    time.sleep(0.1)
    write(kdamond / "state", "off")
    yield


@contextmanager
def soft_dirty_bits_cleared(_memory: GuestMemory) -> Iterator[None]:
    """Write-protect all of the process's pages to see which are written, as CRIU does (admin-guide/mm/soft-dirty.rst)."""
    CLEAR_REFS.write_text("4")
    yield


# What is there if the kernel can do it, and how the kernel gets that
NEEDS: dict[Invalidation, tuple[Path, str]] = {
    soft_dirty_bits_cleared: (CLEAR_REFS, "/proc/PID/clear_refs (CONFIG_PROC_PAGE_MONITOR)"),
    merged_by_ksm: (KSM, "KSM (CONFIG_KSM)"),
    aged: (DAMON, "DAMON in sysfs (CONFIG_DAMON_SYSFS, CONFIG_DAMON_VADDR)"),
}
# These change settings of the whole host.
HOST_WIDE = (merged_by_ksm, aged)
