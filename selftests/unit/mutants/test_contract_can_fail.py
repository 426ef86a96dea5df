# SPDX-License-Identifier: GPL-2.0-only
"""ScriptedVm.assert_dirty(), which most contract tests end with, fails under each mutant that makes a wrong report."""

import pytest

from dirty_tracking.modes import LOG_MODES
from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.violations import ContractViolation
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util.ioctl import KvmError
from kvm_util.kvm import Kvm
from selftests.unit.mutants.catalogue import MUTANTS, Mutant

SLOT, OTHER = 1, 2
NPAGES = 70
WRITTEN = [3, 64, 69]
# What assert_dirty() does not look at: the order of entries, errors, and pages that are written between GET and CLEAR
UNSEEN = {"entries-reversed", "wrong-errno", "refusal-missing", "call-refused", "clear-takes-whole-range"}


def check_reports(vm: ScriptedVm) -> None:
    """Report the same pages twice, nothing, what is written to another slot, and what toggled dirty logging leaves."""
    for number in range(2):
        vm.write(SLOT, *WRITTEN)
        vm.assert_dirty(f"writes {number}", {SLOT: WRITTEN})
    vm.assert_dirty("nothing", {})
    vm.write(OTHER, 5)
    vm.assert_dirty("a write to the other slot", {OTHER: [5]})
    vm.disable_dirty_logging(SLOT)
    vm.write(SLOT, 1)
    vm.assert_dirty("a write without dirty logging", {})
    vm.enable_dirty_logging(SLOT)
    vm.write(SLOT, *WRITTEN)
    vm.assert_dirty("writes after enabling it", {SLOT: WRITTEN})


@pytest.mark.parametrize(
    ("mutant", "mode"),
    [
        (mutant, mode)
        for mutant in MUTANTS.values()
        if mutant.name not in UNSEEN
        for mode in LOG_MODES
        if mode in mutant.modes
    ],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.mutants
def test_wrong_report_of_each_mutant(
    kvm: Kvm,
    emulates: bool,
    monkeypatch: pytest.MonkeyPatch,
    mutant: Mutant,
    mode: str,
) -> None:
    """assert_dirty() passes on KVM as it is, and fails under each mutant that makes a wrong report."""
    if reason := LOG_MODES[mode].supported(kvm):
        pytest.skip(reason)
    if emulates and mutant.name == "reset-ignored":
        # mark_page_dirty_in_slot() (virt/kvm/kvm_main.c) pushes each write that KVM makes itself, write-protected or not.
        pytest.skip("this backend makes each write itself, and needs no write protection to see it")
    with ScriptedVm(kvm, mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.add_slot(OTHER, FIRST_GPA + NPAGES * PAGE, NPAGES)
        check_reports(vm)
        mutant.plant(monkeypatch)
        with pytest.raises((ContractViolation, KvmError)):
            check_reports(vm)
