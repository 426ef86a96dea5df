# SPDX-License-Identifier: GPL-2.0-only
"""Models of KVM's dirty logging that predict each report: one for bitmaps, one for rings.

A model is given each operation on a VM and its result, and checks the result. Pages are offsets in their slot. The models
require that guest memory is populated and writable in the host's page tables before its slot is created. Writes of user space
then change nothing there, and KVM's SPTEs come and go by these rules only (arch/x86/kvm/mmu/ in Linux 6.12):

- A store to a page of a slot with dirty logging is reported: in a bitmap by its bit, in a ring by an entry. A ring gets no
  entry while KVM has the page mapped writable: its entry was pushed before (make_spte(), fast_pf_fix_direct_spte()).
- A load may be reported if its page is not mapped: KVM maps a page that the host may write writable at once, and logs what it
  maps writable (make_spte()). It need not: with shadow paging the guest's own dirty bit decides (FNAME(page_fault)()).
  No other load is reported.
- Moving or deleting a slot zaps all SPTEs of the VM, or only those of the slot; which one depends on the kernel
  (KVM_X86_QUIRK_SLOT_ZAP_ALL). A writable page of another slot is then still writable, or not mapped.
- A backend that emulates every instruction has no SPTEs: each store is reported, and no load.
"""

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from dirty_tracking.violations import ContractViolation, Kind, Violation, violated
from kvm_util.wording import listed

Entry = tuple[int, int]  # slot and offset of a ring's entry
_MASK_PAGES = 64  # of the mask that a reset joins entries into, on 64-bit hosts


class Access(Enum):
    """What a vCPU did to a page; *RETRIED* is an access that filled the ring, and may fault again after the reset."""

    STORE = auto()
    LOAD = auto()
    RETRIED = auto()


class Push(Enum):
    """Whether KVM pushes an entry for an access."""

    MUST = auto()
    MAY = auto()
    NO = auto()


@dataclass
class SlotState:
    """A slot as the model sees it.

    :ivar mapped: pages that KVM certainly has mapped
    :ivar dirty: bitmaps: pages whose bit is set
    :ivar maybe_dirty: bitmaps: pages whose bit may be set
    :ivar writable: rings: pages that KVM has mapped writable, so that a store pushes no entry
    :ivar maybe_writable: rings: pages that KVM may have mapped writable
    """

    npages: int
    logged: bool
    mapped: set[int] = field(default_factory=set)
    dirty: set[int] = field(default_factory=set)
    maybe_dirty: set[int] = field(default_factory=set)
    writable: set[int] = field(default_factory=set)
    maybe_writable: set[int] = field(default_factory=set)


class DirtyModel(ABC):
    """The slots of a VM, and the rules that bitmaps and rings have in common.

    :param emulates: the backend emulates every instruction of the guest
    """

    def __init__(self, emulates: bool) -> None:
        self.slots: dict[int, SlotState] = {}
        self.emulates = emulates

    def create(self, slot: int, npages: int, logged: bool) -> None:
        """A slot was created; none of its pages is mapped."""
        self.slots[slot] = SlotState(npages, logged)
        if logged:
            self._enable_logging(self.slots[slot])

    def delete(self, slot: int) -> None:
        """A slot was deleted: its bitmap is lost with it, its ring entries are not."""
        del self.slots[slot]
        self._zap()

    def move(self, slot: int) -> None:
        """A slot was moved: its SPTEs were zapped, and it keeps its bitmap (kvm_prepare_memory_region())."""
        self._zap()
        state = self.slots[slot]
        state.writable.clear()
        state.maybe_writable.clear()

    def set_dirty_logging(self, slot: int, enable: bool) -> None:
        """Dirty logging was enabled or disabled; the present state again changes nothing."""
        state = self.slots[slot]
        if state.logged != enable:
            state.logged = enable
            state.dirty.clear()
            state.maybe_dirty.clear()
            if enable:
                self._enable_logging(state)

    def _zap(self) -> None:
        for state in self.slots.values():
            state.mapped.clear()
            state.maybe_writable |= state.writable
            state.writable.clear()

    @abstractmethod
    def _enable_logging(self, state: SlotState) -> None:
        """Dirty logging of a slot was enabled."""

    @abstractmethod
    def ran(self, vcpu: int, slot: int, accesses: Sequence[tuple[Access, int]], pushed: Sequence[Entry]) -> None:
        """A vCPU made *accesses* to pages of a slot, to each page at most once.

        :param pushed: the new entries of its ring
        :raises ContractViolation: KVM had to push other entries
        """

    def _may_map_writable(self, state: SlotState, page: int) -> bool:
        """Whether a load may have KVM map a page writable."""
        return not self.emulates and page not in state.mapped


class BitmapModel(DirtyModel):
    """The model for dirty bitmaps.

    :param manual: GET clears nothing (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    :param initially_set: all pages are dirty when dirty logging is enabled (KVM_DIRTY_LOG_INITIALLY_SET)
    """

    def __init__(self, manual: bool, initially_set: bool, emulates: bool) -> None:
        super().__init__(emulates)
        self.manual = manual
        self.initially_set = initially_set

    def _enable_logging(self, state: SlotState) -> None:
        if self.initially_set:
            state.dirty = set(range(state.npages))

    def ran(self, vcpu: int, slot: int, accesses: Sequence[tuple[Access, int]], pushed: Sequence[Entry]) -> None:
        if pushed:
            raise _of_vcpu(Kind.SPURIOUS, vcpu, f"its ring has {_entries(pushed)}, and the VM has no rings")
        state = self.slots[slot]
        for access, page in accesses:
            if state.logged and access is Access.STORE:
                state.dirty.add(page)
                state.maybe_dirty.discard(page)
            elif state.logged and self._may_map_writable(state, page) and page not in state.dirty:
                state.maybe_dirty.add(page)
            state.mapped.add(page)

    def reported(self, slot: int, pages: Sequence[int]) -> None:
        """KVM_GET_DIRTY_LOG reported *pages*.

        :raises ContractViolation: it had to report other pages
        """
        state, found = self.slots[slot], set(pages)
        wrong = {Kind.LOST: state.dirty - found, Kind.SPURIOUS: found - state.dirty - state.maybe_dirty}
        violations = [
            Violation(kind, listed("page", sorted(pages)), slot, tuple(sorted(pages)))
            for kind, pages in wrong.items()
            if pages
        ]
        if violations:
            raise ContractViolation(violations)
        state.dirty = found if self.manual else set()
        state.maybe_dirty.clear()

    def cleared(self, slot: int, pages: Iterable[int]) -> None:
        """KVM_CLEAR_DIRTY_LOG was called with *pages* in its mask."""
        self.slots[slot].dirty -= set(pages)
        self.slots[slot].maybe_dirty -= set(pages)


@dataclass
class RingState:
    """A vCPU's ring: the entries that wait for a harvest, and the harvested ones that wait for a reset."""

    waiting: deque[Entry] = field(default_factory=deque)
    harvested: list[Entry] = field(default_factory=list)

    @property
    def used(self) -> int:
        """How many entries KVM cannot push to."""
        return len(self.waiting) + len(self.harvested)


class RingModel(DirtyModel):
    """The model for dirty rings, one per vCPU.

    :param soft_limit: the number of used entries at which KVM_RUN returns KVM_EXIT_DIRTY_RING_FULL
    :param most_used: how many entries are used at most; None if one exit can push any number of them
    :param drops_masks: a reset that joins an entry beyond the end of its slot with others may not write-protect their pages
        (known_bugs.toml, ring-reset-drops-mask)
    """

    def __init__(
        self, vcpus: int, soft_limit: int, emulates: bool, most_used: int | None = None, drops_masks: bool = False
    ) -> None:
        super().__init__(emulates)
        self.rings = [RingState() for _ in range(vcpus)]
        self.soft_limit = soft_limit
        self.most_used = most_used
        self.drops_masks = drops_masks

    def _enable_logging(self, state: SlotState) -> None:
        state.writable.clear()
        state.maybe_writable.clear()

    def ran(self, vcpu: int, slot: int, accesses: Sequence[tuple[Access, int]], pushed: Sequence[Entry]) -> None:
        state, left = self.slots[slot], deque(pushed)
        unseen = Counter((slot, page) for _, page in accesses)
        for access, page in accesses:
            push = self._push(state, access, page) if state.logged else Push.NO
            was_pushed = bool(left) and left[0] == (slot, page)
            if was_pushed and push is not Push.NO:
                left.popleft()
            elif push is Push.MUST:
                if (slot, page) in left:
                    raise _wrong_entry(vcpu, pushed, left, unseen)
                detail = f"its ring lacks {(slot, page)}; KVM pushed {_entries(pushed)}"
                raise _of_vcpu(Kind.LOST, vcpu, detail, slot, page)
            unseen[slot, page] -= 1
            self._update_mapping(state, access, page, push, was_pushed)
        if left:
            raise _wrong_entry(vcpu, pushed, left, unseen)
        ring = self.rings[vcpu]
        ring.waiting += pushed
        if self.most_used is not None and ring.used > self.most_used:
            raise _of_vcpu(Kind.OTHER, vcpu, f"its ring has {ring.used} used entries, {self.most_used} fill it")

    def _push(self, state: SlotState, access: Access, page: int) -> Push:
        if access is Access.RETRIED:
            return Push.MAY
        if access is Access.LOAD:
            return Push.MAY if self._may_map_writable(state, page) else Push.NO
        if self.emulates:
            return Push.MUST
        if page in state.maybe_writable:
            return Push.MAY
        return Push.NO if page in state.writable else Push.MUST

    def _update_mapping(self, state: SlotState, access: Access, page: int, push: Push, was_pushed: bool) -> None:
        """Update how KVM maps a page after an access, given whether that pushed an entry."""
        state.mapped.add(page)
        if access is Access.STORE or (was_pushed and push is not Push.NO):
            state.maybe_writable.discard(page)
            state.writable.add(page)

    def harvested(self, vcpu: int, most: int, entries: Sequence[Entry]) -> None:
        """User space harvested *entries* of a vCPU's ring, at most *most*.

        :raises ContractViolation: the ring had to have other entries
        """
        ring = self.rings[vcpu]
        expected = [ring.waiting.popleft() for _ in range(min(most, len(ring.waiting)))]
        if expected != list(entries):
            detail = f"the harvest returned {_entries(entries)}; KVM had pushed {_entries(expected)}"
            raise _of_vcpu(Kind.OTHER, vcpu, detail)
        ring.harvested += entries

    def reset(self, count: int) -> None:
        """KVM_RESET_DIRTY_RINGS returned *count*: the pages of all harvested entries are write-protected again.

        :raises ContractViolation: it had to return another number
        """
        expected = sum(len(ring.harvested) for ring in self.rings)
        if count != expected:
            raise violated(Kind.RESET_COUNT, f"{expected} harvested, {count} reset")
        for ring in self.rings:
            for slot, pages in _joined(ring.harvested):
                if slot in self.slots:
                    self._write_protect(self.slots[slot], pages)
            ring.harvested.clear()

    def _write_protect(self, state: SlotState, pages: set[int]) -> None:
        if self.drops_masks and max(pages) >= state.npages:
            state.maybe_writable |= pages & state.writable
        else:
            state.maybe_writable -= pages
        state.writable -= pages


def _joined(entries: Iterable[Entry]) -> Iterator[tuple[int, set[int]]]:
    """The slots and pages of *entries*, joined as KVM resets them: neighbours in a ring that one mask of 64 pages can hold.

    That is kvm_dirty_ring_reset(), virt/kvm/dirty_ring.c.

    >>> list(_joined([(1, 69), (1, 60), (2, 61), (1, 62), (1, 126)]))
    [(1, {60, 69}), (2, {61}), (1, {62}), (1, {126})]
    """
    slot, pages = 0, set[int]()
    for next_slot, page in entries:
        if pages and (next_slot != slot or max(*pages, page) - min(*pages, page) >= _MASK_PAGES):
            yield slot, pages
            pages = set()
        slot = next_slot
        pages.add(page)
    if pages:
        yield slot, pages


def _of_vcpu(kind: Kind, vcpu: int, detail: str, slot: int | None = None, *pages: int) -> ContractViolation:
    return ContractViolation([Violation(kind, detail, slot, pages, vcpu)])


def _wrong_entry(
    vcpu: int, pushed: Sequence[Entry], left: Sequence[Entry], unseen: Mapping[Entry, int]
) -> ContractViolation:
    """The first of *left*, which end *pushed*, is wrong: no access pushes it, or only one of *unseen*, which come later."""
    wrong, before = left[0], pushed[: len(pushed) - len(left)]
    if unseen.get(wrong):
        kind, what = Kind.OTHER, "its accesses push {} later"
    else:
        kind = Kind.DUPLICATE if wrong in before else Kind.SPURIOUS
        what = "none of its accesses pushes {}"
    return _of_vcpu(kind, vcpu, f"{what.format(wrong)}; KVM pushed {_entries(pushed)}", *wrong)


def _entries(entries: Sequence[Entry]) -> str:
    shown = ", ".join(map(str, entries[:6])) or "nothing"
    return shown + (f" and {len(entries) - 6} more" if len(entries) > 6 else "")
