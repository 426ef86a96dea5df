# SPDX-License-Identifier: GPL-2.0-only
"""Guest CPUID as KVM supports it, the guest features and physical address limit it implies, and the host's CPU."""

import ctypes
import errno
from pathlib import Path

from kvm_util.arch.x86_64.uapi import KVM_GET_SUPPORTED_CPUID, kvm_cpuid2, kvm_cpuid_entry2
from kvm_util.host_limits import HostLimit
from kvm_util.ioctl import fail, raw_ioctl
from kvm_util.memory import GIB

# The leaf of the hypervisor's interface, and what Hyper-V has there (Hypervisor Top Level Functional Specification)
_INTERFACE, _HYPERV = 0x40000001, int.from_bytes(b"Hv#1", "little")
_AMD_VENDORS = (b"AuthenticAMD", b"HygonGenuine")
_HYPERTRANSPORT_SIZE = 12 * GIB
# x87, SSE and AVX; and the three states of AVX-512
_XCR0_AVX = 7
_XCR0_AVX512 = _XCR0_AVX | 7 << 5


class Cpuid:
    """A CPUID table.

    :ivar buffer: ``struct kvm_cpuid2`` with its entries, as KVM_SET_CPUID2 takes it
    """

    def __init__(self, buffer: "ctypes.Array[ctypes.c_char]") -> None:
        self.buffer = buffer
        count = kvm_cpuid2.from_buffer(buffer).nent
        entries = (kvm_cpuid_entry2 * count).from_buffer(buffer, ctypes.sizeof(kvm_cpuid2))
        self._leaves = {(entry.function, entry.index): entry for entry in entries}

    def leaf(self, function: int, index: int = 0) -> kvm_cpuid_entry2:
        """A leaf's entry; with all registers 0 if the table lacks it."""
        return self._leaves.get((function, index)) or kvm_cpuid_entry2(function=function, index=index)

    def vendor(self) -> bytes:
        """The vendor string of leaf 0."""
        leaf = self.leaf(0)
        return b"".join(register.to_bytes(4, "little") for register in (leaf.ebx, leaf.edx, leaf.ecx))

    def family(self) -> int:
        """The CPU family, including the extended family."""
        eax: int = self.leaf(1).eax
        base = eax >> 8 & 0xF
        return base + (eax >> 20 & 0xFF) if base == 0xF else base

    def phys_bits(self) -> int:
        """MAXPHYADDR: the width of a guest-physical address, in bits."""
        return self.leaf(0x80000008).eax & 0xFF or 36

    def mappable_phys_bits(self) -> int:
        """The address width that KVM can map, in bits (GuestPhysAddrSize; less than MAXPHYADDR if TDP is, Linux 6.10)."""
        return self.leaf(0x80000008).eax >> 16 & 0xFF or self.phys_bits()

    def has_la57(self) -> bool:
        """Whether 5-level paging is supported."""
        return bool(self.leaf(7).ecx >> 16 & 1)

    def has_1gib_pages(self) -> bool:
        """Whether 1 GiB guest pages are supported."""
        return bool(self.leaf(0x80000001).edx >> 26 & 1)

    def has_nx(self) -> bool:
        """Whether no-execute page protection is supported."""
        return bool(self.leaf(0x80000001).edx >> 20 & 1)


def with_hyperv(cpuid: Cpuid) -> Cpuid:
    """A copy of *cpuid* that has Hyper-V's interface in place of KVM's, so that the guest may use Hyper-V's MSRs."""
    copy = Cpuid(ctypes.create_string_buffer(cpuid.buffer.raw, len(cpuid.buffer)))
    copy.leaf(_INTERFACE).eax = _HYPERV
    return copy


def has_svm(cpuid: Cpuid) -> bool:
    """Whether the guest can run nested guests with SVM."""
    return bool(cpuid.leaf(0x80000001).ecx >> 2 & 1)


def has_nested_paging(cpuid: Cpuid) -> bool:
    """Whether nested SVM guests can use nested paging."""
    return has_svm(cpuid) and bool(cpuid.leaf(0x8000000A).edx & 1)


def has_vmx(cpuid: Cpuid) -> bool:
    """Whether the guest can run nested guests with VMX."""
    return bool(cpuid.leaf(1).ecx >> 5 & 1)


def has_xsave(cpuid: Cpuid) -> bool:
    """Whether XSAVE is supported."""
    return bool(cpuid.leaf(1).ecx >> 26 & 1)


def vector_stores(cpuid: Cpuid) -> list[tuple[int, int]]:
    """The supported stores wider than 16 bytes: their size in bytes, and the XCR0 bits they need (Intel SDM, "XCR0")."""
    offered = []
    if has_xsave(cpuid) and cpuid.leaf(1).ecx >> 28 & 1:
        offered.append((32, _XCR0_AVX))
        if cpuid.leaf(7).ebx >> 16 & 1:
            offered.append((64, _XCR0_AVX512))
    return offered


def get_supported_cpuid(kvm_fd: int) -> Cpuid:
    """KVM_GET_SUPPORTED_CPUID (api.rst 4.46), with a buffer that is doubled until all entries fit."""
    count = 64
    while True:
        buffer = ctypes.create_string_buffer(ctypes.sizeof(kvm_cpuid2) + count * ctypes.sizeof(kvm_cpuid_entry2))
        kvm_cpuid2.from_buffer(buffer).nent = count
        result, code = raw_ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, buffer)
        if result >= 0:
            return Cpuid(buffer)
        if code != errno.E2BIG:
            fail(code, "KVM_GET_SUPPORTED_CPUID", f"nent={count}")
        count *= 2


def guest_phys_limit(cpuid: Cpuid) -> int:
    """The first guest-physical address above the usable range.

    AMD CPUs reserve 12 GiB for HyperTransport: below 1 TiB before family 17h, else at the top of the physical address
    space, which memory encryption may narrow (AMD APM volume 2, "Reserved physical address ranges"; like
    ``vm_compute_max_gfn()`` in the kernel's selftests).
    """
    limit = 1 << cpuid.mappable_phys_bits()
    if cpuid.vendor() not in _AMD_VENDORS or cpuid.phys_bits() < 40:
        return limit
    if cpuid.family() < 0x17:
        top = 1 << 40
    else:
        top = 1 << min(cpuid.phys_bits(), _host_phys_bits())
    return min(limit, top - _HYPERTRANSPORT_SIZE)


def _host_phys_bits() -> int:
    """The host's physical address width in bits, less the bits that memory encryption takes (/proc/cpuinfo)."""
    return int(_cpuinfo("address sizes").split()[0])


def cpu_vendor() -> str:
    """The host CPU's vendor string."""
    return _cpuinfo("vendor_id")


def cpu_model() -> str:
    """The host CPU's model name with family, model and stepping."""
    return (
        f"{_cpuinfo('model name')} (family {_cpuinfo('cpu family')} model {_cpuinfo('model')}"
        f" stepping {_cpuinfo('stepping')})"
    )


def _cpuinfo(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    raise HostLimit(f"/proc/cpuinfo has no {key!r} line here (mount the kernel's own in its place)")
