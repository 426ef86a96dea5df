# SPDX-License-Identifier: GPL-2.0-only
"""A VM whose vCPUs write pages of several slots without end: for what has to hold while a VM runs.

The pages of all test slots are numbered through, in the order of the slots: a vCPU's stream runs over these numbers. In the
guest they lie side by side, while between the slots' guest-physical addresses there are holes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from dirty_tracking.memory_check import WORDS_PER_PAGE
from dirty_tracking.modes import LOG_MODES
from dirty_tracking.vm import PAGE
from dirty_tracking.write_stream import WriteStream
from dirty_tracking.writers import SPARSE, Writers
from kvm_util.guest import PROGRAM_SLOT, GuestVm
from kvm_util.guest_program import GuestProgram
from kvm_util.kvm import Kvm
from kvm_util.memory import GIB, MIB, align_up
from kvm_util.vm import Memslot

_GVA = 1 << 40
_FIRST_GPA = GIB + 6 * MIB
_VCPU_DATA = 1 << 20


@dataclass(frozen=True)
class Area:
    """A test slot: its pages have the numbers from *first* to *end* - 1."""

    memslot: Memslot
    first: int
    end: int

    @property
    def slot(self) -> int:
        return self.memslot.slot


class WritersVm:
    """A VM with a vCPU for each of *streams*, and a slot for each of *shapes*.

    :param mode: a key of :data:`dirty_tracking.modes.LOG_MODES`
    :param shapes: number of pages and backing of each slot
    :param ring_count: entries of a dirty ring, for the ring modes
    :param pace: see :mod:`dirty_tracking.writers`
    :param guest_mode: a key of ``GUEST_MODES``; with pages of more than 4 KiB there can be one slot only
    :raises HugePagesMissing: transparent huge pages were asked for, and there is not one
    """

    def __init__(
        self,
        kvm: Kvm,
        mode: str,
        shapes: Sequence[tuple[int, str]],
        streams: Sequence[WriteStream],
        ring_count: int = 4096,
        pace: int = SPARSE,
        guest_mode: str = "48bit-4k",
    ) -> None:
        self.mode = LOG_MODES[mode](ring_count)
        npages = sum(count for count, _ in shapes)
        data = sum(len(stream.pages) * 8 + _VCPU_DATA for stream in streams) + npages * 8 + MIB
        self.guest = GuestVm(kvm, GuestProgram.load("dirty_writer"), guest_mode, data)
        self.vm = self.guest.vm
        try:
            self.mode.create_vm_done(self.vm)
            self.areas: list[Area] = []
            gpa, first = _FIRST_GPA, 0
            for slot, (count, backing) in enumerate(shapes, PROGRAM_SLOT + 1):
                self._add_area(slot, gpa, first, count, backing)
                first += count
                gpa = align_up(gpa + count * PAGE, 2 * MIB) + 2 * MIB
            self.writers = Writers(self.guest, self.mode)
            for vcpu, stream in enumerate(streams):
                self.writers.add(stream, _GVA, npages * PAGE if vcpu == 0 else 0, pace)
        except BaseException:
            self.guest.close()
            raise

    def start(self) -> None:
        """Start the vCPUs' threads and have the guest touch all pages: all are mapped writable then."""
        self.writers.start()
        self.writers.let_go()
        self.writers.wait(self.writers.all_stopped, "touching all pages")

    def stop(self) -> None:
        """Stop all vCPUs wherever they are, and find out how many writes they have done."""
        self.writers.force_stop()
        self.writers.settle([True for _ in self.writers.threads], self._done)

    def close(self, error: BaseException | None = None) -> None:
        """End all threads, and give all memory back; *error* as for :meth:`Writers.end`."""
        try:
            if self.writers.started:
                self.writers.end(error)
        finally:
            self.writers.close()

    def _add_area(self, slot: int, gpa: int, first: int, count: int, backing: str) -> None:
        memslot = self.vm.add_memory(slot, gpa, count * PAGE, backing, populate=True)
        self.guest.map_test_memory(_GVA + first * PAGE, gpa, count * PAGE)
        self.areas.append(Area(memslot, first, first + count))

    def _done(self, vcpu: int, published: int) -> int:
        """How many writes *vcpu*, out of its guest, has done: *published*, and one more when its value is in memory."""
        page = self.writers.streams[vcpu].between(published, published + 1)[0]
        area = next(area for area in self.areas if page < area.end)
        word = area.memslot.memory.words[(page - area.first) * WORDS_PER_PAGE + vcpu]
        return published + (word == published + 1)

    def __enter__(self) -> "WritersVm":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None and self.writers.started:
            value.add_note(self.writers.last_exits())
        self.close(value)
