# SPDX-License-Identifier: GPL-2.0-only
"""Decoys: idle, logged memslots where KVM would log a write if it took another address of the written page for its gfn.

In most layouts such a number is the gfn of nothing, so that nothing shows if the page is also logged rightly. Here it is a
spurious page of a decoy. KVM for s390 took the host address until Linux 7.0 (commit 898885477e0f).
"""

import ctypes
import errno
import mmap

from dirty_tracking.vm import PAGE, DirtyVm
from kvm_util import uapi
from kvm_util.memory import BACKINGS, MIB, GuestMemory

HOST_ADDRESS_DECOY, BYTE_ADDRESS_DECOY = 30, 31
# Host addresses that are no gpa of a test: above its memslots, below the APIC's page
_LOW = range(0xA0000000, 0xC0000000, 16 * MIB)
_MAP_FIXED_NOREPLACE = 0x100000
_MADV_POPULATE_WRITE = 23
_PYBUF_WRITE = 0x200

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_view_of = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of.argtypes, _view_of.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object


class LowMemory(GuestMemory):
    """*size* bytes of anonymous memory at a host address that can be a guest-physical address as well."""

    def __init__(self, size: int) -> None:
        self.backing, self.size = BACKINGS["anonymous"], size
        access = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED_NOREPLACE
        for self.hva in _LOW:
            address = ctypes.c_void_p(self.hva)
            if _libc.mmap(address, ctypes.c_size_t(size), access, flags, -1, ctypes.c_long(0)) == self.hva:
                break
            if ctypes.get_errno() != errno.EEXIST:
                raise OSError(ctypes.get_errno(), f"mmap of {size} bytes at {self.hva:#x}")
        else:
            raise OSError(errno.EEXIST, f"no low host address is free for {size} bytes")
        self.view: memoryview = _view_of(self.hva, size, _PYBUF_WRITE)
        self.words = self.view.cast("Q")

    def populate(self) -> None:
        """Allocate every page now; does nothing before Linux 5.14."""
        _libc.madvise(ctypes.c_void_p(self.hva), ctypes.c_size_t(self.size), _MADV_POPULATE_WRITE)

    def close(self) -> None:
        """Unmap the memory."""
        self.words.release()
        self.view.release()
        _libc.munmap(ctypes.c_void_p(self.hva), ctypes.c_size_t(self.size))


def add_decoys(vm: DirtyVm, slot: int, first: int, count: int) -> None:
    """Add a decoy for the host addresses of a slot with :class:`LowMemory`, and one for the gpas of some of its pages.

    :param first: the first of these pages, and *count*: how many they are, each of which takes PAGE pages of the decoy
    """
    memslot = vm.vm.memslots[slot]
    flags = uapi.KVM_MEM_LOG_DIRTY_PAGES
    vm.vm.add_memory(HOST_ADDRESS_DECOY, memslot.memory.hva, memslot.memory.size, flags=flags)
    vm.vm.add_memory(BYTE_ADDRESS_DECOY, (memslot.gpa + first * PAGE) * PAGE, count * PAGE * PAGE, flags=flags)
