# SPDX-License-Identifier: GPL-2.0-only
"""Histories: steps of a guest and its VMM, made on a real VM and on the model of the contract (model.py) alike.

A history is a list of steps, and prints as a script that makes it again. A step that cannot be made where it stands, such as a
write to a slot that is not there, is left out; so every list of steps is a history, and so is every part of it.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from dirty_tracking.bitmap import bitmap_of
from dirty_tracking.model import Access, BitmapModel, Entry, RingModel
from dirty_tracking.modes import LOG_MODES, disable_dirty_logging, enable_dirty_logging
from dirty_tracking.platform import reserved_entries, uses_pml
from dirty_tracking.ring import reset_until
from dirty_tracking.tracked_vm import FIRST_GPA, PAGE, Operation, TrackedVm
from dirty_tracking.violations import ContractViolation, Kind, Violation, violated
from kvm_util import uapi
from kvm_util.guest import GuestError
from kvm_util.guest_program import assemble_all
from kvm_util.host import EMULATING_BACKENDS, Host, this_host
from kvm_util.ioctl import KvmError
from kvm_util.kvm import DEFAULT_DEVICE, Kvm
from kvm_util.memory import BACKINGS, GuestMemory
from kvm_util.vcpu import Vcpu
from kvm_util.wording import counted

VCPUS = 2
# Where a slot can be: places side by side, in none of which it begins or ends on a 64-page boundary of guest memory
PLACES = 4
MOST_PAGES = 130
SIZES = (70, 64, MOST_PAGES)
# A write takes a backend that emulates batches of guest instructions fewer than it takes to overrun the reserved entries
# of a ring in one batch (known_bugs.toml, pvm-ring-overflow), if there are no more writes than this between two exits.
MOST_WRITES = 40

_WORDS_OF_PAGE = PAGE // 8
_DIRTY_AND_RESET = uapi.KVM_DIRTY_GFN_F_DIRTY | uapi.KVM_DIRTY_GFN_F_RESET

Pages = tuple[int, ...] | range


@dataclass(frozen=True)
class History:
    """The evidence of a history that failed.

    :ivar steps: what was done, the last step being the one that failed
    """

    mode: str
    steps: tuple["Step", ...]

    @property
    def script(self) -> str:
        """A script that makes the history again."""
        return script(self.mode, self.steps)

    def lines(self) -> list[str]:
        what = "the shortest history that fails, as a script (PYTHONPATH=lib python - < FILE, in the suite's folder):"
        return [what, "", *self.script.splitlines()]

    def data(self) -> dict[str, Any]:
        return {"script": self.script}


class HistoryFailed(ContractViolation):
    """KVM and the model differ, or KVM or the guest failed in a step.

    :ivar history: what was done until then
    """

    def __init__(self, history: History, error: ContractViolation | KvmError | GuestError) -> None:
        found = error.violations if isinstance(error, ContractViolation) else [Violation(Kind.OTHER, str(error))]
        self.history = history
        super().__init__(found, f"{history.mode}: step {len(history.steps)}, {history.steps[-1]}", history)


def script(mode: str, steps: Sequence["Step"]) -> str:
    """A Python script that makes *steps* in log mode *mode*, for a run in the suite's folder."""
    names = ", ".join(sorted({type(step).__name__ for step in steps})) + ", replay"
    lines = "".join(f"    {step},\n" for step in steps)
    return f'from dirty_tracking.sequences import {names}\n\nreplay("{mode}", [\n{lines}])\n'


def replay(mode: str, steps: Sequence["Step"], device: str = DEFAULT_DEVICE) -> None:
    """Make a history on this host's KVM, and say what came of it: what its script calls.

    :raises SystemExit: KVM and the model differ; the text says in what
    """
    assemble_all()
    with Kvm(device) as kvm:
        try:
            run_history(kvm, this_host(), mode, steps)
        except HistoryFailed as failure:
            sys.exit(str(failure))
    print(f"{mode}: KVM and the model agree in all of {counted(len(steps), 'step')}")


def run_history(
    kvm: Kvm,
    host: Host,
    mode: str,
    steps: Sequence["Step"],
    leave_out: Callable[["Pair", "Step"], bool] | None = None,
) -> int:
    """Make a history in a VM of its own; returns how many of its steps could be made.

    :param leave_out: steps that are not to be made, although they could
    :raises HistoryFailed: KVM and the model differ
    """
    done: list[Step] = []
    with Pair(kvm, host, mode) as pair:
        for step in steps:
            fitted = step.fitted(pair)
            if fitted is None or (leave_out is not None and leave_out(pair, fitted)):
                continue
            done.append(fitted)
            try:
                fitted.make(pair)
                pair.check_quiet()
            except (ContractViolation, KvmError, GuestError) as error:
                raise HistoryFailed(History(mode, tuple(done)), error) from error
    return len(done)


def shrinks_slot_in_rings(pair: "Pair", step: "Step") -> bool:
    """Whether a step makes a slot again that is smaller than it was when it got entries that a ring still has.

    Such an entry makes a reset lose others: KVM joins neighbouring entries of a slot to one mask, and drops the whole mask
    when its last page is beyond the slot's end (kvm_reset_dirty_gfn(), virt/kvm/dirty_ring.c; seen in 6.1, 6.12 and 7.2).
    It takes an entry at most 63 pages before that one, right beside it in the ring; what is left out is more, to keep the rule
    simple. test_ring_protocol.py has the shortest history, known_bugs.toml the entry. Where every store is emulated,
    nothing needs arming.
    """
    if pair.emulates or not pair.has_rings or not isinstance(step, Create):
        return False
    entries = [entry for ring in pair.rings.rings for entry in (*ring.waiting, *ring.taken)]
    return any(slot == step.slot and page >= step.npages for slot, page in entries)


class Pair:
    """A VM with two vCPUs and no slots, and the model that goes with it."""

    def __init__(self, kvm: Kvm, host: Host, mode: str) -> None:
        log_mode = LOG_MODES[mode]
        self.emulates = host.backend in EMULATING_BACKENDS
        entries = 1024 if uses_pml(host) else 256
        self.model: BitmapModel | RingModel
        if log_mode.uses_ring:
            self.model = RingModel(VCPUS, entries - reserved_entries(host), self.emulates)
        else:
            self.model = BitmapModel(log_mode.manual, log_mode.initially_set, self.emulates)
        self.tracked = TrackedVm(kvm, mode, VCPUS, entries)
        self.vm = self.tracked.vm
        self.tracked.map(FIRST_GPA, PLACES * MOST_PAGES)
        for ring in self.tracked.rings:
            # The other way to mark an entry as harvested (api.rst 8.29): its DIRTY flag stays.
            ring.mark = _DIRTY_AND_RESET
        self._writes = 0

    @property
    def has_rings(self) -> bool:
        """Whether this VM reports through rings."""
        return isinstance(self.model, RingModel)

    @property
    def rings(self) -> RingModel:
        """The model, in a mode with rings."""
        assert isinstance(self.model, RingModel)
        return self.model

    @property
    def bitmaps(self) -> BitmapModel:
        """The model, in a mode with bitmaps."""
        assert isinstance(self.model, BitmapModel)
        return self.model

    def set_slot(self, slot: int, place: int, memory: GuestMemory, tracked: bool) -> None:
        """KVM_SET_USER_MEMORY_REGION."""
        flags = uapi.KVM_MEM_LOG_DIRTY_PAGES if tracked else 0
        self.vm.set_user_memory_region(slot, gpa_of(place), memory, flags)

    def taken(self, place: int) -> bool:
        """Whether a slot is at a place."""
        return gpa_of(place) in [memslot.gpa for memslot in self.vm.memslots.values()]

    def inside(self, slot: int, pages: Pages) -> Pages:
        """Those of *pages* that the slot has; none when it is not there."""
        npages = self.model.slots[slot].npages if slot in self.model.slots else 0
        if isinstance(pages, range):
            return range(min(pages.start, npages), min(pages.stop, npages))
        return tuple(page for page in pages if page < npages)

    def run(self, vcpu: int, slot: int, access: Access, pages: Pages) -> None:
        """Have a vCPU load or store a word of each page, and compare what its ring got."""
        self._writes += 1
        left = [(access, page) for page in pages]
        full_at_first = self._is_full(vcpu)

        def on_exit(handle: Vcpu) -> bool:
            nonlocal left, full_at_first
            full: bool = handle.run.exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL
            if full_at_first and not full:
                raise violated(
                    Kind.OTHER, f"vCPU {vcpu}: its ring is full, and KVM_RUN went on ({handle.exit_reason()})"
                )
            if full:
                left = self._ring_was_full(vcpu, slot, left)
            full_at_first = False
            return full

        name = "store_8" if access is Access.STORE else "load"
        operations = [Operation(name, self.tracked.address(slot, page), self._writes) for page in pages]
        self.tracked.run(*operations, vcpu=vcpu, on_exit=on_exit)
        self.model.ran(vcpu, slot, left, self.pushed(vcpu))
        if access is Access.STORE:
            words = self.vm.memslots[slot].memory.words
            if wrong := [page for page in pages if words[page * _WORDS_OF_PAGE] != self._writes]:
                detail = f"the stores did not reach pages {wrong} of its memory"
                raise ContractViolation([Violation(Kind.VALUE, detail, slot, tuple(wrong), vcpu)])

    def _ring_was_full(self, vcpu: int, slot: int, left: list[tuple[Access, int]]) -> list[tuple[Access, int]]:
        """Note what was done when the ring got full, empty all rings, and return what is left to be done.

        The access that filled the ring was pushed as its page was made writable: a CPU makes it after that, and so after
        the reset, which has it pushed a second time (vcpu_enter_guest(), arch/x86/kvm/x86.c).
        """
        pushed = self.pushed(vcpu)
        done = 1 + next((index for index, (_, page) in enumerate(left) if pushed and (slot, page) == pushed[-1]), -1)
        self.model.ran(vcpu, slot, left[:done], pushed)
        if not self._is_full(vcpu):
            used = counted(self._used(vcpu), "entry", "entries")
            raise violated(Kind.OTHER, f"vCPU {vcpu}: KVM_EXIT_DIRTY_RING_FULL, with {used} used")
        self.empty_rings()
        again = [(Access.REDONE, left[done - 1][1])] if done and not self.emulates else []
        return again + left[done:]

    def _used(self, vcpu: int) -> int:
        return self.rings.rings[vcpu].used

    def _is_full(self, vcpu: int) -> bool:
        return self.has_rings and self._used(vcpu) >= self.rings.soft_limit

    def pushed(self, vcpu: int) -> list[Entry]:
        """What KVM put into a vCPU's ring since this was last asked.

        :raises ContractViolation: another ring got something
        """
        new = self._new_entries()
        for other, entries in new.items():
            if other != vcpu and entries:
                raise violated(Kind.SPURIOUS, f"vCPU {vcpu} ran, and the ring of vCPU {other} got {entries}")
        return new.get(vcpu, [])

    def check_quiet(self) -> None:
        """Hold KVM to it that no ring got anything since :meth:`pushed` was asked.

        :raises ContractViolation: one did
        """
        if new := {vcpu: entries for vcpu, entries in self._new_entries().items() if entries}:
            raise violated(Kind.SPURIOUS, f"no vCPU ran, and rings got {new}")

    def _new_entries(self) -> dict[int, list[Entry]]:
        """The entries that each ring got since the last call, by vCPU; they stay in the rings."""
        return {vcpu: list(zip(*ring.peek(), strict=True)) for vcpu, ring in enumerate(self.tracked.rings)}

    def get(self, slot: int) -> list[int]:
        """KVM_GET_DIRTY_LOG, held to the model; returns the pages."""
        pages = self.tracked.read_bitmap(slot)
        self.bitmaps.reported(slot, pages)
        return pages

    def clear(self, slot: int, first_page: int, num_pages: int, pages: Sequence[int]) -> None:
        """KVM_CLEAR_DIRTY_LOG of *pages*, which are in the range."""
        self.vm.clear_dirty_log(slot, bitmap_of(pages, num_pages, first_page), first_page, num_pages)
        self.bitmaps.cleared(slot, pages)

    def harvest(self, vcpu: int, most: int) -> None:
        """Take entries from a vCPU's ring."""
        self.rings.harvested(vcpu, most, list(zip(*self.tracked.rings[vcpu].harvest(most), strict=True)))

    def reset(self) -> None:
        """KVM_RESET_DIRTY_RINGS."""
        harvested = sum(len(ring.taken) for ring in self.rings.rings)
        self.rings.reset(reset_until(self.vm.reset_dirty_rings, lambda reset: reset >= harvested))
        for vcpu, ring in enumerate(self.tracked.rings):
            if left := ring.not_reset():
                raise violated(Kind.OTHER, f"vCPU {vcpu}: after the reset {left} of its entries are not KVM's again")

    def empty_rings(self) -> None:
        """Take all entries of all rings, and reset."""
        for vcpu in range(VCPUS):
            self.harvest(vcpu, self._used(vcpu))
        self.reset()

    def __enter__(self) -> "Pair":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tracked.close()


def gpa_of(place: int) -> int:
    """The guest-physical address of a place."""
    return FIRST_GPA + place * MOST_PAGES * PAGE


class Step:
    """A step of a history."""

    def fitted(self, pair: Pair) -> "Step | None":
        """As much of the step as can be made now; None when nothing of it can."""
        raise NotImplementedError

    def make(self, pair: Pair) -> None:
        """Make the step.

        :raises ContractViolation: KVM and the model differ
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Create(Step):
    """Make a slot of *npages* pages, of memory that is present."""

    slot: int
    place: int
    npages: int
    tracked: bool = True

    def fitted(self, pair: Pair) -> Step | None:
        return None if self.slot in pair.vm.memslots or pair.taken(self.place) else self

    def make(self, pair: Pair) -> None:
        memory = GuestMemory(BACKINGS["anonymous"], self.npages * PAGE, gpa_of(self.place))
        try:
            memory.view[::PAGE] = bytes(self.npages)  # so that the host has each page, writable, from now on
            pair.set_slot(self.slot, self.place, memory, self.tracked)
        except BaseException:
            memory.close()
            raise
        pair.model.create(self.slot, self.npages, self.tracked)


@dataclass(frozen=True)
class Delete(Step):
    """Delete a slot."""

    slot: int

    def fitted(self, pair: Pair) -> Step | None:
        return self if self.slot in pair.vm.memslots else None

    def make(self, pair: Pair) -> None:
        memory = pair.vm.memslots[self.slot].memory
        pair.vm.delete_memory_region(self.slot)
        memory.close()
        pair.model.delete(self.slot)


@dataclass(frozen=True)
class Move(Step):
    """Move a slot to another place."""

    slot: int
    place: int

    def fitted(self, pair: Pair) -> Step | None:
        return self if self.slot in pair.vm.memslots and not pair.taken(self.place) else None

    def make(self, pair: Pair) -> None:
        memslot = pair.vm.memslots[self.slot]
        pair.set_slot(self.slot, self.place, memslot.memory, pair.model.slots[self.slot].tracked)
        pair.model.move(self.slot)


@dataclass(frozen=True)
class SetTracking(Step):
    """Switch a slot's tracking on or off; also to what it is already."""

    slot: int
    on: bool

    def fitted(self, pair: Pair) -> Step | None:
        return self if self.slot in pair.vm.memslots else None

    def make(self, pair: Pair) -> None:
        (enable_dirty_logging if self.on else disable_dirty_logging)(pair.vm, self.slot)
        pair.model.set_tracking(self.slot, self.on)


@dataclass(frozen=True)
class _Pages(Step):
    """A step that concerns pages of a slot."""

    slot: int
    pages: Pages

    def fitted(self, pair: Pair) -> Step | None:
        pages = pair.inside(self.slot, self.pages)
        return replace(self, pages=pages) if pages else None


@dataclass(frozen=True)
class Write(_Pages):
    """A vCPU stores a word in each page."""

    vcpu: int = 0

    def make(self, pair: Pair) -> None:
        pair.run(self.vcpu, self.slot, Access.STORE, self.pages)


@dataclass(frozen=True)
class Load(_Pages):
    """A vCPU loads a word of each page."""

    vcpu: int = 0

    def make(self, pair: Pair) -> None:
        pair.run(self.vcpu, self.slot, Access.LOAD, self.pages)


@dataclass(frozen=True)
class HostWrite(_Pages):
    """User space writes a word in each page through its own mapping, which KVM does not report."""

    def make(self, pair: Pair) -> None:
        words = pair.vm.memslots[self.slot].memory.words
        for page in self.pages:
            words[page * _WORDS_OF_PAGE + 1] += 1


@dataclass(frozen=True)
class Collect(Step):
    """Take all that KVM reports, and have it track that anew, as a VMM's round of migration does."""

    def fitted(self, pair: Pair) -> Step | None:
        return self

    def make(self, pair: Pair) -> None:
        if pair.has_rings:
            pair.empty_rings()
            return
        for slot, state in pair.model.slots.items():
            if state.tracked:
                pages = pair.get(slot)
                if pair.bitmaps.manual:
                    pair.clear(slot, 0, state.npages, pages)


@dataclass(frozen=True)
class Get(Step):
    """KVM_GET_DIRTY_LOG of a slot, alone."""

    slot: int

    def fitted(self, pair: Pair) -> Step | None:
        tracked = self.slot in pair.model.slots and pair.model.slots[self.slot].tracked
        return self if tracked and not pair.has_rings else None

    def make(self, pair: Pair) -> None:
        pair.get(self.slot)


@dataclass(frozen=True)
class Clear(Step):
    """KVM_CLEAR_DIRTY_LOG of a range of a slot, with these pages in its mask; also without manual protection.

    :ivar first_page: a multiple of 64
    :ivar num_pages: likewise, or as far as the slot goes
    """

    slot: int
    first_page: int
    num_pages: int
    pages: Pages

    def fitted(self, pair: Pair) -> Step | None:
        state = pair.model.slots.get(self.slot)
        if pair.has_rings or state is None or not state.tracked or self.first_page >= state.npages:
            return None
        num_pages = min(self.num_pages, state.npages - self.first_page)
        pages = tuple(page for page in self.pages if self.first_page <= page < self.first_page + num_pages)
        return replace(self, num_pages=num_pages, pages=pages)

    def make(self, pair: Pair) -> None:
        pair.clear(self.slot, self.first_page, self.num_pages, self.pages)


@dataclass(frozen=True)
class Harvest(Step):
    """Take at most so many entries from a vCPU's ring."""

    vcpu: int
    most: int

    def fitted(self, pair: Pair) -> Step | None:
        return self if pair.has_rings else None

    def make(self, pair: Pair) -> None:
        pair.harvest(self.vcpu, self.most)


@dataclass(frozen=True)
class Reset(Step):
    """KVM_RESET_DIRTY_RINGS."""

    def fitted(self, pair: Pair) -> Step | None:
        return self if pair.has_rings else None

    def make(self, pair: Pair) -> None:
        pair.reset()
