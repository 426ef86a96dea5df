# SPDX-License-Identifier: GPL-2.0-only
"""vCPU state: entering 64-bit mode, descriptor tables, registers, and decoding a guest's calls and exceptions."""

import ctypes
import errno
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvm_util import uapi
from kvm_util.arch.x86_64.cpuid import Cpuid
from kvm_util.arch.x86_64.uapi import (
    KVM_CAP_XEN_HVM,
    KVM_CREATE_IRQCHIP,
    KVM_GET_MSRS,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_SET_CPUID2,
    KVM_SET_MSRS,
    KVM_SET_REGS,
    KVM_SET_SREGS,
    KVM_XEN_HVM_CONFIG,
    kvm_msr_entry,
    kvm_msrs,
    kvm_regs,
    kvm_segment,
    kvm_sregs,
    kvm_xen_hvm_config,
)
from kvm_util.ioctl import fail, ioctl, raw_ioctl

# Symbol of the I/O port that the guest program makes its calls on
UCALL_PORT_SYMBOL = "UCALL_PORT"

_CODE_SELECTOR, _DATA_SELECTOR, _TSS_SELECTOR = 0x08, 0x10, 0x18
_CODE_TYPE, _DATA_TYPE, _TSS_TYPE, _BUSY_TSS_TYPE = 0xB, 0x3, 0x9, 0xB
_CODE_DESCRIPTOR, _DATA_DESCRIPTOR = 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
# Descriptors for a test's own GDT: code and data as in the one below, and a data segment with a clear accessed bit
SEGMENT_DESCRIPTORS = (_CODE_DESCRIPTOR, _DATA_DESCRIPTOR)
SEGMENT_NOT_ACCESSED = 0x00CF_9200_0000_FFFF
# As SEGMENT_DESCRIPTORS, for 32-bit mode
SEGMENT_DESCRIPTORS_32 = (0x00CF_9B00_0000_FFFF, _DATA_DESCRIPTOR)
_PRESENT, _TASK_GATE, _INTERRUPT_GATE = 0x80, 0x85, 0x8E
_GATE_SIZE = 16
_IDT_OFFSET = 0x100  # in the page that holds the GDT and, from here on, the IDT
_EXCEPTIONS = 32
_VECTORS = _EXCEPTIONS + 1  # plus INTERRUPT_VECTOR of guest.inc
_STUB_SPACING = 16
_TSS_SIZE = 0x68
_TSS_IST1 = 0x24

_CR0_PG, _CR4_PAE, _CR4_PSE = 1 << 31, 1 << 5, 1 << 4
_CR0 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1 << 1 | 1 << 0  # PG WP NE ET MP PE
_CR4 = 1 << 10 | 1 << 9 | 1 << 5  # OSXMMEXCPT OSFXSR PAE
_CR4_LA57 = 1 << 12
_EFER_LME, _EFER_LMA, _EFER_NX = 1 << 8, 1 << 10, 1 << 11
_RFLAGS_RESERVED = 1 << 1

# The MSR that Xen guests write to set up their hypercall page; the index does not matter here
_XEN_MSR = 0x40000000

_GENERAL_REGISTERS = [field[0] for field in kvm_regs._fields_]

_VECTOR_NAMES = {
    0: "#DE divide error",
    1: "#DB debug",
    3: "#BP breakpoint",
    4: "#OF overflow",
    5: "#BR bound range",
    6: "#UD invalid opcode",
    7: "#NM device not available",
    8: "#DF double fault",
    10: "#TS invalid TSS",
    11: "#NP segment not present",
    12: "#SS stack fault",
    13: "#GP general protection",
    14: "#PF page fault",
    16: "#MF x87",
    17: "#AC alignment check",
    18: "#MC machine check",
    19: "#XM SIMD",
}
_PAGE_FAULT = 14


@dataclass(frozen=True)
class GuestException:
    """An exception that the guest took; *address* is CR2, which only a page fault sets."""

    vector: int
    error_code: int
    rip: int
    rsp: int
    rflags: int
    address: int

    def __str__(self) -> str:
        name = _VECTOR_NAMES.get(self.vector, f"vector {self.vector}")
        text = f"{name}, error code {self.error_code:#x}, rip={self.rip:#x} rsp={self.rsp:#x} rflags={self.rflags:#x}"
        if self.vector == _PAGE_FAULT:
            cause = "protection" if self.error_code & 1 else "not mapped"
            access = "write" if self.error_code & 2 else "fetch" if self.error_code & 16 else "read"
            text += f", {access} of {self.address:#x} ({cause})"
        return text


def init_descriptor_tables(page: memoryview, symbols: Mapping[str, int]) -> None:
    """Write a GDT and an IDT into *page*, which must be zeroed; the IDT's gates lead to the guest program's stubs.

    Exceptions use IST entry 1, so that a guest with a bad stack pointer can still report them.

    :param symbols: of the guest program
    """
    struct.pack_into("<3Q", page, 0, 0, _CODE_DESCRIPTOR, _DATA_DESCRIPTOR)
    stubs = symbols["exception_stubs"]
    targets = [(stubs + vector * _STUB_SPACING, 1) for vector in range(_EXCEPTIONS)] + [
        (symbols["interrupt_handler"], 0)
    ]
    for vector, (target, ist) in enumerate(targets):
        gate = (target & 0xFFFF, _CODE_SELECTOR, ist, _INTERRUPT_GATE, target >> 16 & 0xFFFF, target >> 32, 0)
        struct.pack_into("<HHBBHII", page, _IDT_OFFSET + vector * _GATE_SIZE, *gate)


def init_vcpu(
    vcpu_fd: int, cpuid: Cpuid, levels: int, root: int, tables: int, tss: tuple[int, memoryview],
    entry: int, stack: int, exception_stack: int, argument: int,
) -> None:  # fmt: skip
    """Put a new vCPU into 64-bit mode at *entry*, with *argument* in rdi. All addresses are guest-physical.

    EFER.NX is set only if *cpuid* has it: some backends reject unsupported bits with EINVAL.

    :param levels: of the page tables, 4 or 5
    :param root: the root page table
    :param tables: the page that :func:`init_descriptor_tables` filled
    :param tss: address and contents of a zeroed page for the task state segment
    :param stack: top of the stack, as for *exception_stack*
    """
    ioctl(vcpu_fd, KVM_SET_CPUID2, "KVM_SET_CPUID2", cpuid.buffer)
    tss_address, tss_memory = tss
    struct.pack_into("<Q", tss_memory, _TSS_IST1, exception_stack)

    sregs = get_sregs(vcpu_fd)
    sregs.cr0, sregs.cr3, sregs.cr4 = _CR0, root, _CR4
    if levels == 5:
        sregs.cr4 |= _CR4_LA57
    sregs.efer = _EFER_LME | _EFER_LMA | (_EFER_NX if cpuid.has_nx() else 0)
    sregs.cs = _segment(_CODE_SELECTOR, _CODE_TYPE, l=1)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, _segment(_DATA_SELECTOR, _DATA_TYPE, db=1))
    sregs.tr = kvm_segment(
        base=tss_address, limit=_TSS_SIZE - 1, selector=_TSS_SELECTOR, type=_BUSY_TSS_TYPE, present=1
    )
    sregs.ldt = kvm_segment(unusable=1)
    sregs.gdt.base, sregs.gdt.limit = tables, _IDT_OFFSET - 1
    sregs.idt.base, sregs.idt.limit = tables + _IDT_OFFSET, _VECTORS * _GATE_SIZE - 1
    ioctl(vcpu_fd, KVM_SET_SREGS, "KVM_SET_SREGS", ctypes.byref(sregs), f"cr0={sregs.cr0:#x}, cr4={sregs.cr4:#x}")

    regs = kvm_regs(rip=entry, rsp=stack, rdi=argument, rflags=_RFLAGS_RESERVED)
    ioctl(vcpu_fd, KVM_SET_REGS, "KVM_SET_REGS", ctypes.byref(regs))


def enter_32bit_mode(vcpu_fd: int, root: int | None, pae: bool = False) -> None:
    """Put a vCPU that :func:`init_vcpu` has set up, and that has not run yet, into 32-bit protected mode with flat segments.

    :param root: gpa of the page tables, below 4 GiB; None for no paging
    :param pae: whether they are those of PAE paging; else those of 32-bit paging, with pages of 4 MiB allowed
    """
    sregs = get_sregs(vcpu_fd)
    sregs.efer = 0
    sregs.cr0 = _CR0 if root is not None else _CR0 & ~_CR0_PG
    sregs.cr3, sregs.cr4 = root or 0, _CR4_PAE if pae else _CR4_PSE
    sregs.cs = _segment(_CODE_SELECTOR, _CODE_TYPE, db=1)
    ioctl(vcpu_fd, KVM_SET_SREGS, "KVM_SET_SREGS", ctypes.byref(sregs), f"cr0={sregs.cr0:#x}, cr4={sregs.cr4:#x}")


def tss_descriptor(base: int, busy: bool = False) -> int:
    """The GDT's descriptor of a 32-bit task state segment at the linear address *base*."""
    kind = _PRESENT | (_BUSY_TSS_TYPE if busy else _TSS_TYPE)
    return (base >> 24) << 56 | kind << 40 | (base & 0xFF_FFFF) << 16 | _TSS_SIZE - 1


def task_gate(selector: int) -> int:
    """A 32-bit IDT gate to the task whose segment has this *selector*."""
    return _TASK_GATE << 40 | selector << 16


def enter_task(vcpu_fd: int, gdt: tuple[int, int], idt: tuple[int, int], selector: int, tss: int) -> None:
    """Give a vCPU in 32-bit mode other descriptor tables, and make it run in a task; its other state stays.

    :param gdt: linear address and size of the table, as for *idt*
    :param selector: of the descriptor of the task's segment, which must be busy
    :param tss: linear address of that segment
    """
    sregs = get_sregs(vcpu_fd)
    (sregs.gdt.base, gdt_size), (sregs.idt.base, idt_size) = gdt, idt
    sregs.gdt.limit, sregs.idt.limit = gdt_size - 1, idt_size - 1
    sregs.tr = kvm_segment(base=tss, limit=_TSS_SIZE - 1, selector=selector, type=_BUSY_TSS_TYPE, present=1)
    ioctl(vcpu_fd, KVM_SET_SREGS, "KVM_SET_SREGS", ctypes.byref(sregs), f"tr.selector={selector:#x}")


def accepts_la57(vcpu_fd: int, cpuid: Cpuid) -> bool:
    """Whether KVM accepts 5-level paging for a new vCPU, whose state it changes."""
    ioctl(vcpu_fd, KVM_SET_CPUID2, "KVM_SET_CPUID2", cpuid.buffer)
    sregs = get_sregs(vcpu_fd)
    sregs.cr0, sregs.cr4, sregs.efer = _CR0, _CR4 | _CR4_LA57, _EFER_LME | _EFER_LMA
    sregs.cs = _segment(_CODE_SELECTOR, _CODE_TYPE, l=1)
    result, code = raw_ioctl(vcpu_fd, KVM_SET_SREGS, ctypes.byref(sregs))
    if result < 0 and code != errno.EINVAL:
        fail(code, "KVM_SET_SREGS", f"cr4={sregs.cr4:#x}")
    return result >= 0


def _segment(selector: int, kind: int, l: int = 0, db: int = 0) -> kvm_segment:  # noqa: E741 (the descriptor bit's name)
    return kvm_segment(limit=0xFFFF_FFFF, selector=selector, type=kind, present=1, s=1, g=1, l=l, db=db)


def get_regs(vcpu_fd: int) -> kvm_regs:
    """KVM_GET_REGS."""
    regs = kvm_regs()
    ioctl(vcpu_fd, KVM_GET_REGS, "KVM_GET_REGS", ctypes.byref(regs))
    return regs


def get_sregs(vcpu_fd: int) -> kvm_sregs:
    """KVM_GET_SREGS."""
    sregs = kvm_sregs()
    ioctl(vcpu_fd, KVM_GET_SREGS, "KVM_GET_SREGS", ctypes.byref(sregs))
    return sregs


def create_irqchip(vm_fd: int) -> None:
    """KVM_CREATE_IRQCHIP: in-kernel interrupt controllers, for a VM without vCPUs (api.rst 4.24)."""
    ioctl(vm_fd, KVM_CREATE_IRQCHIP, "KVM_CREATE_IRQCHIP")


def use_static_key_features(kvm_fd: int, vm_fd: int) -> None:
    """Enable the features of a VM without vCPUs for which KVM has static keys: local APICs and Xen.

    The keys are apic_sw_disabled (arch/x86/kvm/lapic.c) and kvm_xen_enabled (arch/x86/kvm/xen.c). They stay enabled as long
    as the VM exists. A third key, kvm_has_noapic_vcpu, is enabled by a vCPU without a local APIC.
    """
    create_irqchip(vm_fd)
    if ioctl(kvm_fd, uapi.KVM_CHECK_EXTENSION, "KVM_CHECK_EXTENSION", KVM_CAP_XEN_HVM):
        config = kvm_xen_hvm_config(msr=_XEN_MSR)
        ioctl(vm_fd, KVM_XEN_HVM_CONFIG, "KVM_XEN_HVM_CONFIG", ctypes.byref(config))


def set_msr(vcpu_fd: int, index: int, value: int) -> None:
    """KVM_SET_MSRS for one MSR; the vCPU must not be running (api.rst 4.19).

    :raises KvmError: the ioctl failed
    :raises ValueError: KVM rejects the MSR or the value
    """
    request = bytes(kvm_msrs(nmsrs=1)) + bytes(kvm_msr_entry(index=index, data=value))
    if not ioctl(vcpu_fd, KVM_SET_MSRS, "KVM_SET_MSRS", request, f"index={index:#x}, data={value:#x}"):
        raise ValueError(f"KVM_SET_MSRS: KVM rejects {value:#x} for MSR {index:#x}")


def get_msr(fd: int, index: int) -> int:
    """KVM_GET_MSRS for one MSR (api.rst 4.18).

    :param fd: of a vCPU, or of KVM for an MSR that shows what KVM offers
    :raises KvmError: the ioctl failed
    :raises ValueError: there is no such MSR
    """
    request = ctypes.create_string_buffer(bytes(kvm_msrs(nmsrs=1)) + bytes(kvm_msr_entry(index=index)))
    if not ioctl(fd, KVM_GET_MSRS, "KVM_GET_MSRS", request, f"index={index:#x}"):
        raise ValueError(f"KVM_GET_MSRS: KVM has no MSR {index:#x}")
    return int(kvm_msr_entry.from_buffer(request, ctypes.sizeof(kvm_msrs)).data)


def decode_ucall(run: uapi.kvm_run, port: int) -> int | None:
    """The command number of the guest's call if the last exit was one, else None."""
    if run.exit_reason == uapi.KVM_EXIT_IO and run.io.direction == uapi.KVM_EXIT_IO_OUT and run.io.port == port:
        data = ctypes.string_at(ctypes.addressof(run) + run.io.data_offset, run.io.size)
        return int.from_bytes(data, "little")
    return None


def abort_arguments(vcpu_fd: int) -> tuple[int, int, int]:
    """The arguments of UCALL_ABORT: the address of the message, and two values."""
    regs = get_regs(vcpu_fd)
    return regs.rsi, regs.rdx, regs.rcx


def decode_exception(vcpu_fd: int, read: Callable[[int, int], bytes]) -> GuestException:
    """Decode UCALL_EXCEPTION from the frame that the exception stub has built on the guest's stack."""
    frame = get_regs(vcpu_fd).rsp
    _rax, vector, error_code, rip, _cs, rflags, rsp = struct.unpack("<7Q", read(frame, 56))
    return GuestException(vector, error_code, rip, rsp, rflags, get_sregs(vcpu_fd).cr2)


def describe_registers(vcpu_fd: int) -> str:
    """The vCPU's registers as text, four per line; the vCPU must not be running."""
    regs, sregs = get_regs(vcpu_fd), get_sregs(vcpu_fd)
    values = [(name, getattr(regs, name)) for name in _GENERAL_REGISTERS]
    values += [(name, getattr(sregs, name)) for name in ("cr0", "cr2", "cr3", "cr4", "efer")]
    lines = [values[i : i + 4] for i in range(0, len(values), 4)]
    return "\n".join(" ".join(f"{name:>6}={value:016x}" for name, value in line) for line in lines)
