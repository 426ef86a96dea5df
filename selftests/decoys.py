# SPDX-License-Identifier: GPL-2.0-only
"""Decoys: idle, logged memslots where KVM would log a write if it took another address of the written page for its gfn.

In most layouts such a number is the gfn of nothing, so that nothing shows if the page is also logged rightly. Here it is a
spurious page of a decoy. KVM for s390 took the host address until Linux 7.0 (commit 898885477e0f).
"""

import mmap
from collections.abc import Iterator

from dirty_tracking.vm import PAGE, DirtyVm
from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.memory import Backing, GuestMemory
from kvm_util.vm import Memslot

HOST_ADDRESS_DECOY, BYTE_ADDRESS_DECOY = 30, 31
# Memory below 2 GiB; only x86 knows the flag, and elsewhere its memory is too high for a decoy
_MAP_32BIT = 0x40


def low_memory(backing: Backing, size: int, gpa: int) -> GuestMemory:
    """Anonymous memory at a host address that can be a guest-physical address as well: between 1 and 2 GiB."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_32BIT
    return GuestMemory(backing, size, gpa, mmap.mmap(-1, size, flags))


def decoys(memslot: Memslot, first: int, count: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """Slot, gpa and size of the decoys that end below gpa *limit*; see :func:`add_decoys`.

    KVM refuses slots above that: 2^39 for many CPUs, 2^36 for some.
    """
    for slot, gpa, size in (
        (HOST_ADDRESS_DECOY, memslot.memory.hva, memslot.memory.size),
        (BYTE_ADDRESS_DECOY, (memslot.gpa + first * PAGE) * PAGE, count * PAGE * PAGE),
    ):
        if gpa + size <= limit:
            yield slot, gpa, size


def add_decoys(vm: DirtyVm, slot: int, first: int, count: int) -> None:
    """Add a decoy for the host addresses of a slot in low memory, and one for the gpas of some of its pages.

    :param first: the first of these pages, and *count*: how many they are, each of which takes PAGE pages of the decoy
    """
    limit = arch.guest_phys_limit(vm.guest.cpuid)
    for decoy, gpa, size in decoys(vm.vm.memslots[slot], first, count, limit):
        vm.vm.add_memory(decoy, gpa, size, flags=uapi.KVM_MEM_LOG_DIRTY_PAGES)
