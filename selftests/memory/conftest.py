# SPDX-License-Identifier: GPL-2.0-only
"""Fixtures for the tests of huge pages: VMs of huge_memory.py, and the statistics of their mappings."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dirty_tracking.mapping_sizes import huge_pages
from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import PAGE
from harness.fixtures import Provided
from kvm_util import uapi
from kvm_util.binary_stats import BinaryStats
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS
from selftests.memory.huge_memory import SLOT, Layout, MakeHugeVm, OpenStats, huge_guest_mode


@pytest.fixture
def make_huge_vm(kvm: Kvm, host: Host, log_mode: str, provided: Provided) -> MakeHugeVm:
    """Call it with a layout for a VM with a memslot of that layout, without dirty logging, in huge pages of the host.

    Unless a guest mode is given, it is one in which KVM can map the memslot huge.
    """

    @contextmanager
    def make_huge_vm(layout: Layout, guest_mode: str | None = None) -> Iterator[ScriptedVm]:
        backing = BACKINGS[layout.backing]
        guest_mode = guest_mode or huge_guest_mode(kvm, host, layout)
        with (
            provided(layout.backing, layout.npages * PAGE + layout.gpa % backing.alignment),
            ScriptedVm(kvm, log_mode, guest_mode=guest_mode) as vm,
        ):
            memslot = vm.add_slot(SLOT, layout.gpa, layout.npages, layout.backing, logged=False)
            memslot.memory.populate()
            needed = len(huge_pages(memslot, layout.size)) * layout.size
            if not backing.hugetlb and memslot.memory.transparent_huge_size() < needed:
                pytest.skip(f"{backing.name}: the host's memory is fragmented (echo 1 > /proc/sys/vm/compact_memory)")
            yield vm

    return make_huge_vm


@pytest.fixture
def open_stats(kvm: Kvm, host: Host, emulates: bool) -> OpenStats:
    """Call it with a VM for the statistics of its mappings."""
    if emulates:
        pytest.skip(f"{host.backend} emulates each instruction of this guest, and maps no page")
    if not kvm.check_extension(uapi.KVM_CAP_BINARY_STATS_FD):
        pytest.skip("this KVM has no KVM_CAP_BINARY_STATS_FD")
    return lambda vm: BinaryStats(vm.vm.get_stats_fd())
