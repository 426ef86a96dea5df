# SPDX-License-Identifier: GPL-2.0-only
"""Fixtures for the tests of nested guests: the L2 guest of nested.py."""

from collections.abc import Iterator

import pytest

from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import FIRST_GPA
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from selftests.x86_64.hypervisors import hypervisor
from selftests.x86_64.nested import NPAGES, OWN, OWN_GPA, RING, SLOT, NestedGuest


@pytest.fixture(params=[True, False], ids=["nested-paging", "no-nested-paging"])
def nested(request: pytest.FixtureRequest, kvm: Kvm, host: Host) -> bool:
    """Whether L2 has nested page tables; skips where KVM does not offer that."""
    kind = hypervisor()
    if kind is None:
        pytest.skip(f"{host.backend} does not let its guests run nested ones")
    if reason := kind.missing(kvm, request.param):
        pytest.skip(reason)
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
