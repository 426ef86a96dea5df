# SPDX-License-Identifier: GPL-2.0-only
"""Guest memory: one host mapping per memslot, from one of several backings.

The backings have the names that the kernel's selftests use (``tools/testing/selftests/kvm/lib/test_util.c``).
"""

import ctypes
import errno
import mmap
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvm_util import filtered_calls, host_limits
from kvm_util.host_limits import HostLimit, explained
from kvm_util.wording import counted

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# The unit of memslots and of their dirty logs. The guest's pages may be smaller (arch.PAGE_SIZE).
HOST_PAGE_SIZE = mmap.PAGESIZE
# The size of transparent huge pages: what one page table maps, a page of 8-byte entries
HUGE_PAGE_SIZE = HOST_PAGE_SIZE // 8 * HOST_PAGE_SIZE

# <linux/mman.h>; Python 3.11's mmap module does not name them
_MAP_NORESERVE = 0x4000
_MAP_HUGETLB = 0x40000
_MAP_HUGE_SHIFT = 26
_MADV_POPULATE_WRITE = 23
_MFD_HUGETLB = 0x4

# A mapping in /proc/self/smaps: its first address, the one after its last, and how many KiB of it are mapped by huge pages
_TRANSPARENT = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) (?:.*\n)+?AnonHugePages: +([0-9]+) kB\nShmemPmdMapped: +([0-9]+) kB", re.MULTILINE
)
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_HUGEPAGES = Path("/sys/kernel/mm/hugepages")


class HugePagesMissing(HostLimit):
    """The host provided base pages instead of huge pages; the message says what to do."""


class GuestMemoryError(MemoryError):
    """The host cannot provide guest memory; the message says how much of which backing."""


@dataclass(frozen=True)
class Backing:
    """One kind of host memory.

    :ivar page_size: of its huge pages, in bytes; 0 for base pages
    :ivar shared: mapped MAP_SHARED, from a memfd
    :ivar hugetlb: huge pages from the hugetlb pool; otherwise huge pages are transparent
    """

    name: str
    page_size: int = 0
    shared: bool = False
    hugetlb: bool = False

    @property
    def alignment(self) -> int:
        """The alignment in bytes that KVM needs to map this memory with the backing's page size."""
        return self.page_size or HOST_PAGE_SIZE

    def pages_for(self, size: int) -> int:
        """How many of the backing's pages *size* bytes take up."""
        return align_up(size, self.alignment) // self.alignment

    def missing(self, size: int) -> str | None:
        """Why this host cannot provide *size* bytes, and what to do; None if it can."""
        if self.hugetlb:
            pool = _HUGEPAGES / f"hugepages-{self.page_size // KIB}kB"
            if not pool.exists():
                return f"{self.name}: this host's CPU has no {size_text(self.page_size)} huge pages"
            free, needed = int((pool / "free_hugepages").read_text()), self.pages_for(size)
            if free < needed:
                pages = counted(needed, "free huge page")
                return (
                    f"{self.name}: needs {pages} of {size_text(self.page_size)}, the host has {free}"
                    f" (echo {needed} > {pool}/nr_hugepages)"
                )
            groups = host_limits.huge_page_limits(self.page_size)
            if limit := host_limits.tightest(groups, needed * self.page_size):
                return f"{self.name}: needs {counted(needed, 'huge page')} of {size_text(self.page_size)}, but {limit}"
        elif self.page_size and (reason := _why_no_thp(self)):
            return f"{self.name}: {reason}"
        return None


BACKINGS = {
    backing.name: backing
    for backing in (
        Backing("anonymous"),
        Backing("anonymous_thp", page_size=HUGE_PAGE_SIZE),
        Backing("anonymous_hugetlb_2mb", page_size=2 * MIB, hugetlb=True),
        Backing("anonymous_hugetlb_1gb", page_size=GIB, hugetlb=True),
        Backing("shmem", shared=True),
        Backing("shmem_thp", page_size=HUGE_PAGE_SIZE, shared=True),
        Backing("shared_hugetlb_2mb", page_size=2 * MIB, shared=True, hugetlb=True),
    )
}


@cache
def _kernel_has_thp() -> bool:
    return _THP.exists()


def _why_no_thp(backing: Backing) -> str | None:
    """Why MADV_HUGEPAGE memory of *backing* gets no huge pages; None if it may get them."""
    if not _THP.exists():
        return "this kernel has no transparent huge pages (CONFIG_TRANSPARENT_HUGEPAGE)"
    if host_limits.status("THP_enabled") == "0":
        return (
            "transparent huge pages are off for this process: the program that started it switched them off with"
            " PR_SET_THP_DISABLE (start the tests from another one)"
        )
    name, word = ("shmem_enabled", "advise") if backing.shared else ("enabled", "madvise")
    # Since Linux 6.8 (shmem: 6.11) each size has a setting of its own, which may defer to the global one ("inherit").
    switch = _THP / f"hugepages-{backing.page_size // KIB}kB" / name
    chosen, common = _chosen(switch), _chosen(_THP / name)
    if chosen == "never":
        return f"transparent huge pages of {size_text(backing.page_size)} are off (echo inherit > {switch})"
    # "deny" is for shmem only, and overrides the setting of each size.
    if common == "deny" or (chosen in (None, "inherit") and common == "never"):
        return f"transparent huge pages are off (echo {word} > {_THP / name})"
    return None


def _chosen(switch: Path) -> str | None:
    """The value in brackets in a sysfs file such as ``always [madvise] never``; None if there is no such file."""
    try:
        return switch.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return None


class GuestMemory:
    """*size* bytes (whole pages) of host memory for one memslot at guest-physical address *gpa*.

    The host-virtual address is congruent to *gpa* modulo the backing's page size: KVM maps guest memory with huge pages
    only where both are (``kvm_mmu_max_mapping_level()``, Documentation/virt/kvm/mmu.rst, "Large pages").

    :param mapped: the memory, if it is mapped already
    :raises GuestMemoryError: the host cannot provide the memory
    :raises HostLimit: a limit of the host explains why
    """

    def __init__(self, backing: Backing, size: int, gpa: int, mapped: mmap.mmap | None = None) -> None:
        self.backing = backing
        self.size = size
        self._map = mapped or _map_backing(backing, size + gpa % backing.alignment)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._offset = (gpa - base) % backing.alignment
        self.hva = base + self._offset
        self.view = memoryview(self._map)[self._offset : self._offset + size]
        self.words = self.view.cast("Q")

    def populate(self) -> None:
        """Allocate every page now, so that a lack of memory is an error here and not a crash later.

        Does nothing before Linux 5.14, which introduced MADV_POPULATE_WRITE.

        :raises GuestMemoryError: the host cannot provide the pages
        :raises HostLimit: a limit of the host explains why
        :raises HugePagesMissing: the backing is transparent huge pages, and the host provided none
        """
        what = f"the host cannot provide {size_text(self.size)} of {self.backing.name} memory"
        try:
            with explained(what):
                _madvise(self._map, _MADV_POPULATE_WRITE, self._offset, self.size)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise GuestMemoryError(f"{what}: {error.strerror}") from error
            return
        transparent = self.backing.page_size and not self.backing.hugetlb
        if transparent and self.size >= 2 * self.backing.page_size and not self.transparent_huge_size():
            raise HugePagesMissing(
                self.backing.missing(self.size)
                or f"{self.backing.name}: the host gave no huge page, its memory is fragmented"
                " (echo 1 > /proc/sys/vm/compact_memory)"
            )

    def transparent_huge_size(self) -> int:
        """How many bytes are mapped by transparent huge pages (/proc/self/smaps)."""
        found = _TRANSPARENT.findall(Path("/proc/self/smaps").read_text())
        end = self.hva + self.size
        return sum(
            (int(anonymous) + int(shmem)) * KIB
            for first, last, anonymous, shmem in found
            if int(first, 16) < end and self.hva < int(last, 16)
        )

    def close(self) -> None:
        """Unmap the memory. Views derived from :attr:`view` must be released before."""
        self.words.release()
        self.view.release()
        self._release(self._map)

    def _release(self, mapped: mmap.mmap) -> None:
        mapped.close()


def _map_backing(backing: Backing, size: int) -> mmap.mmap:
    """Map *size* bytes, and for transparent huge pages enough more that an aligned range of *size* bytes lies within."""
    flags, length, fd = 0, align_up(size, backing.alignment), -1
    if not backing.hugetlb:  # whose pages are to be reserved: otherwise a write with an empty pool is a SIGBUS
        flags |= _MAP_NORESERVE
        length += backing.page_size
    if backing.shared:
        flags |= mmap.MAP_SHARED
        fd = _memory_file(backing, length)
    else:
        flags |= mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        flags |= _MAP_HUGETLB | _size_flag(backing) if backing.hugetlb else 0
    what = f"cannot map {size_text(size)} of {backing.name} guest memory"
    try:
        mapped = mmap.mmap(fd, length, flags, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        code = error.errno or 0
        # Another process may have used up the hugetlb pool since the test checked it.
        if limit := (backing.missing(size) if backing.hugetlb else None) or host_limits.explain(code, length):
            raise HostLimit(f"{what}: {limit}") from error
        raise GuestMemoryError(f"{what}: {errno.errorcode.get(code)} ({error.strerror})") from error
    finally:
        if fd >= 0:
            os.close(fd)
    if backing.page_size and not backing.hugetlb:
        _madvise(mapped, mmap.MADV_HUGEPAGE, 0, length)
    elif not backing.page_size and _kernel_has_thp():
        # With THP set to "always" this memory would be huge too, and base-page cells would test the same as THP cells.
        _madvise(mapped, mmap.MADV_NOHUGEPAGE, 0, length)
    return mapped


def _madvise(mapped: mmap.mmap, advice: int, offset: int, size: int) -> None:
    """madvise(2); raises HostLimit if a seccomp filter refuses the call."""
    try:
        mapped.madvise(advice, offset, size)
    except OSError as error:
        if reason := filtered_calls.why_refused("madvise", error.errno or 0):
            raise HostLimit(f"madvise is refused: {reason}") from error
        raise


def _size_flag(backing: Backing) -> int:
    """The size of hugetlb pages, in the encoding of both mmap(2) and memfd_create(2)."""
    return (backing.page_size.bit_length() - 1) << _MAP_HUGE_SHIFT


def _memory_file(backing: Backing, length: int) -> int:
    """Create a memfd of *length* bytes."""
    flags = os.MFD_CLOEXEC | (_MFD_HUGETLB | _size_flag(backing) if backing.hugetlb else 0)
    try:
        with explained(f"cannot create a file of {size_text(length)} for {backing.name} guest memory", length):
            fd = os.memfd_create(f"guest-{backing.name}", flags)
            try:
                os.ftruncate(fd, length)
            except BaseException:
                os.close(fd)
                raise
    except OSError as error:
        if reason := filtered_calls.why_refused("memfd_create", error.errno or 0):
            raise HostLimit(f"{backing.name}: memfd_create: {reason}") from error
        name = errno.errorcode.get(error.errno or 0)
        raise GuestMemoryError(
            f"cannot create a file of {size_text(length)} of memory: {name} ({error.strerror})"
        ) from error
    return fd


def align_up(value: int, alignment: int) -> int:
    """Round *value* up to a multiple of *alignment*."""
    return -(-value // alignment) * alignment


def align_down(value: int, alignment: int) -> int:
    """Round *value* down to a multiple of *alignment*."""
    return value // alignment * alignment


def size_text(size: int) -> str:
    """*size* bytes as text, in the largest binary unit that divides it: ``2 MiB``."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} bytes"
