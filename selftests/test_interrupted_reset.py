# SPDX-License-Identifier: GPL-2.0-only
"""KVM_RESET_DIRTY_RINGS that a signal ends early: what it took has to be tracked anew."""

import random
import signal
import threading
from collections.abc import Callable
from typing import Any

from lib.kvm import Kvm
from lib.tracked_vm import FIRST_GPA, TrackedVm
from lib.vcpu_thread import KICK_SIGNAL

SLOT, NPAGES = 1, 1000


def test_what_an_interrupted_reset_took_is_tracked_anew(
    kvm: Kvm, needs_log_mode: Callable[[str], None], outcome: Any, thorough: bool
) -> None:
    """No vCPU runs meanwhile. One call after the other takes its part; then each page that is written is reported again."""
    needs_log_mode("dirty-ring")
    previous = signal.signal(KICK_SIGNAL, lambda _number, _frame: None)
    target, over = threading.get_ident(), threading.Event()

    def storm() -> None:
        draw = random.Random(1)
        while not over.wait(draw.random() / 1000):
            signal.pthread_kill(target, KICK_SIGNAL)

    sender = threading.Thread(target=storm, name="storm", daemon=True)
    with outcome.contract(), TrackedVm(kvm, "dirty-ring") as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        # Not before: to make a VM is no system call that goes on after a signal.
        sender.start()
        try:
            for _ in range(100 if thorough else 20):
                vm.write(SLOT, *range(NPAGES))
                vm.expect("writes to all pages", {SLOT: range(NPAGES)})
        finally:
            over.set()
            sender.join(10)
            signal.signal(KICK_SIGNAL, previous)
            assert not sender.is_alive()
