# SPDX-License-Identifier: GPL-2.0-only
"""Model-specific registers by which a guest or user space has KVM write into the guest's memory, or have guests of its own.

KVM's own are those of ``<asm/kvm_para.h>`` (Documentation/virt/kvm/x86/msr.rst), Hyper-V's those of its Top Level
Functional Specification.
"""

MSR_IA32_APICBASE = 0x1B
X2APIC_ENABLE = 1 << 11 | 1 << 10
X2APIC_SPIV = 0x80F
X2APIC_SELF_IPI = 0x83F
APIC_SPIV_APIC_ENABLED = 1 << 8

MSR_EFER = 0xC0000080
MSR_KERNEL_GS_BASE = 0xC0000102
MSR_VM_HSAVE_PA = 0xC0010117
EFER_SVME = 1 << 12

MSR_KVM_WALL_CLOCK_NEW = 0x4B564D00
MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01
MSR_KVM_ASYNC_PF_EN = 0x4B564D02
MSR_KVM_STEAL_TIME = 0x4B564D03
MSR_KVM_PV_EOI_EN = 0x4B564D04
MSR_KVM_ASYNC_PF_INT = 0x4B564D06
MSR_KVM_ASYNC_PF_ACK = 0x4B564D07
KVM_MSR_ENABLED = 1 << 0
KVM_ASYNC_PF_SEND_ALWAYS = 1 << 1
KVM_ASYNC_PF_DELIVERY_AS_INT = 1 << 3

HV_X64_MSR_GUEST_OS_ID = 0x40000000
HV_X64_MSR_HYPERCALL = 0x40000001
HV_X64_MSR_REFERENCE_TSC = 0x40000021
HV_X64_MSR_VP_ASSIST_PAGE = 0x40000073
HV_X64_MSR_SCONTROL = 0x40000080
HV_X64_MSR_SIMP = 0x40000083
HV_X64_MSR_SINT0 = 0x40000090
HV_X64_MSR_STIMER0_CONFIG = 0x400000B0
HV_X64_MSR_STIMER0_COUNT = 0x400000B1
# Of a timer's configuration (union hv_stimer_config of the kernel's): .enable, and where .sintx begins. Without .periodic it
# expires once.
HV_STIMER_ENABLE = 1 << 0
HV_STIMER_SINT_SHIFT = 16
