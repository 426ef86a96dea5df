# SPDX-License-Identifier: GPL-2.0-only
"""What KVM has to report, by a model of the contract in plain Python: one for bitmaps, one for rings.

A model is told each thing that was done to a VM, and holds what KVM answered to it. Pages are numbers within their slot. It
takes guest memory to be present and writable in the host's page tables before a slot is made, so that what user space writes
changes nothing there, and so that KVM's own mappings come and go by these rules only (arch/x86/kvm/mmu/ in Linux 6.12):

- A store to a page of a tracked slot is reported: in a bitmap by its bit, in a ring by an entry, unless KVM has mapped the
  page writable since it was last armed: then it is in a ring already (make_spte(), fast_pf_fix_direct_spte()).
- A load is not reported, but for one that finds its page not mapped: KVM maps what the host may write as writable at once, and
  what it maps writable it reports (make_spte()). It may do so, and need not: with shadow paging the guest's own dirty bit
  decides (FNAME(page_fault)()).
- A slot that is moved or deleted takes all mappings of the VM along, those of other slots as well, or only its own, as the
  kernel likes (KVM_X86_QUIRK_SLOT_ZAP_ALL): a page of another slot that was writable is then either that, or not mapped.
- A backend that emulates every instruction does not map at all: loads are never reported, and stores are each time.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from dirty_tracking.violations import ContractViolation, Kind, Violation, violated
from kvm_util.wording import listed

Entry = tuple[int, int]  # slot and page of a ring's entry


class Access(Enum):
    """What a vCPU did to a page; *REDONE* is what it may do a second time, after its ring was full."""

    STORE = auto()
    LOAD = auto()
    REDONE = auto()


class Push(Enum):
    """Whether KVM puts an entry into a ring."""

    MUST = auto()
    MAY = auto()
    NO = auto()


@dataclass
class SlotState:
    """A slot as the model sees it.

    :ivar mapped: pages that KVM has certainly mapped
    :ivar dirty: bitmaps: pages whose bit is set
    :ivar maybe: bitmaps: pages whose bit may be set
    :ivar writable: rings: pages that KVM has mapped writable, so that a store is not told again
    :ivar unsure: rings: pages of which that is not known
    """

    npages: int
    tracked: bool
    mapped: set[int] = field(default_factory=set)
    dirty: set[int] = field(default_factory=set)
    maybe: set[int] = field(default_factory=set)
    writable: set[int] = field(default_factory=set)
    unsure: set[int] = field(default_factory=set)


class DirtyModel(ABC):
    """The slots of a VM, and what is common to both ways of reporting.

    :param emulates: the backend emulates every instruction of the guest
    """

    def __init__(self, emulates: bool) -> None:
        self.slots: dict[int, SlotState] = {}
        self.emulates = emulates

    def create(self, slot: int, npages: int, tracked: bool) -> None:
        """A slot was made; nothing of it is mapped."""
        self.slots[slot] = SlotState(npages, tracked)
        if tracked:
            self._begin(self.slots[slot])

    def delete(self, slot: int) -> None:
        """A slot was deleted: what a bitmap held is lost with it, what a ring holds is not."""
        del self.slots[slot]
        self._unmap()

    def move(self, slot: int) -> None:
        """A slot was moved: its pages have to be mapped anew; its bitmap goes along (kvm_prepare_memory_region())."""
        self._unmap()
        state = self.slots[slot]
        state.writable.clear()
        state.unsure.clear()

    def set_tracking(self, slot: int, on: bool) -> None:
        """Tracking was switched on or off; what was said twice changes nothing."""
        state = self.slots[slot]
        if state.tracked != on:
            state.tracked = on
            state.dirty.clear()
            state.maybe.clear()
            if on:
                self._begin(state)

    def _unmap(self) -> None:
        for state in self.slots.values():
            state.mapped.clear()
            state.unsure |= state.writable
            state.writable.clear()

    @abstractmethod
    def _begin(self, state: SlotState) -> None:
        """Tracking of a slot began."""

    @abstractmethod
    def ran(self, vcpu: int, slot: int, accesses: Iterable[tuple[Access, int]], pushed: Sequence[Entry]) -> None:
        """A vCPU made *accesses* to pages of a slot, no page twice.

        :param pushed: what is new in its ring
        :raises ContractViolation: that is not what the accesses make KVM push
        """

    def _may_map_writable(self, state: SlotState, page: int) -> bool:
        """Whether a load may have KVM map a page writable."""
        return not self.emulates and page not in state.mapped


class BitmapModel(DirtyModel):
    """For KVM_GET_DIRTY_LOG.

    :param manual: GET clears nothing (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    :param initially_set: all pages are dirty when tracking begins (KVM_DIRTY_LOG_INITIALLY_SET)
    """

    def __init__(self, manual: bool, initially_set: bool, emulates: bool) -> None:
        super().__init__(emulates)
        self.manual = manual
        self.initially_set = initially_set

    def _begin(self, state: SlotState) -> None:
        if self.initially_set:
            state.dirty = set(range(state.npages))

    def ran(self, vcpu: int, slot: int, accesses: Iterable[tuple[Access, int]], pushed: Sequence[Entry]) -> None:
        if pushed:
            raise _of_vcpu(Kind.SPURIOUS, vcpu, f"its ring has {_entries(pushed)}, and the VM has no rings")
        state = self.slots[slot]
        for access, page in accesses:
            if state.tracked and access is Access.STORE:
                state.dirty.add(page)
                state.maybe.discard(page)
            elif state.tracked and self._may_map_writable(state, page) and page not in state.dirty:
                state.maybe.add(page)
            state.mapped.add(page)

    def reported(self, slot: int, pages: Sequence[int]) -> None:
        """KVM_GET_DIRTY_LOG answered with *pages*.

        :raises ContractViolation: it had to report other pages
        """
        state, found = self.slots[slot], set(pages)
        wrong = {Kind.LOST: state.dirty - found, Kind.SPURIOUS: found - state.dirty - state.maybe}
        violations = [
            Violation(kind, listed("page", sorted(pages)), slot, tuple(sorted(pages)))
            for kind, pages in wrong.items()
            if pages
        ]
        if violations:
            raise ContractViolation(violations)
        state.dirty = found if self.manual else set()
        state.maybe.clear()

    def cleared(self, slot: int, pages: Iterable[int]) -> None:
        """KVM_CLEAR_DIRTY_LOG was asked to clear *pages*."""
        self.slots[slot].dirty -= set(pages)
        self.slots[slot].maybe -= set(pages)


@dataclass
class RingState:
    """A vCPU's ring: the entries that KVM pushed, and that user space took but KVM did not yet take back."""

    waiting: deque[Entry] = field(default_factory=deque)
    taken: list[Entry] = field(default_factory=list)

    @property
    def used(self) -> int:
        """How many entries KVM cannot use."""
        return len(self.waiting) + len(self.taken)


class RingModel(DirtyModel):
    """For dirty rings, one per vCPU.

    :param soft_limit: with so many entries used a vCPU does not go on
    """

    def __init__(self, vcpus: int, soft_limit: int, emulates: bool) -> None:
        super().__init__(emulates)
        self.rings = [RingState() for _ in range(vcpus)]
        self.soft_limit = soft_limit

    def _begin(self, state: SlotState) -> None:
        state.writable.clear()
        state.unsure.clear()

    def ran(self, vcpu: int, slot: int, accesses: Iterable[tuple[Access, int]], pushed: Sequence[Entry]) -> None:
        state, left = self.slots[slot], deque(pushed)
        for access, page in accesses:
            push = self._push(state, access, page) if state.tracked else Push.NO
            came = bool(left) and left[0] == (slot, page)
            if came and push is not Push.NO:
                left.popleft()
            elif push is Push.MUST:
                raise _of_vcpu(Kind.LOST, vcpu, f"its ring lacks {(slot, page)}, it got {_entries(pushed)}", slot, page)
            self._mapped(state, access, page, push, came)
        if left:
            detail = f"nothing it did puts {left[0]} into its ring, which got {_entries(pushed)}"
            raise _of_vcpu(Kind.SPURIOUS, vcpu, detail, *left[0])
        self.rings[vcpu].waiting += pushed

    def _push(self, state: SlotState, access: Access, page: int) -> Push:
        if access is Access.REDONE:
            return Push.MAY
        if access is Access.LOAD:
            return Push.MAY if self._may_map_writable(state, page) else Push.NO
        if self.emulates:
            return Push.MUST
        if page in state.unsure:
            return Push.MAY
        return Push.NO if page in state.writable else Push.MUST

    def _mapped(self, state: SlotState, access: Access, page: int, push: Push, came: bool) -> None:
        """Note how a page is mapped after an access that made, or did not make, an entry."""
        state.mapped.add(page)
        if access is Access.STORE or (came and push is not Push.NO):
            state.unsure.discard(page)
            state.writable.add(page)

    def harvested(self, vcpu: int, most: int, entries: Sequence[Entry]) -> None:
        """User space asked for *most* entries of a vCPU, and took *entries*.

        :raises ContractViolation: others were to come
        """
        ring = self.rings[vcpu]
        expected = [ring.waiting.popleft() for _ in range(min(most, len(ring.waiting)))]
        if expected != list(entries):
            detail = f"its ring gave {_entries(entries)}, what KVM put there is {_entries(expected)}"
            raise _of_vcpu(Kind.OTHER, vcpu, detail)
        ring.taken += entries

    def reset(self, count: int) -> None:
        """KVM_RESET_DIRTY_RINGS returned *count*: all that was taken is armed again.

        :raises ContractViolation: it has to return another number
        """
        expected = sum(len(ring.taken) for ring in self.rings)
        if count != expected:
            raise violated(Kind.RESET_COUNT, f"{expected} harvested, {count} reset")
        for ring in self.rings:
            for slot, page in ring.taken:
                if slot in self.slots:
                    self.slots[slot].writable.discard(page)
                    self.slots[slot].unsure.discard(page)
            ring.taken.clear()


def _of_vcpu(kind: Kind, vcpu: int, detail: str, slot: int | None = None, *pages: int) -> ContractViolation:
    return ContractViolation([Violation(kind, detail, slot, pages, vcpu)])


def _entries(entries: Sequence[Entry]) -> str:
    shown = ", ".join(map(str, entries[:6])) or "nothing"
    return shown + (f" and {len(entries) - 6} more" if len(entries) > 6 else "")
