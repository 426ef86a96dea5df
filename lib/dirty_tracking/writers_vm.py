# SPDX-License-Identifier: GPL-2.0-only
"""A VM whose vCPUs write pages of several slots without end: for what has to hold while a VM runs.

The pages of all test slots are numbered consecutively, in the order of the slots; a vCPU's stream has these numbers. In the
guest they lie side by side, while between the slots' guest-physical addresses there are holes.
"""

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from dirty_tracking.cell import guest_data_size
from dirty_tracking.ledger import SlotPages
from dirty_tracking.memory_check import WORDS_PER_PAGE, writes_done
from dirty_tracking.report import DirtyReport
from dirty_tracking.vm import FIRST_GPA, GVA_OFFSET, PAGE, DirtyVm
from dirty_tracking.write_stream import WriteStream
from dirty_tracking.writers import Pace, Writers
from kvm_util.guest import PROGRAM_SLOT
from kvm_util.kvm import Kvm
from kvm_util.memory import GIB, HUGE_PAGE_SIZE, Backing, GuestMemory, align_up

# With five levels of page tables, test memory is mapped at an address that four levels cannot translate.
_GVA_5_LEVEL = 1 << 52


class WritersVm(DirtyVm):
    """A VM with a vCPU for each of *streams*, and a slot for each of *shapes*; dirty logging is disabled at first.

    :param mode: a key of :data:`dirty_tracking.modes.LOG_MODES`
    :param shapes: number of pages and backing of each slot
    :param ring_count: entries of a dirty ring, for the ring modes
    :param guest_mode: a key of ``GUEST_MODES``; with larger pages than the host's there can be one slot only
    :param gpa: where the first slot begins
    :param make_memory: makes the memory of each slot
    :param touch: whether :meth:`populate` has the guest touch all pages
    :ivar slots: the test slots, with the numbers of their pages
    :raises HugePagesMissing: transparent huge pages were asked for, and there is not one
    """

    def __init__(
        self,
        kvm: Kvm,
        mode: str,
        shapes: Sequence[tuple[int, str]],
        streams: Sequence[WriteStream],
        ring_count: int = 4096,
        pace: Pace = Pace.SPARSE,
        guest_mode: str = "48bit-4k",
        gpa: int = FIRST_GPA,
        make_memory: Callable[[Backing, int, int], GuestMemory] = GuestMemory,
        touch: bool = True,
    ) -> None:
        npages = sum(count for count, _ in shapes)
        data_size = guest_data_size(npages * PAGE, len(streams))
        super().__init__(kvm, mode, "dirty_writer", ring_count, data_size, guest_mode)
        own = self.guest.guest_mode
        self._gva = (_GVA_5_LEVEL if own.levels == 5 else GVA_OFFSET) + gpa % own.page_size
        self._make_memory = make_memory
        with self._building():
            self.slots: list[SlotPages] = []
            for count, backing in shapes:
                self._add_test_slot(gpa, count, backing)
                gpa = align_up(gpa + count * PAGE, HUGE_PAGE_SIZE) + HUGE_PAGE_SIZE
            self.writers = Writers(self.guest, self.mode)
            for vcpu, stream in enumerate(streams):
                # One vCPU touches all pages.
                self.writers.add(stream, self._gva, npages * PAGE if touch and vcpu == 0 else 0, pace)

    def populate(self) -> None:
        """Start the vCPUs' threads and have the guest touch all pages: all are mapped then, and writable.

        They are huge where they can be, as in a VM whose migration begins.
        """
        self.writers.start()
        self.writers.resume()
        # No writes are published meanwhile; a slow machine needs seconds for a GiB.
        patience = max(1, self.slots[-1].end * PAGE / GIB)
        self.writers.wait(self.writers.all_stopped, "touching all pages", patience=patience)

    def take_report(self, stopped: bool, always_kick: bool = False, slots: Iterable[int] | None = None) -> DirtyReport:
        """Collect; running vCPUs are kicked where needed, or always: see :meth:`LogMode.collect`.

        :param stopped: whether no vCPU is running
        """
        return self.mode.collect(
            self.vm, None if stopped else self.writers.kick_running, always_kick=always_kick, slots=slots
        )

    def stop(self) -> None:
        """Stop all vCPUs wherever they are, and find out how many writes they have done."""
        self.writers.force_stop()
        self.sync_write_counts([True for _ in self.writers.threads])

    def sync_write_counts(self, out_of_guest: Sequence[bool]) -> None:
        """Find out how many writes the vCPUs that are out of their guests have done, by what is in memory."""
        self.writers.sync_write_counts(out_of_guest, self._done)

    def close(self, error: BaseException | None = None) -> None:
        """End all threads, and free all memory; *error* as for :meth:`Writers.end`."""
        try:
            if self.writers.started:
                self.writers.end(error)
        finally:
            self.writers.close()

    def _add_test_slot(self, gpa: int, count: int, backing: str) -> None:
        """Add the next slot, and map it after the previous one."""
        first = self.slots[-1].end if self.slots else 0
        slot = PROGRAM_SLOT + 1 + len(self.slots)
        self.vm.add_memory(slot, gpa, count * PAGE, backing, populate=True, make_memory=self._make_memory)
        self.map_at(self._gva + first * PAGE, gpa, count)
        self.slots.append(SlotPages(slot, first, first + count))

    def _done(self, vcpu: int, published: int) -> int:
        """How many writes *vcpu*, out of its guest, has done."""

        def value(page: int) -> int:
            slot = next(slot for slot in self.slots if page < slot.end)
            words = self.vm.memslots[slot.slot].memory.words
            return int(words[(page - slot.first) * WORDS_PER_PAGE + vcpu])

        return writes_done(self.writers.streams[vcpu], published, value)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None and self.writers.started:
            value.add_note(self.writers.last_exits())
        self.close(value)
