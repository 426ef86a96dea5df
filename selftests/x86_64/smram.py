# SPDX-License-Identifier: GPL-2.0-only
"""SMRAM with a handler of system management interrupts that writes to two pages, in a memslot of SMM's address space."""

from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util import uapi as kvm_uapi
from kvm_util.arch.x86_64 import uapi
from kvm_util.ioctl import ioctl
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS, GuestMemory
from kvm_util.vcpu import Vcpu

SLOT = 1
SMM = 1 << 16  # the address space's number, in bits 16 to 31 of a slot number
SMRAM_SLOT, SMM_SLOT = SMM | 2, SMM | SLOT
# Where a CPU has its SMRAM by default (Intel SDM volume 3, "SMRAM"): the handler begins at SMBASE + 0x8000, and the state is
# saved at the end of the 64 KiB
SMBASE, SMRAM_SIZE = 0x30000, 0x10000
HANDLER = SMBASE + 0x8000
HANDLER_PAGE, STATE_PAGE = (HANDLER - SMBASE) // PAGE, SMRAM_SIZE // PAGE - 1
PORT = 0xE1
FIRST, SECOND = 3, 7


def missing(kvm: Kvm) -> str | None:
    """Why this KVM has no system management mode; None if it has."""
    if kvm.check_extension(uapi.KVM_CAP_X86_SMM):
        return None
    return "no KVM_CAP_X86_SMM: this backend or kernel has no system management mode"


def handler() -> bytes:
    """Real-mode code that stores a byte to pages FIRST and SECOND of the memslot at FIRST_GPA, calls the host, and returns."""
    code = b""
    for page in (FIRST, SECOND):
        address = FIRST_GPA + page * PAGE
        code += b"\x66\xb8" + address.to_bytes(4, "little")  # mov $address, %eax
        code += b"\x67\xc6\x00\x5a"  # movb $0x5a, (%eax)
    return code + bytes((0xE6, PORT)) + b"\x0f\xaa"  # out %al, $PORT; rsm


def add_smm_slots(vm: ScriptedVm, npages: int) -> None:
    """Add SMRAM and a memslot at FIRST_GPA to the address space of SMM, both logged."""
    vm.add_slot(SMM_SLOT, FIRST_GPA, npages)
    smram = GuestMemory(BACKINGS["anonymous"], SMRAM_SIZE, SMBASE)
    smram.view[HANDLER - SMBASE : HANDLER - SMBASE + len(handler())] = handler()
    vm.vm.set_user_memory_region(SMRAM_SLOT, SMBASE, smram, kvm_uapi.KVM_MEM_LOG_DIRTY_PAGES)
    vm.collect()


def send_smi(vcpu: Vcpu) -> None:
    """KVM_SMI: have *vcpu* enter SMM when it runs next."""
    ioctl(vcpu.fd, uapi.KVM_SMI, "KVM_SMI")


def in_handler(vcpu: Vcpu) -> bool:
    """Whether the last exit is the handler's call of the host."""
    return vcpu.run.exit_reason == kvm_uapi.KVM_EXIT_IO and bool(vcpu.run.io.port == PORT)
