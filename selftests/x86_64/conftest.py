# SPDX-License-Identifier: GPL-2.0-only
"""Fixtures for the tests of nested guests: the L2 guest of nested.py."""

from collections.abc import Iterator

import pytest

from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import FIRST_GPA
from kvm_util.arch.x86_64.cpuid import has_nested_paging, has_svm
from kvm_util.kvm import Kvm
from selftests.x86_64.nested import NPAGES, OWN, OWN_GPA, RING, SLOT, NestedGuest


@pytest.fixture(params=[True, False], ids=["nested-paging", "no-nested-paging"])
def nested(request: pytest.FixtureRequest, kvm: Kvm) -> bool:
    """Whether L2 has nested page tables; skips where KVM does not offer that."""
    cpuid = kvm.supported_cpuid
    if not has_svm(cpuid):
        pytest.skip("KVM offers its guests no SVM here (CPUID SVM)")
    if request.param and not has_nested_paging(cpuid):
        pytest.skip("KVM offers its guests no nested paging here (CPUID NP)")
    return bool(request.param)


@pytest.fixture
def l2(kvm: Kvm, log_mode: str, nested: bool) -> Iterator[NestedGuest]:
    """An L2 guest that has run once, and has not accessed the logged test memslot yet."""
    with ScriptedVm(kvm, log_mode, ring_count=RING) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.add_slot(OWN, OWN_GPA, NPAGES, logged=False)
        guest = NestedGuest(vm, nested)
        guest.run()
        vm.assert_dirty("the start of L2", {})
        yield guest
