# SPDX-License-Identifier: GPL-2.0-only
"""Fixtures for the tests of single writes, in memory/ and x86_64/."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dirty_tracking.scripted_vm import NotEmulated, ScriptedVm
from dirty_tracking.vm import PAGE
from kvm_util.kvm import Kvm
from selftests.stores import SLOT_GPA, SPARE_GVA, WRITTEN, MaxEntries, SkipUnemulated, add_loaded_slots


@pytest.fixture
def logged_vm(kvm: Kvm, log_mode: str) -> Iterator[ScriptedVm]:
    """A VM with two logged memslots side by side; the guest has read all of their pages."""
    with ScriptedVm(kvm, log_mode) as vm:
        add_loaded_slots(vm)
        yield vm


@pytest.fixture
def skip_unemulated(emulates: bool) -> SkipUnemulated:
    """A context for an instruction that KVM's emulator may not know.

    The test is skipped where the backend emulates all instructions, and not this one.
    """

    @contextmanager
    def skip_unemulated(name: str) -> Iterator[None]:
        try:
            yield
        except NotEmulated as error:
            if not emulates:
                raise
            pytest.skip(f"{name}: this backend emulates every instruction: {error}")

    return skip_unemulated


@pytest.fixture
def max_entries(emulates: bool) -> MaxEntries:
    """How many entries a page may have in a ring for so many writes of one instruction.

    One, where the CPU does the writes: the first makes KVM map the page writable, and KVM does not see the others. KVM's
    emulator pushes an entry for each (see ScriptedVm.assert_dirty()).
    """
    return (lambda writes: writes) if emulates else lambda _writes: 1


@pytest.fixture(params=[True, False], ids=["read-only", "not-present"])
def boundary_gva(request: pytest.FixtureRequest, logged_vm: ScriptedVm) -> int:
    """The gva after the page at WRITTEN, where the guest's own page tables end or allow no writes."""
    logged_vm.map_at(SPARE_GVA - PAGE, SLOT_GPA + WRITTEN * PAGE, 1)
    if request.param:
        logged_vm.guest.page_tables.map(SPARE_GVA, SLOT_GPA + (WRITTEN + 1) * PAGE, PAGE, writable=False)
    return SPARE_GVA
