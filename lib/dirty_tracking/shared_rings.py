# SPDX-License-Identifier: GPL-2.0-only
"""Dirty rings that several threads harvest and reset at once."""

import threading
import time
from collections.abc import Sequence

from dirty_tracking.cell import HANG_TIMEOUT
from dirty_tracking.ring import DirtyRing, reset_harvested
from dirty_tracking.violations import ContractViolation, Kind, Violation, violated
from kvm_util.vm import Vm
from kvm_util.wording import counted


class SharedRings:
    """The *rings* of *vm*'s vCPUs; every method may be called by any thread.

    :ivar signalled: whether signals may end a KVM_RESET_DIRTY_RINGS early
    """

    def __init__(self, vm: Vm, rings: Sequence[DirtyRing]) -> None:
        self.signalled = False
        self._vm = vm
        self._rings = rings
        self._harvesting = [threading.Lock() for _ in rings]
        self._cond = threading.Condition()
        self._calls = 0
        self._in_progress: set[int] = set()

    def harvest(self, vcpu: int, most: int | None = None) -> tuple[Sequence[int], Sequence[int], int]:
        """Harvest entries of a ring, in order: all, or *most* at most.

        :returns: their slots and offsets, and the position up to which the ring is harvested after that
        """
        ring = self._rings[vcpu]
        with self._harvesting[vcpu]:
            slots, offsets = ring.harvest(most)
            return slots, offsets, ring.next

    def reset(self) -> int:
        """KVM_RESET_DIRTY_RINGS once; returns how many entries it reset."""
        with self._cond:
            self._calls += 1
            number = self._calls
            self._in_progress.add(number)
        try:
            return self._vm.reset_dirty_rings() if self.signalled else reset_harvested(self._vm)
        finally:
            with self._cond:
                self._in_progress.remove(number)
                self._cond.notify_all()

    def reset_up_to(self, positions: Sequence[int]) -> int:
        """Reset every ring's entries up to these positions, and wait for other calls; returns how many this thread reset.

        One call is enough, unless a signal ends it early (since Linux 6.17, commit 49005a2a3d2a): then the next calls reset
        the rest. Entries may also be reset by another thread's call. That one flushes the TLBs only after it has released
        the lock that serializes the calls (``kvm_vm_ioctl_reset_dirty_pages()``, virt/kvm/kvm_main.c), so it has to have
        returned too.

        :raises ContractViolation: harvested entries are left after all calls (R8)
        """
        deadline = time.monotonic() + HANG_TIMEOUT
        count = calls = 0
        while True:
            count += self.reset()
            calls += 1
            left = [vcpu for vcpu, position in enumerate(positions) if position and self._is_left(vcpu, position - 1)]
            with self._cond:
                if not left:
                    others = set(self._in_progress)
                    if self._cond.wait_for(lambda others=others: not others & self._in_progress, HANG_TIMEOUT):  # type: ignore[misc]
                        return count
                    raise violated(Kind.OTHER, f"KVM_RESET_DIRTY_RINGS does not return within {HANG_TIMEOUT:g} s")
            if not self.signalled or time.monotonic() > deadline:
                detail = f"{counted(calls, 'call')} left harvested entries in the rings of vCPUs {left}"
                raise ContractViolation([Violation(Kind.RESET_COUNT, detail, rule="R8")])

    def _is_left(self, vcpu: int, number: int) -> bool:
        """Whether entry *number* is harvested and not reset.

        Once the ring has been harvested for a lap behind it, it was reset, and its place has another entry.
        """
        ring = self._rings[vcpu]
        with self._harvesting[vcpu]:
            return ring.next <= number + ring.entries and ring.is_harvested(number)
