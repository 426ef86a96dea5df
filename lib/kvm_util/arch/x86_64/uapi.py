# SPDX-License-Identifier: GPL-2.0-only
"""The x86 part of ``<linux/kvm.h>`` and ``<asm/kvm.h>``; names are those of the headers."""

from ctypes import Structure, c_uint8, c_uint16, c_uint32, c_uint64

from kvm_util.ioctl import _IO, _IOR, _IOW, _IOWR
from kvm_util.uapi import KVMIO

# <asm/unistd_64.h>
SYS_SET_MEMPOLICY = 238
SYS_USERFAULTFD = 323

# <asm/kvm.h>: page offset of the dirty ring in the vCPU's file
KVM_DIRTY_LOG_PAGE_OFFSET = 64


class kvm_regs(Structure):
    _fields_ = tuple(
        (name, c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
        )
    )


class kvm_segment(Structure):
    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    )


class kvm_dtable(Structure):
    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


class kvm_sregs(Structure):
    _fields_ = (
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        *((name, kvm_dtable) for name in ("gdt", "idt")),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    )


class kvm_cpuid_entry2(Structure):
    _fields_ = (
        ("function", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32 * 3),
    )


class kvm_cpuid2(Structure):
    """Header of a variable-length table; *nent* times ``kvm_cpuid_entry2`` follow."""

    _fields_ = (("nent", c_uint32), ("padding", c_uint32))


class kvm_msr_entry(Structure):
    _fields_ = (("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64))


class kvm_msrs(Structure):
    """Header of a variable-length table; *nmsrs* times ``kvm_msr_entry`` follow."""

    _fields_ = (("nmsrs", c_uint32), ("pad", c_uint32))


class kvm_clock_data(Structure):
    _fields_ = (
        ("clock", c_uint64),
        ("flags", c_uint32),
        ("pad0", c_uint32),
        ("realtime", c_uint64),
        ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    )


class kvm_vapic_addr(Structure):
    _fields_ = (("vapic_addr", c_uint64),)


class kvm_xen_hvm_config(Structure):
    _fields_ = (
        ("flags", c_uint32),
        ("msr", c_uint32),
        ("blob_addr_32", c_uint64),
        ("blob_addr_64", c_uint64),
        ("blob_size_32", c_uint8),
        ("blob_size_64", c_uint8),
        ("pad2", c_uint8 * 30),
    )


class kvm_xen_hvm_attr(Structure):
    """Argument of KVM_XEN_HVM_SET_ATTR; the 64-byte union ``u`` begins with the value."""

    _fields_ = (("type", c_uint16), ("pad", c_uint16 * 3), ("u", c_uint64 * 8))


class kvm_xen_vcpu_attr(Structure):
    """Argument of KVM_XEN_VCPU_SET_ATTR; the 64-byte union ``u`` begins with the gpa."""

    _fields_ = (("type", c_uint16), ("pad", c_uint16 * 3), ("u", c_uint64 * 8))


class kvm_nested_state(Structure):
    """Header of the state; ``hdr`` is a union of 120 bytes, and the data depend on the vendor."""

    _fields_ = (("flags", c_uint16), ("format", c_uint16), ("size", c_uint32), ("hdr", c_uint64 * 15))


KVM_CAP_IRQCHIP = 0
KVM_CAP_MMU_SHADOW_CACHE_CONTROL = 2
KVM_CAP_VAPIC = 6
KVM_CAP_XEN_HVM = 38
KVM_CAP_HYPERV = 44
KVM_CAP_KVMCLOCK_CTRL = 76
KVM_CAP_X86_SMM = 117
KVM_CAP_HYPERV_SYNIC = 123
KVM_CAP_HYPERV_SYNIC2 = 148
KVM_CAP_NESTED_STATE = 157

KVM_STATE_NESTED_GUEST_MODE = 1 << 0

KVM_X86_QUIRK_SLOT_ZAP_ALL = 1 << 7

KVM_XEN_HVM_CONFIG_HYPERCALL_MSR = 1 << 0
KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL = 1 << 1
KVM_XEN_HVM_CONFIG_SHARED_INFO = 1 << 2
KVM_XEN_HVM_CONFIG_RUNSTATE = 1 << 3
KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG = 1 << 6
KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG = 5
KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO = 0
KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO = 1
KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR = 2

KVM_GET_SUPPORTED_CPUID = _IOWR(KVMIO, 0x05, kvm_cpuid2)
KVM_SET_NR_MMU_PAGES = _IO(KVMIO, 0x44)
KVM_SET_TSS_ADDR = _IO(KVMIO, 0x47)
KVM_SET_IDENTITY_MAP_ADDR = _IOW(KVMIO, 0x48, c_uint64)
KVM_CREATE_IRQCHIP = _IO(KVMIO, 0x60)
KVM_XEN_HVM_CONFIG = _IOW(KVMIO, 0x7A, kvm_xen_hvm_config)
KVM_SET_CLOCK = _IOW(KVMIO, 0x7B, kvm_clock_data)
KVM_GET_REGS = _IOR(KVMIO, 0x81, kvm_regs)
KVM_SET_REGS = _IOW(KVMIO, 0x82, kvm_regs)
KVM_GET_SREGS = _IOR(KVMIO, 0x83, kvm_sregs)
KVM_SET_SREGS = _IOW(KVMIO, 0x84, kvm_sregs)
KVM_GET_MSRS = _IOWR(KVMIO, 0x88, kvm_msrs)
KVM_SET_MSRS = _IOW(KVMIO, 0x89, kvm_msrs)
KVM_SET_CPUID2 = _IOW(KVMIO, 0x90, kvm_cpuid2)
KVM_SET_VAPIC_ADDR = _IOW(KVMIO, 0x93, kvm_vapic_addr)
KVM_KVMCLOCK_CTRL = _IO(KVMIO, 0xAD)
KVM_SMI = _IO(KVMIO, 0xB7)
KVM_GET_NESTED_STATE = _IOWR(KVMIO, 0xBE, kvm_nested_state)
KVM_SET_NESTED_STATE = _IOW(KVMIO, 0xBF, kvm_nested_state)
KVM_XEN_HVM_SET_ATTR = _IOW(KVMIO, 0xC9, kvm_xen_hvm_attr)
KVM_XEN_VCPU_SET_ATTR = _IOW(KVMIO, 0xCB, kvm_xen_vcpu_attr)
