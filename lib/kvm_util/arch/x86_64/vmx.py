# SPDX-License-Identifier: GPL-2.0-only
"""The fields of the VMCS, which a guest writes to run a nested guest with VMX (Intel SDM volume 3, appendices A and B)."""

from kvm_util.arch.x86_64.uapi import kvm_segment, kvm_sregs
from kvm_util.arch.x86_64.vcpu_state import get_msr

_MSR_BASIC, _MSR_SECONDARY, _MSR_EPT_CAPABILITIES = 0x480, 0x48B, 0x48C
_MSR_PIN, _MSR_PRIMARY, _MSR_EXIT, _MSR_ENTRY = 0x48D, 0x48E, 0x48F, 0x490  # the "true" ones, which KVM always has
_REVISION = 0x7FFF_FFFF  # of _MSR_BASIC
_CAN_SET_ACCESSED_AND_DIRTY = 1 << 21  # of _MSR_EPT_CAPABILITIES

_PIN, _PRIMARY, _EXIT, _ENTRY, _SECONDARY = 0x4000, 0x4002, 0x400C, 0x4012, 0x401E
_USE_SECONDARY = 1 << 31  # of _PRIMARY
_EPT = 1 << 1  # of _SECONDARY
_64BIT_HOST, _64BIT_GUEST = 1 << 9, 1 << 9  # of _EXIT and _ENTRY
_EPT_POINTER = 0x201A
_EPTP_WRITE_BACK, _EPTP_4_LEVELS, _EPTP_ACCESSED_AND_DIRTY = 6, 3 << 3, 1 << 6
_LINK_POINTER, _NO_LINK = 0x2800, (1 << 64) - 1

# The first of the fields of all segments, which are two apart
_GUEST_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr")
_SELECTOR, _LIMIT, _ACCESS_RIGHTS, _BASE = 0x0800, 0x4800, 0x4814, 0x6806
_HOST_SELECTORS = ("es", "cs", "ss", "ds", "fs", "gs", "tr")
_HOST_SELECTOR = 0x0C00
_GDTR_LIMIT, _IDTR_LIMIT, _GDTR_BASE, _IDTR_BASE = 0x4810, 0x4812, 0x6816, 0x6818
# CR0, then CR3 and CR4
_GUEST_CR, _HOST_CR = 0x6800, 0x6C00
_DR7, _RSP, _RIP, _RFLAGS = 0x681A, 0x681C, 0x681E, 0x6820
_HOST_FS_BASE, _HOST_GS_BASE, _HOST_TR_BASE, _HOST_GDTR_BASE, _HOST_IDTR_BASE = range(0x6C06, 0x6C10, 2)
_DR7_RESERVED, _RFLAGS_RESERVED = 1 << 10, 1 << 1

# Of an entry of the nested page tables that maps a page: the memory type write-back
EPT_WRITE_BACK = 6 << 3
# Basic exit reason of VMCALL (appendix C)
EXIT_VMCALL = 18


def revision(fd: int) -> int:
    """The revision identifier, with which VMXON region and VMCS begin.

    :param fd: of KVM, or of a vCPU
    """
    return get_msr(fd, _MSR_BASIC) & _REVISION


def has_ept(fd: int) -> bool:
    """Whether nested guests can use nested page tables; *fd* as for :func:`revision`."""
    return bool(get_msr(fd, _MSR_SECONDARY) >> 32 & _EPT)


def sets_accessed_and_dirty(fd: int) -> bool:
    """Whether there are accessed and dirty bits in nested page tables; *fd* as for :func:`revision`."""
    return bool(get_msr(fd, _MSR_EPT_CAPABILITIES) & _CAN_SET_ACCESSED_AND_DIRTY)


def vmcs_fields(fd: int, sregs: kvm_sregs, rip: int, rsp: int, nested_root: int | None) -> dict[int, int]:
    """The fields of a nested guest that starts at *rip*, in the mode and address space of *sregs*; the others are to be 0.

    Only what always exits does exit; the nested guest takes its own interrupts and exceptions. Stack pointer and rip of the
    guest that runs it are missing.

    :param fd: as for :func:`revision`
    :param sregs: of the vCPU that runs it
    :param nested_root: gpa of the root of the nested page tables, which have 4 levels; None to run without nested paging
    """
    fields = {
        _PIN: _controls(fd, _MSR_PIN, 0),
        _PRIMARY: _controls(fd, _MSR_PRIMARY, 0 if nested_root is None else _USE_SECONDARY),
        _EXIT: _controls(fd, _MSR_EXIT, _64BIT_HOST),
        _ENTRY: _controls(fd, _MSR_ENTRY, _64BIT_GUEST),
        _LINK_POINTER: _NO_LINK,
    }
    if nested_root is not None:
        marks = _EPTP_ACCESSED_AND_DIRTY if sets_accessed_and_dirty(fd) else 0
        fields[_SECONDARY] = _controls(fd, _MSR_SECONDARY, _EPT)
        fields[_EPT_POINTER] = nested_root | _EPTP_WRITE_BACK | _EPTP_4_LEVELS | marks
    for index, name in enumerate(_GUEST_SEGMENTS):
        segment = getattr(sregs, name)
        fields[_SELECTOR + 2 * index] = segment.selector
        fields[_LIMIT + 2 * index] = segment.limit
        fields[_ACCESS_RIGHTS + 2 * index] = _access_rights(segment)
        fields[_BASE + 2 * index] = segment.base
    for index, name in enumerate(_HOST_SELECTORS):
        fields[_HOST_SELECTOR + 2 * index] = getattr(sregs, name).selector
    for index, value in enumerate((sregs.cr0, sregs.cr3, sregs.cr4)):
        fields[_GUEST_CR + 2 * index] = fields[_HOST_CR + 2 * index] = value
    fields |= {_GDTR_LIMIT: sregs.gdt.limit, _IDTR_LIMIT: sregs.idt.limit}
    fields |= {_GDTR_BASE: sregs.gdt.base, _IDTR_BASE: sregs.idt.base}
    fields |= {_HOST_GDTR_BASE: sregs.gdt.base, _HOST_IDTR_BASE: sregs.idt.base}
    fields |= {_HOST_FS_BASE: sregs.fs.base, _HOST_GS_BASE: sregs.gs.base, _HOST_TR_BASE: sregs.tr.base}
    return fields | {_DR7: _DR7_RESERVED, _RSP: rsp, _RIP: rip, _RFLAGS: _RFLAGS_RESERVED}


def _controls(fd: int, msr: int, wanted: int) -> int:
    """The value of a field of controls: those *wanted*, and those that must be set (appendix A.2 to A.5)."""
    capability = get_msr(fd, msr)
    return (wanted | capability & 0xFFFF_FFFF) & capability >> 32


def _access_rights(segment: kvm_segment) -> int:
    """A segment's access rights in the VMCS's format."""
    fields = ((segment.type, 0), (segment.s, 4), (segment.dpl, 5), (segment.present, 7), (segment.avl, 12))
    more = ((segment.l, 13), (segment.db, 14), (segment.g, 15), (segment.unusable, 16))
    return sum(value << shift for value, shift in (*fields, *more))
