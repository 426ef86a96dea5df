# SPDX-License-Identifier: GPL-2.0-only
"""Make a VM, run a guest that stores to two pages, and read the dirty bitmap of their memslot."""

from kvm_util import GuestProgram, GuestVm, Kvm, uapi

SLOT, NPAGES, GPA, GVA = 1, 128, 1 << 30, 1 << 40
PROGRAM = """
    .include "guest.inc"
    .globl guest_main
guest_main:                         # %rdi is the argument of add_vcpu()
    movq $1, 0x3000(%rdi)           # page 3 of the slot
    movq $1, 0x7000(%rdi)           # page 7
    ucall UCALL_DONE
"""

with Kvm() as kvm, GuestVm(kvm, GuestProgram.from_source("two_stores", PROGRAM)) as guest:
    guest.vm.add_memory(SLOT, GPA, NPAGES * 4096, flags=uapi.KVM_MEM_LOG_DIRTY_PAGES)
    guest.map_test_memory(GVA, GPA, NPAGES * 4096)
    guest.run_until_ucall(guest.add_vcpu(argument=GVA))
    bitmap = bytearray(NPAGES // 8)
    guest.vm.get_dirty_log(SLOT, bitmap)

print([page for page in range(NPAGES) if bitmap[page // 8] >> page % 8 & 1])  # [3, 7]
