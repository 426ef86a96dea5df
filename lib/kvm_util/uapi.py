# SPDX-License-Identifier: GPL-2.0-only
"""The architecture-neutral part of ``<linux/kvm.h>``: structs, capabilities, ioctl numbers.

Names are those of the header, lower-case structs included. ``selftests/unit/test_uapi.py`` compares every size, offset and
value with the installed header.
"""

from ctypes import Structure, Union, c_char, c_int16, c_uint8, c_uint16, c_uint32, c_uint64

from kvm_util.ioctl import _IO, _IOW, _IOWR

KVMIO = 0xAE
KVM_API_VERSION = 12

# KVM_EXIT_*: why KVM_RUN returned
KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_HYPERV = 27
KVM_EXIT_DIRTY_RING_FULL = 31

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

# Capabilities
KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_READONLY_MEM = 81
KVM_CAP_MULTI_ADDRESS_SPACE = 118
KVM_CAP_MAX_VCPU_ID = 128
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
KVM_CAP_DIRTY_LOG_RING = 192
KVM_CAP_BINARY_STATS_FD = 203
KVM_CAP_DISABLE_QUIRKS2 = 213
KVM_CAP_DIRTY_LOG_RING_ACQ_REL = 223
KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP = 225
KVM_CAP_GUEST_MEMFD = 234
KVM_CAP_PRE_FAULT_MEMORY = 236
KVM_CAP_GUEST_MEMFD_FLAGS = 244

KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2


KVM_DIRTY_GFN_F_DIRTY = 1 << 0
KVM_DIRTY_GFN_F_RESET = 1 << 1


class kvm_userspace_memory_region(Structure):
    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    )


# Debian 12's header lacks these two (Linux 6.8). The underscore exempts them from the comparison with the header.
class _kvm_userspace_memory_region2(Structure):
    """``struct kvm_userspace_memory_region2``."""

    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
        ("guest_memfd_offset", c_uint64),
        ("guest_memfd", c_uint32),
        ("pad1", c_uint32),
        ("pad2", c_uint64 * 14),
    )


class _kvm_create_guest_memfd(Structure):
    """``struct kvm_create_guest_memfd``."""

    _fields_ = (("size", c_uint64), ("flags", c_uint64), ("reserved", c_uint64 * 6))


class kvm_enable_cap(Structure):
    _fields_ = (("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64))


class kvm_dirty_log(Structure):
    """Argument of KVM_GET_DIRTY_LOG; *dirty_bitmap* stands for the header's 64-bit union of pointer and padding."""

    _fields_ = (("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", c_uint64))


class kvm_clear_dirty_log(Structure):
    _fields_ = (("slot", c_uint32), ("num_pages", c_uint32), ("first_page", c_uint64), ("dirty_bitmap", c_uint64))


class kvm_dirty_gfn(Structure):
    """A dirty-ring entry; *slot* is ``as_id << 16 | slot id``, *offset* the page's index in the slot (api.rst, dirty ring)."""

    _fields_ = (("flags", c_uint32), ("slot", c_uint32), ("offset", c_uint64))


class kvm_signal_mask(Structure):
    """Header of a signal set; *len* bytes follow."""

    _fields_ = (("len", c_uint32),)


class _kvm_pre_fault_memory(Structure):
    _fields_ = (("gpa", c_uint64), ("size", c_uint64), ("flags", c_uint64), ("padding", c_uint64 * 5))


class kvm_stats_header(Structure):
    """Header of a KVM_GET_STATS_FD file; offsets are in bytes from the start of the file (api.rst 4.133)."""

    _fields_ = (
        ("flags", c_uint32),
        ("name_size", c_uint32),
        ("num_desc", c_uint32),
        ("id_offset", c_uint32),
        ("desc_offset", c_uint32),
        ("data_offset", c_uint32),
    )


class kvm_stats_desc(Structure):
    """Descriptor of a statistic; its name follows, padded to ``kvm_stats_header.name_size`` bytes (api.rst 4.133)."""

    _fields_ = (
        ("flags", c_uint32),
        ("exponent", c_int16),
        ("size", c_uint16),
        ("offset", c_uint32),
        ("bucket_size", c_uint32),
    )


class _run_io(Structure):
    _fields_ = (
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    )


class _run_mmio(Structure):
    _fields_ = (("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8))


class _run_fail_entry(Structure):
    _fields_ = (("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32))


class _run_internal(Structure):
    _fields_ = (("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16))


class _run_exit(Union):
    _fields_ = (
        ("io", _run_io),
        ("mmio", _run_mmio),
        ("fail_entry", _run_fail_entry),
        ("internal", _run_internal),
        ("padding", c_char * 256),
    )


class kvm_run(Structure):
    """The region that a vCPU shares with user space (api.rst section 5), with the exits that the library decodes."""

    _anonymous_ = ("_exit",)
    _fields_ = (
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("_exit", _run_exit),
        ("kvm_valid_regs", c_uint64),
        ("kvm_dirty_regs", c_uint64),
        ("_sync_regs", c_char * 2048),
    )


# System ioctls
KVM_GET_API_VERSION = _IO(KVMIO, 0x00)
KVM_CREATE_VM = _IO(KVMIO, 0x01)
KVM_CHECK_EXTENSION = _IO(KVMIO, 0x03)
KVM_GET_VCPU_MMAP_SIZE = _IO(KVMIO, 0x04)

# VM ioctls
KVM_CREATE_VCPU = _IO(KVMIO, 0x41)
KVM_GET_DIRTY_LOG = _IOW(KVMIO, 0x42, kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION = _IOW(KVMIO, 0x46, kvm_userspace_memory_region)
KVM_SET_USER_MEMORY_REGION2 = _IOW(KVMIO, 0x49, _kvm_userspace_memory_region2)
KVM_ENABLE_CAP = _IOW(KVMIO, 0xA3, kvm_enable_cap)
KVM_CLEAR_DIRTY_LOG = _IOWR(KVMIO, 0xC0, kvm_clear_dirty_log)
KVM_RESET_DIRTY_RINGS = _IO(KVMIO, 0xC7)
KVM_CREATE_GUEST_MEMFD = _IOWR(KVMIO, 0xD4, _kvm_create_guest_memfd)
KVM_GET_STATS_FD = _IO(KVMIO, 0xCE)  # VM or vCPU ioctl

# vCPU ioctls
KVM_RUN = _IO(KVMIO, 0x80)
KVM_SET_SIGNAL_MASK = _IOW(KVMIO, 0x8B, kvm_signal_mask)
KVM_PRE_FAULT_MEMORY = _IOWR(KVMIO, 0xD5, _kvm_pre_fault_memory)
