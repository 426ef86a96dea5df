# SPDX-License-Identifier: GPL-2.0-only
"""Operation sequences: steps of a guest and its VMM, executed on a real VM and on the model of the contract (model.py).

A sequence is a list of steps, and prints as a script that repeats it. A step that is impossible at its place, such as a
write to an absent slot, is skipped. So every list of steps is a valid sequence, and so is every part of one.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dirty_tracking.bitmap import bitmap_of
from dirty_tracking.memory_check import WORDS_PER_PAGE
from dirty_tracking.model import Access, BitmapModel, Entry, RingModel
from dirty_tracking.modes import LOG_MODES, set_dirty_logging
from dirty_tracking.platform import KVM_RESERVED, reserved_entries, uses_pml
from dirty_tracking.ring import ENTRY_SIZE, reset_harvested
from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.violations import ContractViolation, Kind, Violation, violated
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util import uapi
from kvm_util.closing import Closing
from kvm_util.guest import GuestError
from kvm_util.guest_program import assemble_all
from kvm_util.host import EMULATING_BACKENDS, Host, this_host
from kvm_util.ioctl import KvmError
from kvm_util.kvm import DEFAULT_DEVICE, Kvm
from kvm_util.memory import BACKINGS, GuestMemory
from kvm_util.vcpu import Vcpu
from kvm_util.wording import counted, listed

VCPUS = 2
# Adjacent places for slots; in none does a slot begin or end on a 64-page boundary of guest memory
PLACES = 4
MOST_PAGES = 130
SIZES = (70, 64, MOST_PAGES)
# Writes between two exits. kvm_pvm emulates a batch of instructions before it checks for a full ring; with more writes, one
# batch could overrun the ring's reserved entries (known_bugs.toml, pvm-ring-overflow).
MOST_WRITES = 40

_DIRTY_AND_RESET = uapi.KVM_DIRTY_GFN_F_DIRTY | uapi.KVM_DIRTY_GFN_F_RESET

Pages = tuple[int, ...] | range


@dataclass(frozen=True)
class FailedSequence:
    """The evidence of a sequence that failed.

    :ivar steps: the executed steps, of which the last one failed
    :ivar violations: the difference between KVM and the model
    :ivar ring_entries: entries of each ring
    :ivar drops_masks: as in :func:`run_sequence`
    """

    mode: str
    steps: tuple["Step", ...]
    violations: tuple[Violation, ...]
    ring_entries: int
    drops_masks: bool = False

    @property
    def script(self) -> str:
        """A script that repeats the sequence."""
        return script(self.mode, self.steps, self.drops_masks)

    def lines(self) -> list[str]:
        what = "the shortest failing sequence, as a script (PYTHONPATH=lib .venv/bin/python - < FILE, in the suite's folder):"
        return [what, "", *self.script.splitlines()]

    def data(self) -> dict[str, Any]:
        return {"script": self.script}


class SequenceFailed(ContractViolation):
    """KVM and the model differ, or a step failed in KVM or in the guest.

    :ivar sequence: the executed steps
    """

    def __init__(self, sequence: FailedSequence) -> None:
        self.sequence = sequence
        doing = f"{sequence.mode}: step {len(sequence.steps)}, {sequence.steps[-1]}"
        super().__init__(sequence.violations, doing, sequence)


def script(mode: str, steps: Sequence["Step"], drops_masks: bool = False) -> str:
    """A Python script that executes *steps* in log mode *mode*, to be run in the suite's folder."""
    option = ", drops_masks=True" if drops_masks else ""
    names = ", ".join(sorted({type(step).__name__ for step in steps})) + ", replay"
    lines = "".join(f"    {step},\n" for step in steps)
    return f'from dirty_tracking.sequences import {names}\n\nreplay("{mode}", [\n{lines}]{option})\n'


def replay(mode: str, steps: Sequence["Step"], device: str = DEFAULT_DEVICE, drops_masks: bool = False) -> None:
    """Execute a sequence on this host's KVM, and print the result; the scripts call it.

    :param drops_masks: as in :func:`run_sequence`
    :raises SystemExit: KVM and the model differ; the text says how
    """
    assemble_all()
    with Kvm(device) as kvm:
        try:
            run_sequence(kvm, this_host(), mode, steps, drops_masks)
        except SequenceFailed as failure:
            sys.exit(str(failure))
    print(f"{mode}: KVM and the model agree in all of {counted(len(steps), 'step')}")


def run_sequence(
    kvm: Kvm,
    host: Host,
    mode: str,
    steps: Sequence["Step"],
    drops_masks: bool = False,
) -> int:
    """Execute a sequence in a new VM; returns how many of its steps were possible.

    :param drops_masks: this kernel has the bug ring-reset-drops-mask (``RingModel``)
    :raises SequenceFailed: KVM and the model differ
    """
    done: list[Step] = []
    with ModelCheckedVm(kvm, host, mode, drops_masks) as vm:
        for step in steps:
            clamped = step.clamped(vm)
            if clamped is None:
                continue
            done.append(clamped)
            try:
                clamped.execute(vm)
                vm.check_no_new_entries()
            except (ContractViolation, KvmError, GuestError) as error:
                found = (
                    error.violations if isinstance(error, ContractViolation) else (Violation(Kind.OTHER, str(error)),)
                )
                raise SequenceFailed(FailedSequence(mode, tuple(done), found, vm.ring_entries, drops_masks)) from error
    return len(done)


class ModelCheckedVm(Closing):
    """A VM with two vCPUs and no slots at first, each operation of which is checked against the model."""

    def __init__(self, kvm: Kvm, host: Host, mode: str, drops_masks: bool = False) -> None:
        log_mode = LOG_MODES[mode]
        self.emulates = host.backend in EMULATING_BACKENDS
        self.ring_entries = 1024 if uses_pml(host) else PAGE // ENTRY_SIZE
        self.model: BitmapModel | RingModel
        if log_mode.uses_ring:
            soft_limit = self.ring_entries - reserved_entries(host)
            # Without emulation, the exit that fills a ring pushes one entry, and at most those of the CPU's own log (PML).
            most = None if self.emulates else self.ring_entries - KVM_RESERVED if uses_pml(host) else soft_limit
            self.model = RingModel(VCPUS, soft_limit, self.emulates, most, drops_masks)
        else:
            self.model = BitmapModel(log_mode.manual, log_mode.initially_set, self.emulates)
        self.test_vm = ScriptedVm(kvm, mode, VCPUS, self.ring_entries)
        self.vm = self.test_vm.vm
        self.test_vm.map(FIRST_GPA, PLACES * MOST_PAGES)
        for ring in self.test_vm.rings:
            # The other valid way to mark an entry as harvested (api.rst, dirty ring): its DIRTY flag stays set.
            ring.mark = _DIRTY_AND_RESET
        self._writes = 0

    @property
    def has_rings(self) -> bool:
        """Whether the VM has dirty rings."""
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

    def set_slot(self, slot: int, place: int, memory: GuestMemory, logged: bool) -> None:
        """KVM_SET_USER_MEMORY_REGION."""
        flags = uapi.KVM_MEM_LOG_DIRTY_PAGES if logged else 0
        self.vm.set_user_memory_region(slot, gpa_of(place), memory, flags)

    def is_occupied(self, place: int) -> bool:
        """Whether a slot is at *place*."""
        return gpa_of(place) in [memslot.gpa for memslot in self.vm.memslots.values()]

    def clamp_pages(self, slot: int, pages: Pages) -> Pages:
        """Those of *pages* that the slot has; none for an absent slot."""
        npages = self.model.slots[slot].npages if slot in self.model.slots else 0
        if isinstance(pages, range):
            return range(min(pages.start, npages), min(pages.stop, npages))
        return tuple(page for page in pages if page < npages)

    def run(self, vcpu: int, slot: int, access: Access, pages: Pages) -> None:
        """Have a vCPU load or store a word of each page, and check the entries that KVM pushed to its ring."""
        self._writes += 1
        left = [(access, page) for page in pages]
        full_at_first = self._is_full(vcpu)

        def on_exit(handle: Vcpu) -> bool:
            nonlocal left, full_at_first
            full: bool = handle.run.exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL
            if full_at_first and not full:
                raise violated(Kind.OTHER, f"vCPU {vcpu}: its ring is full, and the guest ran ({handle.exit_reason()})")
            if full:
                left = self._ring_was_full(vcpu, slot, left)
            full_at_first = False
            return full

        name = "store_8" if access is Access.STORE else "load"
        operations = [Operation(name, self.test_vm.address(slot, page), self._writes) for page in pages]
        self.test_vm.run(*operations, vcpu=vcpu, on_exit=on_exit)
        self.model.ran(vcpu, slot, left, self.new_entries(vcpu))
        if access is Access.STORE:
            words = self.vm.memslots[slot].memory.words
            if wrong := [page for page in pages if words[page * WORDS_PER_PAGE] != self._writes]:
                detail = f"the stores did not reach pages {wrong} of its memory"
                raise ContractViolation([Violation(Kind.VALUE, detail, slot, tuple(wrong), vcpu)])

    def _ring_was_full(self, vcpu: int, slot: int, left: list[tuple[Access, int]]) -> list[tuple[Access, int]]:
        """Check the accesses up to the full ring, harvest and reset all rings, and return the accesses that are left.

        The access that filled the ring is in flight: KVM pushed its entry when it made the page writable, and the vCPU exits
        before the store retires. After the reset the store faults again and may be pushed again (vcpu_enter_guest(),
        arch/x86/kvm/x86.c).
        """
        pushed = self.new_entries(vcpu)
        done = 1 + next((index for index, (_, page) in enumerate(left) if pushed and (slot, page) == pushed[-1]), -1)
        self.model.ran(vcpu, slot, left[:done], pushed)
        if not self._is_full(vcpu):
            used = counted(self._used(vcpu), "entry", "entries")
            raise violated(Kind.OTHER, f"vCPU {vcpu}: KVM_EXIT_DIRTY_RING_FULL, with {used} used")
        self.empty_rings()
        again = [(Access.RETRIED, left[done - 1][1])] if done and not self.emulates else []
        return again + left[done:]

    def _used(self, vcpu: int) -> int:
        return self.rings.rings[vcpu].used

    def _is_full(self, vcpu: int) -> bool:
        return self.has_rings and self._used(vcpu) >= self.rings.soft_limit

    def new_entries(self, vcpu: int) -> list[Entry]:
        """The entries that KVM pushed to the ring of *vcpu* since the last call; they stay in the ring.

        :raises ContractViolation: KVM pushed entries to another vCPU's ring
        """
        new = self._peek_rings()
        for other, entries in new.items():
            if other != vcpu and entries:
                raise violated(Kind.SPURIOUS, f"vCPU {vcpu} ran, and KVM pushed {entries} to the ring of vCPU {other}")
        return new.get(vcpu, [])

    def check_no_new_entries(self) -> None:
        """Check that KVM pushed no entry since the last call of :meth:`new_entries`.

        :raises ContractViolation: it did
        """
        found: dict[tuple[int, int], set[int]] = {}
        for vcpu, entries in self._peek_rings().items():
            for slot, page in entries:
                found.setdefault((vcpu, slot), set()).add(page)
        if found:
            detail = "no vCPU ran, and KVM pushed "
            raise ContractViolation(
                Violation(Kind.SPURIOUS, detail + listed("page", sorted(pages)), slot, tuple(sorted(pages)), vcpu)
                for (vcpu, slot), pages in found.items()
            )

    def _peek_rings(self) -> dict[int, list[Entry]]:
        """The entries that KVM pushed since the last call, by vCPU; they stay in the rings."""
        return {vcpu: list(zip(*ring.peek(), strict=True)) for vcpu, ring in enumerate(self.test_vm.rings)}

    def get(self, slot: int) -> list[int]:
        """KVM_GET_DIRTY_LOG, checked against the model; returns the pages."""
        pages = self.test_vm.read_bitmap(slot)
        self.bitmaps.reported(slot, pages)
        return pages

    def clear(self, slot: int, first_page: int, num_pages: int, pages: Sequence[int]) -> None:
        """KVM_CLEAR_DIRTY_LOG with *pages*, which are in the range, in its mask."""
        self.vm.clear_dirty_log(slot, bitmap_of(pages, num_pages, first_page), first_page, num_pages)
        self.bitmaps.cleared(slot, pages)

    def harvest(self, vcpu: int, most: int) -> None:
        """Harvest at most *most* entries of a vCPU's ring, and check them against the model."""
        self.rings.harvested(vcpu, most, list(zip(*self.test_vm.rings[vcpu].harvest(most), strict=True)))

    def reset(self) -> None:
        """KVM_RESET_DIRTY_RINGS, checked against the model."""
        self.rings.reset(reset_harvested(self.vm))
        for vcpu, ring in enumerate(self.test_vm.rings):
            if left := ring.not_reset():
                raise violated(Kind.OTHER, f"vCPU {vcpu}: the reset left the flags of {left} harvested entries set")

    def close(self) -> None:
        """Close the VM."""
        self.test_vm.close()

    def empty_rings(self) -> None:
        """Harvest all entries of all rings, and reset them."""
        for vcpu in range(VCPUS):
            self.harvest(vcpu, self._used(vcpu))
        self.reset()


def gpa_of(place: int) -> int:
    """The guest-physical address of *place*."""
    return FIRST_GPA + place * MOST_PAGES * PAGE


class Step:
    """A step of a sequence."""

    def clamped(self, vm: ModelCheckedVm) -> "Step | None":
        """The possible part of the step in the present state of *vm*; None when there is none."""
        return self

    def execute(self, vm: ModelCheckedVm) -> None:
        """Execute the step, and check KVM's result against the model.

        :raises ContractViolation: KVM and the model differ
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Create(Step):
    """Create a slot of *npages* pages, whose memory is populated."""

    slot: int
    place: int
    npages: int
    logged: bool = True

    def clamped(self, vm: ModelCheckedVm) -> Step | None:
        return None if self.slot in vm.vm.memslots or vm.is_occupied(self.place) else self

    def execute(self, vm: ModelCheckedVm) -> None:
        memory = GuestMemory(BACKINGS["anonymous"], self.npages * PAGE, gpa_of(self.place))
        try:
            memory.view[::PAGE] = bytes(self.npages)  # the host maps each page writable from now on
            vm.set_slot(self.slot, self.place, memory, self.logged)
        except BaseException:
            memory.close()
            raise
        vm.model.create(self.slot, self.npages, self.logged)


@dataclass(frozen=True)
class Delete(Step):
    """Delete a slot."""

    slot: int

    def clamped(self, vm: ModelCheckedVm) -> Step | None:
        return self if self.slot in vm.vm.memslots else None

    def execute(self, vm: ModelCheckedVm) -> None:
        memory = vm.vm.memslots[self.slot].memory
        vm.vm.delete_memory_region(self.slot)
        memory.close()
        vm.model.delete(self.slot)


@dataclass(frozen=True)
class Move(Step):
    """Move a slot to another place."""

    slot: int
    place: int

    def clamped(self, vm: ModelCheckedVm) -> Step | None:
        return self if self.slot in vm.vm.memslots and not vm.is_occupied(self.place) else None

    def execute(self, vm: ModelCheckedVm) -> None:
        memslot = vm.vm.memslots[self.slot]
        vm.set_slot(self.slot, self.place, memslot.memory, vm.model.slots[self.slot].logged)
        vm.model.move(self.slot)


@dataclass(frozen=True)
class SetDirtyLogging(Step):
    """Enable or disable a slot's dirty logging, also when that is its state already."""

    slot: int
    enable: bool

    def clamped(self, vm: ModelCheckedVm) -> Step | None:
        return self if self.slot in vm.vm.memslots else None

    def execute(self, vm: ModelCheckedVm) -> None:
        set_dirty_logging(vm.vm, self.slot, self.enable)
        vm.model.set_dirty_logging(self.slot, self.enable)


@dataclass(frozen=True)
class _Pages(Step):
    """A step on pages of a slot."""

    slot: int
    pages: Pages

    def clamped(self, vm: ModelCheckedVm) -> Step | None:
        pages = vm.clamp_pages(self.slot, self.pages)
        return replace(self, pages=pages) if pages else None


@dataclass(frozen=True)
class Write(_Pages):
    """A vCPU stores a word in each page."""

    vcpu: int = 0

    def execute(self, vm: ModelCheckedVm) -> None:
        vm.run(self.vcpu, self.slot, Access.STORE, self.pages)


@dataclass(frozen=True)
class Load(_Pages):
    """A vCPU loads a word of each page."""

    vcpu: int = 0

    def execute(self, vm: ModelCheckedVm) -> None:
        vm.run(self.vcpu, self.slot, Access.LOAD, self.pages)


@dataclass(frozen=True)
class HostWrite(_Pages):
    """User space writes a word in each page through its own mapping, which KVM does not log."""

    def execute(self, vm: ModelCheckedVm) -> None:
        words = vm.vm.memslots[self.slot].memory.words
        for page in self.pages:
            words[page * WORDS_PER_PAGE + 1] += 1


@dataclass(frozen=True)
class Collect(Step):
    """Collect all dirty pages and have KVM write-protect them again, like a round of live migration."""

    def execute(self, vm: ModelCheckedVm) -> None:
        if vm.has_rings:
            vm.empty_rings()
            return
        for slot, state in vm.model.slots.items():
            if state.logged:
                pages = vm.get(slot)
                if vm.bitmaps.manual:
                    vm.clear(slot, 0, state.npages, pages)


@dataclass(frozen=True)
class Get(Step):
    """KVM_GET_DIRTY_LOG of a slot, without a CLEAR."""

    slot: int

    def clamped(self, vm: ModelCheckedVm) -> Step | None:
        logged = self.slot in vm.model.slots and vm.model.slots[self.slot].logged
        return self if logged and not vm.has_rings else None

    def execute(self, vm: ModelCheckedVm) -> None:
        vm.get(self.slot)


@dataclass(frozen=True)
class Clear(Step):
    """KVM_CLEAR_DIRTY_LOG of a range of a slot, with or without manual protection.

    :ivar first_page: a multiple of 64
    :ivar num_pages: a multiple of 64, or up to the slot's end
    :ivar pages: the pages in the mask
    """

    slot: int
    first_page: int
    num_pages: int
    pages: Pages

    def clamped(self, vm: ModelCheckedVm) -> Step | None:
        state = vm.model.slots.get(self.slot)
        if vm.has_rings or state is None or not state.logged or self.first_page >= state.npages:
            return None
        num_pages = min(self.num_pages, state.npages - self.first_page)
        pages = tuple(page for page in self.pages if self.first_page <= page < self.first_page + num_pages)
        return replace(self, num_pages=num_pages, pages=pages)

    def execute(self, vm: ModelCheckedVm) -> None:
        vm.clear(self.slot, self.first_page, self.num_pages, self.pages)


@dataclass(frozen=True)
class Harvest(Step):
    """Harvest at most *most* entries of a vCPU's ring."""

    vcpu: int
    most: int

    def clamped(self, vm: ModelCheckedVm) -> Step | None:
        return self if vm.has_rings else None

    def execute(self, vm: ModelCheckedVm) -> None:
        vm.harvest(self.vcpu, self.most)


@dataclass(frozen=True)
class Reset(Step):
    """KVM_RESET_DIRTY_RINGS."""

    def clamped(self, vm: ModelCheckedVm) -> Step | None:
        return self if vm.has_rings else None

    def execute(self, vm: ModelCheckedVm) -> None:
        vm.reset()
