# SPDX-License-Identifier: GPL-2.0-only
"""x86-64: the names that architecture-neutral code uses."""

from kvm_util.arch.x86_64.cpuid import (
    Cpuid,
    cpu_model,
    cpu_vendor,
    get_supported_cpuid,
    guest_phys_limit,
    has_xsave,
    vector_stores,
)
from kvm_util.arch.x86_64.paging import GUEST_MODES, PAGE_SIZE, GuestMode, PageTables
from kvm_util.arch.x86_64.uapi import (
    KVM_DIRTY_LOG_PAGE_OFFSET,
    KVM_X86_QUIRK_SLOT_ZAP_ALL,
    SYS_SET_MEMPOLICY,
    SYS_USERFAULTFD,
)
from kvm_util.arch.x86_64.vcpu_state import (
    SEGMENT_DESCRIPTORS,
    SEGMENT_NOT_ACCESSED,
    UCALL_PORT_SYMBOL,
    GuestException,
    abort_arguments,
    create_irqchip,
    decode_exception,
    decode_ucall,
    describe_registers,
    get_regs,
    get_sregs,
    init_descriptor_tables,
    init_vcpu,
    set_msr,
    use_static_key_features,
)
from kvm_util.memory import GIB, KIB, MIB

NAME = "x86_64"

# Loads are not reordered with loads, nor stores with earlier loads and stores (Intel SDM volume 3, "Memory Ordering";
# AMD APM volume 2, section 7.2). On such a machine plain accesses in program order are the load-acquire and
# store-release that the dirty ring's protocol asks for (api.rst, dirty ring); on others Python has no such access.
TOTAL_STORE_ORDER = True

# The VM's statistics that count its mappings of a size: kvm_vm_stats_desc, arch/x86/kvm/x86.c
MAPPING_STATISTICS = {4 * KIB: "pages_4k", 2 * MIB: "pages_2m", GIB: "pages_1g"}

# What a function is that only returns: RET
RETURN_INSTRUCTION = b"\xc3"

# The quirk (KVM_CAP_DISABLE_QUIRKS2) by which KVM zaps the SPTEs of all memslots when one is deleted or moved
SLOT_ZAP_ALL_QUIRK = KVM_X86_QUIRK_SLOT_ZAP_ALL

# Whether KVM writes guest memory without a running vCPU, and so needs a bitmap beside the rings (api.rst, dirty ring)
RING_WITH_BITMAP = False

__all__ = [
    "GUEST_MODES",
    "KVM_DIRTY_LOG_PAGE_OFFSET",
    "MAPPING_STATISTICS",
    "NAME",
    "PAGE_SIZE",
    "RETURN_INSTRUCTION",
    "RING_WITH_BITMAP",
    "SEGMENT_DESCRIPTORS",
    "SEGMENT_NOT_ACCESSED",
    "SLOT_ZAP_ALL_QUIRK",
    "SYS_SET_MEMPOLICY",
    "SYS_USERFAULTFD",
    "TOTAL_STORE_ORDER",
    "UCALL_PORT_SYMBOL",
    "Cpuid",
    "GuestException",
    "GuestMode",
    "PageTables",
    "abort_arguments",
    "cpu_model",
    "cpu_vendor",
    "create_irqchip",
    "decode_exception",
    "decode_ucall",
    "describe_registers",
    "get_regs",
    "get_sregs",
    "get_supported_cpuid",
    "guest_phys_limit",
    "has_xsave",
    "init_descriptor_tables",
    "init_vcpu",
    "set_msr",
    "use_static_key_features",
    "vector_stores",
]
