# SPDX-License-Identifier: GPL-2.0-only
"""A VM: its ioctls, memslots and vCPUs."""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass

from kvm_util import uapi
from kvm_util.closing import Closing
from kvm_util.ioctl import ioctl
from kvm_util.memory import BACKINGS, HOST_PAGE_SIZE, Backing, GuestMemory
from kvm_util.vcpu import Vcpu


@dataclass
class Memslot:
    """A memslot as last set with KVM_SET_USER_MEMORY_REGION.

    :ivar slot: its number, with the address space in the upper 16 bits
    :ivar gpa: where it begins
    :ivar flags: ``KVM_MEM_*``
    """

    slot: int
    gpa: int
    memory: GuestMemory
    flags: int

    @property
    def npages(self) -> int:
        """The slot's size in host pages, the granularity of the dirty log."""
        return self.memory.size // HOST_PAGE_SIZE


class Vm(Closing):
    """An open VM; owns its vCPUs and the memory of its memslots. Methods are named after the VM ioctls.

    All of them raise KvmError if the ioctl fails, or HostLimit if a limit of the host explains the failure.

    :param fd: what KVM_CREATE_VM returned
    :param vcpu_mmap_size: what KVM_GET_VCPU_MMAP_SIZE returned, in bytes
    """

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        self.fd = fd
        self.vcpus: list[Vcpu] = []
        self.memslots: dict[int, Memslot] = {}
        self._vcpu_mmap_size = vcpu_mmap_size

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP on the VM, with up to four arguments (api.rst section 7)."""
        request = uapi.kvm_enable_cap(cap=cap, flags=flags, args=(ctypes.c_uint64 * 4)(*args))
        asked = ", ".join((f"cap={cap}", *(f"args[{i}]={arg:#x}" for i, arg in enumerate(args))))
        ioctl(self.fd, uapi.KVM_ENABLE_CAP, "KVM_ENABLE_CAP", ctypes.byref(request), asked)

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU."""
        fd = ioctl(self.fd, uapi.KVM_CREATE_VCPU, "KVM_CREATE_VCPU", vcpu_id, f"id={vcpu_id}")
        vcpu = Vcpu(fd, vcpu_id, self._vcpu_mmap_size)
        self.vcpus.append(vcpu)
        return vcpu

    def set_user_memory_region(self, slot: int, gpa: int, memory: GuestMemory, flags: int = 0) -> Memslot:
        """KVM_SET_USER_MEMORY_REGION: create slot *slot* at *gpa*, or move it or change its flags (api.rst 4.35).

        On success the VM takes ownership of *memory*.
        """
        region = uapi.kvm_userspace_memory_region(
            slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=memory.size, userspace_addr=memory.hva
        )
        asked = f"slot={slot}, gpa={gpa:#x}, size={memory.size:#x}, hva={memory.hva:#x}, flags={flags:#x}"
        request = uapi.KVM_SET_USER_MEMORY_REGION
        ioctl(self.fd, request, "KVM_SET_USER_MEMORY_REGION", ctypes.byref(region), asked)
        self.memslots[slot] = Memslot(slot, gpa, memory, flags)
        return self.memslots[slot]

    def add_memory(
        self,
        slot: int,
        gpa: int,
        size: int,
        backing: str = "anonymous",
        flags: int = 0,
        populate: bool = False,
        make_memory: Callable[[Backing, int, int], GuestMemory] = GuestMemory,
    ) -> Memslot:
        """Create slot *slot* at *gpa* with *size* bytes of new memory.

        :param backing: a key of ``BACKINGS``
        :param populate: allocate all pages now
        :param make_memory: called as :class:`GuestMemory` is, for the memory
        :raises GuestMemoryError: the host cannot provide the memory
        """
        memory = make_memory(BACKINGS[backing], size, gpa)
        try:
            if populate:
                memory.populate()
            return self.set_user_memory_region(slot, gpa, memory, flags)
        except BaseException:
            memory.close()
            raise

    def set_flags(self, slot: int, flags: int) -> None:
        """KVM_SET_USER_MEMORY_REGION: change only the flags of slot *slot*."""
        memslot = self.memslots[slot]
        self.set_user_memory_region(slot, memslot.gpa, memslot.memory, flags)

    def delete_memory_region(self, slot: int) -> None:
        """KVM_SET_USER_MEMORY_REGION with size 0: delete slot *slot*. Ownership of its memory passes to the caller."""
        region = uapi.kvm_userspace_memory_region(slot=slot)
        request = uapi.KVM_SET_USER_MEMORY_REGION
        ioctl(self.fd, request, "KVM_SET_USER_MEMORY_REGION", ctypes.byref(region), f"slot={slot}, size=0")
        del self.memslots[slot]

    def get_dirty_log(self, slot: int, bitmap: bytearray) -> None:
        """KVM_GET_DIRTY_LOG: fill *bitmap*, a bit per page of the slot in whole 64-bit words (api.rst 4.8)."""
        buffer = (ctypes.c_char * len(bitmap)).from_buffer(bitmap)
        request = uapi.kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(buffer))
        ioctl(self.fd, uapi.KVM_GET_DIRTY_LOG, "KVM_GET_DIRTY_LOG", ctypes.byref(request), f"slot={slot}")

    def clear_dirty_log(self, slot: int, bitmap: bytearray, first_page: int, num_pages: int) -> None:
        """KVM_CLEAR_DIRTY_LOG: clear the pages that are set in *bitmap*; bit 0 is page *first_page* (api.rst 4.117)."""
        buffer = (ctypes.c_char * len(bitmap)).from_buffer(bitmap)
        request = uapi.kvm_clear_dirty_log(
            slot=slot, num_pages=num_pages, first_page=first_page, dirty_bitmap=ctypes.addressof(buffer)
        )
        asked = f"slot={slot}, first_page={first_page}, num_pages={num_pages}"
        ioctl(self.fd, uapi.KVM_CLEAR_DIRTY_LOG, "KVM_CLEAR_DIRTY_LOG", ctypes.byref(request), asked)

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: reset the harvested entries of all rings; returns how many (api.rst, dirty ring)."""
        return ioctl(self.fd, uapi.KVM_RESET_DIRTY_RINGS, "KVM_RESET_DIRTY_RINGS")

    def get_stats_fd(self) -> int:
        """KVM_GET_STATS_FD: a descriptor of the VM's statistics, which the caller must close (api.rst 4.133)."""
        return ioctl(self.fd, uapi.KVM_GET_STATS_FD, "KVM_GET_STATS_FD")

    def close(self) -> None:
        """Close the VM's vCPUs, the VM, and then the memory of its slots. No vCPU may be running."""
        for vcpu in self.vcpus:
            vcpu.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        for memslot in self.memslots.values():
            memslot.memory.close()
        self.memslots.clear()
