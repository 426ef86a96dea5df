# SPDX-License-Identifier: GPL-2.0-only
"""Records the dirty-log operations of a VM whose vCPUs write, for the judge."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from dirty_tracking.judge import Judge
from dirty_tracking.ledger import Collection, Counted, Ledger, SlotPages, Toggle
from dirty_tracking.modes import LogMode, set_dirty_logging
from dirty_tracking.report import DirtyReport
from dirty_tracking.writers import Writers
from kvm_util.vm import Vm

CountedEvent = TypeVar("CountedEvent", bound=Counted)


class Recorder:
    """The ledger of *slots*, which *writers* write and whose dirty pages are logged in *mode*, and its judge."""

    def __init__(self, writers: Writers, mode: LogMode, slots: Sequence[SlotPages]) -> None:
        self.ledger = Ledger(writers.streams, slots, mode.uses_ring, mode.initially_set, 2 if mode.has_cpu_logs else 1)
        self.judge = Judge(self.ledger)
        self._writers = writers
        self._mode = mode

    def kick(self) -> None:
        """Kick running vCPUs, if they must be: see :meth:`LogMode.flush_cpu_logs`."""
        self._mode.flush_cpu_logs(self._writers.kick_running)

    @contextmanager
    def recording(self, event: CountedEvent, exact: bool | list[bool]) -> Iterator[CountedEvent]:
        """Record *event*, which lasts as long as the context, unless that raises.

        :param exact: whether all vCPUs are out of KVM_RUN, or that for each vCPU
        """
        event.exact = [exact for _ in self._writers.threads] if isinstance(exact, bool) else exact
        event.start, event.before = self.ledger.now(), self._writers.published()
        yield event
        event.after, event.end = self._writers.published(), self.ledger.now()
        self.ledger.record(event)

    def collecting(self, first: int, last: int, stopped: bool) -> AbstractContextManager[Collection]:
        """Record a collection of the pages *first* to *last* - 1."""
        return self.recording(Collection(first=first, last=last, kicked=self._mode.has_cpu_logs), stopped)

    def set_logging(self, vm: Vm, slot: int, on: bool, stopped: bool = False) -> None:
        """Enable or disable dirty logging of a slot."""
        with self.recording(Toggle(slot=slot, on=on), stopped):
            set_dirty_logging(vm, slot, on)

    def add(self, collection: Collection, report: DirtyReport) -> None:
        """Add everything in *report* to *collection*."""
        for source in report.sources:
            collection.add(*self.ledger.entry_numbers(source.slots, source.offsets))
        collection.reset = report.reset
        if self._mode.uses_ring:
            collection.behind_gap = [source.behind_gap for source in report.sources]
