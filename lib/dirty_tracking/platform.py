# SPDX-License-Identifier: GPL-2.0-only
"""How this host's KVM logs dirty pages, which follows from the facts that :mod:`kvm_util.host` has: PML, TDP, splitting."""

from kvm_util.host import Host

# Entries of a ring that KVM keeps in reserve on any CPU: KVM_DIRTY_RING_RSVD_ENTRIES (include/linux/kvm_dirty_ring.h)
KVM_RESERVED = 64


def uses_pml(host: Host) -> bool:
    """Whether the CPU logs dirty pages into a buffer of its own (Intel's page-modification logging)."""
    return host.parameters.get("kvm_intel.pml") == "Y"


def reserved_entries(host: Host) -> int:
    """How many entries of a ring KVM keeps in reserve: a ring is full when no more than these are free.

    KVM_RESERVED, and as many as the PML buffer holds, which one exit may bring
    (kvm_dirty_ring_get_rsvd_entries(), virt/kvm/dirty_ring.c; PML_ENTITY_NUM, arch/x86/kvm/vmx/vmx.h).
    """
    return KVM_RESERVED + (512 if uses_pml(host) else 0)


def ring_order_is_write_order(host: Host) -> bool:
    """Whether a ring has its entries in the order of the writes.

    With PML the entries of one exit came in the opposite order until Linux 6.14 ("KVM: VMX: read the PML log in the same order
    as it was written").
    """
    return not uses_pml(host) or host.kernel_version >= (6, 14)


def uses_tdp(host: Host) -> bool:
    """Whether the CPU itself translates guest-physical addresses (EPT, NPT), and KVM has no page tables to shadow."""
    return any(host.parameters.get(name) in ("Y", "1") for name in ("kvm_intel.ept", "kvm_amd.npt"))


def splits_eagerly(host: Host) -> bool:
    """Whether KVM splits all huge pages when dirty logging is enabled, and not each when it is written.

    That is for the TDP MMU only (``kvm_mmu_slot_try_split_huge_pages()``, arch/x86/kvm/mmu/mmu.c).
    """
    parameters = host.parameters
    return uses_tdp(host) and parameters.get("kvm.tdp_mmu") == "Y" and parameters.get("kvm.eager_page_split") == "Y"
