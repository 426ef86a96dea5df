# SPDX-License-Identifier: GPL-2.0-only
"""The VM under test: a guest whose memslots have their dirty pages logged in one of the modes."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from dirty_tracking.bitmap import new_bitmap, set_pages
from dirty_tracking.modes import LOG_MODES, LogMode, set_dirty_logging
from dirty_tracking.report import DirtyReport
from dirty_tracking.ring import DirtyRing
from dirty_tracking.violations import ContractViolation, Kind, Violation
from kvm_util import uapi
from kvm_util.closing import Closing
from kvm_util.guest import GuestVm
from kvm_util.guest_program import GuestProgram
from kvm_util.kvm import Kvm
from kvm_util.memory import GIB, HOST_PAGE_SIZE, HUGE_PAGE_SIZE
from kvm_util.vm import Memslot, Vm
from kvm_util.wording import listed

PAGE = HOST_PAGE_SIZE
# Guest-virtual address of guest-physical address 0 of the test slots
GVA_OFFSET = 1 << 40
# Where the first test slot begins by default: above slot 0, on a huge page's boundary, and not on one of a larger page
FIRST_GPA = GIB + 3 * HUGE_PAGE_SIZE


class DirtyVm(Closing):
    """A VM whose guest runs *program*, and whose dirty pages are logged in *mode*; no vCPU and no test slot at first.

    :param mode: a key of :data:`dirty_tracking.modes.LOG_MODES`
    :param ring_count: entries of a dirty ring, for the ring modes
    :param data_size: bytes of slot 0 that the vCPUs' data and the page tables of the test slots need
    :param guest_mode: a key of ``GUEST_MODES``: the size of the guest's own pages, which bounds what shadow paging can map
    :param prepare: called with the VM before it has vCPUs
    """

    def __init__(
        self,
        kvm: Kvm,
        mode: str,
        program: str,
        ring_count: int,
        data_size: int,
        guest_mode: str,
        prepare: Callable[[Vm], None] | None = None,
    ) -> None:
        self.mode: LogMode = LOG_MODES[mode](ring_count)
        self.guest = GuestVm(kvm, GuestProgram.load(program), guest_mode, data_size)
        self.vm = self.guest.vm
        with self._building():
            self.mode.create_vm_done(self.vm)
            if prepare is not None:
                prepare(self.vm)

    @contextmanager
    def _building(self) -> Iterator[None]:
        """Close the VM if the context, a part of its construction, fails."""
        try:
            yield
        except BaseException:
            self.guest.close()
            raise

    def add_slot(
        self, slot: int, gpa: int, npages: int, backing: str = "anonymous", logged: bool = True, readonly: bool = False
    ) -> Memslot:
        """Add a slot of *npages* pages, and map it in the guest at ``gpa + GVA_OFFSET``.

        When all pages are dirty at first (KVM_DIRTY_LOG_INITIALLY_SET), that first report is taken here.
        """
        flags = (uapi.KVM_MEM_LOG_DIRTY_PAGES if logged else 0) | (uapi.KVM_MEM_READONLY if readonly else 0)
        memslot = self.vm.add_memory(slot, gpa, npages * PAGE, backing, flags)
        self.map(gpa, npages)
        if logged and self.mode.initially_set:
            self.collect()
        return memslot

    def remove_slot(self, slot: int) -> None:
        """Delete a slot, and free its memory."""
        memory = self.vm.memslots[slot].memory
        self.vm.delete_memory_region(slot)
        memory.close()

    def map(self, gpa: int, npages: int) -> None:
        """Map *npages* pages at *gpa* in the guest, at ``gpa + GVA_OFFSET``."""
        self.map_at(gpa + GVA_OFFSET, gpa, npages)

    def map_at(self, gva: int, gpa: int, npages: int) -> None:
        """Map *npages* pages at *gpa* in the guest, at *gva*."""
        self.guest.map_test_memory(gva, gpa, npages * PAGE)

    def enable_dirty_logging(self, slot: int, assert_initial: bool = True) -> None:
        """Enable dirty logging for a slot.

        :param assert_initial: where all pages are dirty at first, collect, and assert that they are
        """
        set_dirty_logging(self.vm, slot, on=True)
        if assert_initial and self.mode.initially_set:
            self.assert_dirty("enabling dirty logging", {slot: range(self.vm.memslots[slot].npages)})

    def disable_dirty_logging(self, slot: int) -> None:
        """Disable dirty logging for a slot."""
        set_dirty_logging(self.vm, slot, on=False)

    @property
    def rings(self) -> list[DirtyRing]:
        """The rings of the vCPUs; none in a mode without."""
        return self.mode.rings(self.vm)

    def address(self, slot: int, page: int, offset: int = 0) -> int:
        """The guest-virtual address of a byte of a slot that is mapped at ``gpa + GVA_OFFSET``."""
        return self.vm.memslots[slot].gpa + page * PAGE + offset + GVA_OFFSET

    def changed_pages(self, slot: int, before: bytes) -> list[int]:
        """The pages of a slot whose contents are not what they were in *before*, all of the slot's."""
        view = self.vm.memslots[slot].memory.view
        starts = range(0, len(before), PAGE)
        return [start // PAGE for start in starts if view[start : start + PAGE] != before[start : start + PAGE]]

    def collect(self) -> DirtyReport:
        """Collect what KVM reports, of all slots; KVM write-protects these pages again.

        :raises ContractViolation: KVM reset another number of ring entries than were harvested, or left a gap in a ring
        """
        report = self.mode.collect(self.vm, kick=None)
        report.check()
        return report

    def assert_dirty(self, what: str, expected: Mapping[int, Iterable[int]], writes_per_page: int = 1) -> None:
        """Collect, and assert that exactly these pages are dirty, by slot. Logged slots that are not named must be clean.

        :param what: what the guest did, for the message
        :param writes_per_page: how many entries of a page a ring may have. What KVM writes itself, emulating an instruction
            or for user space, it pushes to a ring each time, for it does not look whether the page is in there already
            (mark_page_dirty_in_slot(), virt/kvm/kvm_main.c)
        :raises ContractViolation: KVM reported something else
        """
        self.assert_report(what, expected, self.collect(), writes_per_page)

    def assert_report(
        self, what: str, expected: Mapping[int, Iterable[int]], report: DirtyReport, writes_per_page: int = 1
    ) -> None:
        """As :meth:`assert_dirty`, for a report collected earlier."""
        for slot in sorted(report.slots | expected.keys()):
            most = writes_per_page * self._entries_per_write(slot)
            self._compare(what, slot, expected.get(slot, ()), report.entries(slot), most)

    def _entries_per_write(self, slot: int) -> int:
        """How many entries one write to a slot may make: two with PML, for a page of a huge page that an earlier write split.

        The split leaves the other pages write-protected, and their dirty bits clear. fast_pf_fix_direct_spte() in
        arch/x86/kvm/mmu/mmu.c makes such a page writable, and logs it; the CPU logs it once more (docs/contract.md, E4).
        """
        memslot = self.vm.memslots.get(slot)
        return 2 if self.mode.has_cpu_logs and memslot is not None and memslot.memory.backing.page_size else 1

    def assert_bitmap(self, what: str, slot: int, expected: Iterable[int]) -> None:
        """Assert that KVM_GET_DIRTY_LOG alone reports exactly *expected*; for manual mode, where it clears nothing.

        :raises ContractViolation: KVM reported something else
        """
        self._compare(what, slot, expected, self.read_bitmap(slot), 1)

    def _compare(self, what: str, slot: int, expected: Iterable[int], reported: Sequence[int], most: int) -> None:
        """Compare what was reported of a slot with what is expected: each page once, or *most* times at most."""
        wanted, found = set(expected), Counter(reported)
        wrong = {
            Kind.LOST: sorted(wanted - found.keys()),
            Kind.SPURIOUS: sorted(found.keys() - wanted),
            Kind.DUPLICATE: sorted(page for page, count in found.items() if count > most),
        }
        violations = [
            Violation(kind, listed("page", pages), slot, tuple(pages)) for kind, pages in wrong.items() if pages
        ]
        if violations:
            raise ContractViolation(violations, f"{self.mode.name}: {what}")

    def read_bitmap(self, slot: int) -> list[int]:
        """KVM_GET_DIRTY_LOG alone: the pages whose bits are set."""
        bitmap = new_bitmap(self.vm.memslots[slot].npages)
        self.vm.get_dirty_log(slot, bitmap)
        return set_pages(bitmap)

    def close(self) -> None:
        """Close the VM and free all memory."""
        self.guest.close()
