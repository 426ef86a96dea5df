# SPDX-License-Identifier: GPL-2.0-only
"""The checks of single sentences can fail: what real KVM answered is falsified, and the check must say so."""

from collections.abc import Callable
from typing import Any

import pytest

from dirty_tracking.modes import LOG_MODES
from dirty_tracking.ring import DirtyRing
from dirty_tracking.tracked_vm import FIRST_GPA, PAGE, TrackedVm
from dirty_tracking.violations import ContractViolation
from kvm_util import uapi
from kvm_util.kvm import Kvm
from kvm_util.vm import Vm
from selftests.unit.mutants.faults import falsify_bitmaps

SLOT, OTHER = 1, 2
NPAGES = 70
WRITTEN = [3, 64, 69]
RING_MODES = [name for name, mode in LOG_MODES.items() if mode.uses_ring]
BITMAP_MODES = [name for name in LOG_MODES if name not in RING_MODES]

BITMAP_FAULTS: dict[str, Callable[[bytearray], None]] = {
    "drops a bit": lambda bitmap: bitmap.__setitem__(8, 0),
    "adds a bit": lambda bitmap: bitmap.__setitem__(1, 1),
    "moves a bit": lambda bitmap: bitmap.__setitem__(8, 2),
}
Entries = tuple[list[int], list[int]]
RING_FAULTS: dict[str, Callable[[Entries], Entries]] = {
    "loses an entry": lambda taken: (taken[0][:-1], taken[1][:-1]),
    "repeats an entry": lambda taken: (taken[0] + taken[0][:1], taken[1] + taken[1][:1]),
    "changes an offset": lambda taken: (taken[0], [taken[1][0] + 1, *taken[1][1:]]),
    "changes a slot": lambda taken: ([OTHER, *taken[0][1:]], taken[1]),
    "names no slot": lambda taken: ([77, *taken[0][1:]], taken[1]),
}


def check_fails(kvm: Kvm, mode: str, falsify: Callable[[], None]) -> None:
    """A sound answer passes, the falsified one does not."""
    with TrackedVm(kvm, mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.add_slot(OTHER, FIRST_GPA + NPAGES * PAGE, NPAGES)
        vm.write(SLOT, *WRITTEN)
        vm.assert_dirty("writes", {SLOT: WRITTEN})
        vm.write(SLOT, *WRITTEN)
        falsify()
        with pytest.raises(ContractViolation):
            vm.assert_dirty("writes", {SLOT: WRITTEN})


@pytest.mark.parametrize("fault", BITMAP_FAULTS.values(), ids=list(BITMAP_FAULTS))
@pytest.mark.log_modes("bitmap")
@pytest.mark.mutants
def test_a_falsified_bitmap(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str, fault: Any) -> None:

    def of_one_slot(slot: int, bitmap: bytearray) -> None:
        if slot == SLOT:
            fault(bitmap)

    check_fails(kvm, log_mode, lambda: falsify_bitmaps(monkeypatch, of_one_slot))


@pytest.mark.parametrize("fault", RING_FAULTS.values(), ids=list(RING_FAULTS))
@pytest.mark.log_modes("ring")
@pytest.mark.mutants
def test_a_falsified_ring(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str, fault: Any) -> None:
    honest = DirtyRing.harvest
    check_fails(kvm, log_mode, lambda: monkeypatch.setattr(DirtyRing, "harvest", lambda ring: fault(honest(ring))))


@pytest.mark.log_modes("dirty-ring")
@pytest.mark.mutants
def test_a_reset_that_takes_too_little(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    check_fails(kvm, "dirty-ring", lambda: monkeypatch.setattr(Vm, "reset_dirty_rings", lambda _vm: 0))


@pytest.mark.log_modes("clear-log-unset")
@pytest.mark.mutants
def test_tracking_that_is_not_armed_again(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLEAR is not passed on: what it should have cleared is reported again, although nothing wrote it."""
    with TrackedVm(kvm, "clear-log-unset") as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.write(SLOT, *WRITTEN)
        monkeypatch.setattr(Vm, "clear_dirty_log", lambda *_arguments: None)
        vm.assert_dirty("writes", {SLOT: WRITTEN})
        with pytest.raises(ContractViolation, match=r"SPURIOUS.*: pages 3, 64, 69"):
            vm.assert_dirty("nothing", {})


@pytest.mark.mutants
def test_tracking_that_stays_off(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot's flags are not passed on: its writes are lost."""
    honest = Vm.set_user_memory_region

    def falsified(vm: Vm, slot: int, gpa: int, memory: Any, flags: int = 0) -> Any:
        return honest(vm, slot, gpa, memory, 0 if slot == SLOT else flags)

    monkeypatch.setattr(Vm, "set_user_memory_region", falsified)
    with TrackedVm(kvm, "dirty-log") as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        assert vm.vm.memslots[SLOT].flags != uapi.KVM_MEM_LOG_DIRTY_PAGES
        vm.write(SLOT, *WRITTEN)
        with pytest.raises(ContractViolation, match=r"LOST.*: pages 3, 64, 69"):
            vm.assert_dirty("writes", {SLOT: WRITTEN})
