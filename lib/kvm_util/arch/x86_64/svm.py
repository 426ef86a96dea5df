# SPDX-License-Identifier: GPL-2.0-only
"""The VMCB, which a guest fills in to run a nested guest with SVM (AMD APM volume 2, appendix B)."""

import struct

from kvm_util.arch.x86_64.msr import EFER_SVME
from kvm_util.arch.x86_64.uapi import kvm_segment, kvm_sregs

_SIZE = 4096
# The control area
_INTERCEPT_MISC2 = 0x10
_ASID = 0x58
_TLB_CONTROL = 0x5C
_EXIT_CODE = 0x70
_NESTED_PAGING = 0x90
_NESTED_ROOT = 0xB0
# The state-save area
_SEGMENTS = {"es": 0x400, "cs": 0x410, "ss": 0x420, "ds": 0x430}
_GDTR = 0x460
_IDTR = 0x480
_EFER = 0x4D0
_CR4 = 0x548  # then CR3, CR0, DR7
_DR6 = 0x568  # then RFLAGS, RIP
_RSP = 0x5D8
_PAT = 0x668

_VMRUN, _VMMCALL = 1 << 0, 1 << 1  # bits of _INTERCEPT_MISC2
_FLUSH_ALL = 1  # of _TLB_CONTROL
_RFLAGS_RESERVED, _DR6_RESERVED, _DR7_RESERVED = 1 << 1, 0xFFFF0FF0, 1 << 10
_PAT_AT_RESET = 0x0007040600070406
# Exit code of an intercepted vmmcall (appendix C)
VMEXIT_VMMCALL = 0x81


def fill_vmcb(vmcb: memoryview, sregs: kvm_sregs, rip: int, rsp: int, nested_root: int | None, flush_tlb: bool) -> None:
    """Set up *vmcb* for a nested guest that starts at *rip*, in the mode and address space of *sregs*.

    Only vmrun and vmmcall are intercepted; the nested guest takes its own interrupts and exceptions.

    :param sregs: of the vCPU that runs it
    :param nested_root: gpa of the root of the nested page tables; None to run without nested paging
    :param flush_tlb: forget what the TLB has of earlier runs, as is needed after a change of the nested page tables
    """
    vmcb[:] = bytes(_SIZE)

    def put(layout: str, offset: int, *values: int) -> None:
        struct.pack_into("<" + layout, vmcb, offset, *values)

    put("I", _INTERCEPT_MISC2, _VMRUN | _VMMCALL)
    put("I", _ASID, 1)
    put("B", _TLB_CONTROL, _FLUSH_ALL if flush_tlb else 0)
    if nested_root is not None:
        put("Q", _NESTED_PAGING, 1)
        put("Q", _NESTED_ROOT, nested_root)
    for name, offset in _SEGMENTS.items():
        segment = getattr(sregs, name)
        put("HHIQ", offset, segment.selector, _attributes(segment), segment.limit, segment.base)
    for offset, table in ((_GDTR, sregs.gdt), (_IDTR, sregs.idt)):
        put("HHIQ", offset, 0, 0, table.limit, table.base)
    put("Q", _EFER, sregs.efer | EFER_SVME)
    put("4Q", _CR4, sregs.cr4, sregs.cr3, sregs.cr0, _DR7_RESERVED)
    put("3Q", _DR6, _DR6_RESERVED, _RFLAGS_RESERVED, rip)
    put("Q", _RSP, rsp)
    put("Q", _PAT, _PAT_AT_RESET)


def exit_code(vmcb: memoryview) -> int:
    """The exit code of the last #VMEXIT (AMD APM volume 2, appendix C)."""
    code: int = struct.unpack_from("<Q", vmcb, _EXIT_CODE)[0]
    return code


def _attributes(segment: kvm_segment) -> int:
    """A segment's attributes in the VMCB's packed format."""
    fields = ((segment.type, 0), (segment.s, 4), (segment.dpl, 5), (segment.present, 7), (segment.avl, 8))
    return sum(value << shift for value, shift in (*fields, (segment.l, 9), (segment.db, 10), (segment.g, 11)))
