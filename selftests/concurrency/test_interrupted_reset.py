# SPDX-License-Identifier: GPL-2.0-only
"""KVM_RESET_DIRTY_RINGS that a signal ends early: the pages of the entries that it reset are write-protected again."""

import random
import signal
import time

import pytest

from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import FIRST_GPA
from kvm_util.host import Host
from kvm_util.kvm import Kvm

# Nearly all of a ring of 4096 entries, without the reserved ones, so that the reset lasts long enough for a signal
SLOT, NPAGES = 1, 3500


@pytest.mark.log_modes("dirty-ring")
def test_interrupted_reset_write_protects(
    kvm: Kvm,
    host: Host,
    thorough: bool,
    draw: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """KVM_RESET_DIRTY_RINGS that a signal ends write-protects the page of each entry that it has reset."""
    with ScriptedVm(kvm, "dirty-ring") as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        reset, durations, tries = vm.vm.reset_dirty_rings, [], 100 if thorough else 20
        interruptions = 0

        def measured() -> int:
            start = time.perf_counter()
            count = reset()
            durations.append(time.perf_counter() - start)
            return count

        def interrupted() -> int:
            """A reset with a signal, and calls that reset the rest."""
            nonlocal interruptions
            previous = signal.signal(signal.SIGALRM, lambda _number, _frame: None)
            blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.1, 1) * min(durations))
            try:
                count = reset()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                signal.signal(signal.SIGALRM, previous)
            interruptions += count < NPAGES
            while count < NPAGES and (more := reset()):
                count += more
            return count

        for how, times in ((measured, 3), (interrupted, tries)):
            monkeypatch.setattr(vm.vm, "reset_dirty_rings", how)
            for _ in range(times):
                vm.write(SLOT, *range(NPAGES))
                vm.assert_dirty("writes to all pages", {SLOT: range(NPAGES)})
        # Before Linux 6.17 no signal ends the call (49005a2a3d2a): there the test shows that signals do no harm.
        if not interruptions and host.kernel_version >= (6, 17):
            pytest.skip(f"none of {tries} signals interrupted KVM_RESET_DIRTY_RINGS: this host is too busy")
