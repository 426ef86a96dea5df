# SPDX-License-Identifier: GPL-2.0-only
"""Pre-copy live migration as a VMM does it: all memory, then what KVM reports, in rounds, and the rest with vCPUs stopped.

Reported pages are write-protected again (by GET, CLEAR or RESET) **before** they are copied while the vCPUs run, so that a
write in between is reported again (api.rst, dirty ring; the same holds for a bitmap).
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

from dirty_tracking.memory_copy import MemoryCopy, Pages
from dirty_tracking.writers_vm import WritersVm
from kvm_util.wording import counted

# The least number of writes of each vCPU in a round
_WRITES = 128


@dataclass(frozen=True)
class Round:
    """One round of a migration.

    :ivar reported: how many bits or ring entries KVM reported
    :ivar copied: how many different pages were copied
    :ivar remaining: pages written after the copy, which the next round has to report; without slot 0
    :ivar writes: the guest's writes to test memory during the round
    :ivar ms: how long it took
    """

    round: int
    reported: int
    copied: int
    remaining: int
    writes: int
    ms: float


class Migration(MemoryCopy):
    """Copies all memslots of *vm* while its vCPUs run.

    :param enough: stop the vCPUs after a round that copied no more than this many pages
    :param most_rounds: or after this many rounds
    """

    def __init__(self, vm: WritersVm, enough: int, most_rounds: int) -> None:
        super().__init__(vm)
        self.rounds: list[Round] = []
        self._enough = enough
        self._most_rounds = most_rounds

    def run(self) -> list[Round]:
        """Migrate; the vCPUs have to be running, and are stopped afterwards."""
        self.enable_logging()
        self._round(0, self.everything)
        while len(self.rounds) <= self._most_rounds:
            self._round(len(self.rounds), None)
            if self.rounds[-1].copied <= self._enough:
                break
        self.vm.stop()
        self._round(len(self.rounds), None, stopped=True)
        return self.rounds

    def figures(self) -> list[dict[str, Any]]:
        """The rounds as plain data."""
        return list(map(asdict, self.rounds))

    def described(self) -> str:
        """What was verified, and after how many rounds."""
        return f"{super().described()}, after {counted(len(self.rounds), 'round')}"

    def _round(self, number: int, everything: Pages | None, stopped: bool = False) -> None:
        started, writes = time.monotonic(), self.vm.writers.published()
        if everything is None:
            reported, pages = self.transfer(stopped)
        else:
            reported, pages = 0, everything
            self.copy(pages)
        copied_at = self.vm.writers.published()
        if not stopped:
            # As for the pages to be sent
            self.vm.writers.wait_for_writes(_WRITES, writes)
        now = self.vm.writers.published()
        remaining: set[int] = set()
        for vcpu, stream in enumerate(self.vm.writers.streams):
            remaining.update(stream.written(copied_at[vcpu], now[vcpu]))
        copied = sum(map(len, pages.values()))
        ms = (time.monotonic() - started) * 1000
        self.rounds.append(Round(number, reported, copied, len(remaining), sum(now) - sum(writes), round(ms, 2)))
