# SPDX-License-Identifier: GPL-2.0-only
"""Every way in which a write reaches guest memory is reported, and nothing else is."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import pytest

from lib import uapi
from lib.kvm import Kvm
from lib.log_modes import LOG_MODES
from lib.tracked_vm import FIRST_GPA, PAGE, NotEmulated, Operation, TrackedVm
from lib.vcpu import Vcpu

SLOT, NEIGHBOUR = 1, 2
NPAGES = 24
WRITTEN = 5
PORT = 0xE0
RET = 0xC3


@pytest.fixture(params=list(LOG_MODES))
def tracked(kvm: Kvm, request: pytest.FixtureRequest, needs_log_mode: Callable[[str], None]) -> Iterator[TrackedVm]:
    """Two tracked slots side by side, all of whose pages the guest has read."""
    needs_log_mode(request.param)
    with TrackedVm(kvm, request.param) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.add_slot(NEIGHBOUR, FIRST_GPA + NPAGES * PAGE, NPAGES)
        vm.run(*(Operation("load", vm.address(slot, page)) for slot in (SLOT, NEIGHBOUR) for page in range(NPAGES)))
        vm.expect("loads of all pages", {})
        yield vm


Emulated = Callable[[str], AbstractContextManager[None]]


@pytest.fixture
def emulated(emulates: bool, lacks: Callable[[str], None]) -> Emulated:
    """Runs an instruction that a backend which emulates every one may not know; then the test is skipped."""

    @contextmanager
    def emulated(name: str) -> Iterator[None]:
        try:
            yield
        except NotEmulated as error:
            if not emulates:
                raise
            lacks(f"{name}: this backend emulates every instruction: {error}")

    return emulated


@dataclass(frozen=True)
class Store:
    """An operation that writes *size* bytes at its address; *aligned* ones must not straddle."""

    name: str
    size: int
    value: int = 0xA5
    count: int = 0
    aligned: bool = False

    @property
    def writes(self) -> int:
        """How many writes it makes to a page at most."""
        return max(1, self.count if self.name.startswith("rep_") else 1)


STORES = [
    *(Store(f"store_{size}", size) for size in (1, 2, 4, 8, 16)),
    Store("store_nontemporal", 8),
    Store("store_nontemporal_16", 16, aligned=True),
    Store("push", 8),
    Store("call", 8),
    Store("rep_stosb", 100, count=100),
    Store("rep_stosq", 800, count=100),
    Store("fxsave", 512, aligned=True),
    Store("add", 8),
    Store("lock_add", 8),
    Store("xchg", 8),
    Store("bts", 8, value=3),
    Store("cmpxchg", 8),
    Store("cmpxchg16b", 16, aligned=True),
]


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.name)
def test_a_store_is_reported(tracked: TrackedVm, emulated: Emulated, store: Store) -> None:
    """Inside a page, at its very end, and again after a collection."""
    for offset in (0, PAGE - store.size):
        for repetition in ("first", "second"):
            operation = Operation(store.name, tracked.address(SLOT, WRITTEN, offset), store.value, store.count)
            with emulated(store.name):
                tracked.run(operation)
            tracked.expect(f"{repetition} {store.name} at offset {offset}", {SLOT: [WRITTEN]}, store.writes)


@pytest.mark.parametrize(
    "store", [store for store in STORES if not store.aligned and store.size > 1], ids=lambda s: s.name
)
def test_a_store_that_straddles_two_pages_is_reported_in_both(tracked: TrackedVm, store: Store) -> None:
    """Also where the pages belong to different slots."""
    tracked.run(Operation(store.name, tracked.address(SLOT, WRITTEN + 1, -(store.size // 2)), store.value, store.count))
    tracked.expect(f"{store.name} over a page's end", {SLOT: [WRITTEN, WRITTEN + 1]}, store.writes)
    tracked.run(Operation(store.name, tracked.address(NEIGHBOUR, 0, -(store.size // 2)), store.value, store.count))
    tracked.expect(f"{store.name} over a slot's end", {SLOT: [NPAGES - 1], NEIGHBOUR: [0]}, store.writes)


def test_a_compare_and_exchange_that_fails_is_a_write(tracked: TrackedVm) -> None:
    """The CPU writes the old value back (Intel SDM, CMPXCHG); KVM's emulator has to as well (commit 910c57dfa4d1)."""
    tracked.run(Operation("cmpxchg", tracked.address(SLOT, WRITTEN), 1, count=77))
    tracked.expect("cmpxchg that fails", {SLOT: [WRITTEN]})


def test_long_string_stores_are_reported_page_by_page(tracked: TrackedVm) -> None:
    """Upwards and downwards, from one slot into the next; and a copy reports its target only."""
    words = PAGE // 8
    tracked.run(Operation("rep_stosq", tracked.address(SLOT, NPAGES - 2, 16), 1, 3 * words))
    tracked.expect("rep stosq", {SLOT: [NPAGES - 2, NPAGES - 1], NEIGHBOUR: [0, 1]}, words)
    tracked.run(Operation("rep_stosq_down", tracked.address(SLOT, 4, 16), 1, 3 * words))
    tracked.expect("rep stosq downwards", {SLOT: [1, 2, 3, 4]}, words)
    tracked.run(Operation("rep_movsq", tracked.address(SLOT, 8), tracked.address(NEIGHBOUR, 8), 2 * words))
    tracked.expect("rep movsq", {SLOT: [8, 9]}, words)


@pytest.mark.parametrize("length", [16, 200], ids=["one-page", "two-pages"])
def test_string_input_from_a_port_is_reported(tracked: TrackedVm, length: int) -> None:
    """What user space answers to KVM_EXIT_IO, KVM itself writes into the guest's memory."""

    def answer(vcpu: Vcpu) -> bool:
        run = vcpu.run
        if run.exit_reason != uapi.KVM_EXIT_IO or run.io.direction != uapi.KVM_EXIT_IO_IN or run.io.port != PORT:
            return False
        ctypes.memset(ctypes.addressof(run) + run.io.data_offset, 0x5A, run.io.size * run.io.count)
        return True

    start = tracked.address(SLOT, WRITTEN, PAGE - 100)
    tracked.run(Operation("rep_insb", start, PORT, length), on_exit=answer)
    pages = [WRITTEN] if length <= 100 else [WRITTEN, WRITTEN + 1]
    tracked.expect(f"rep insb of {length} bytes", {SLOT: pages}, length)
    memory = tracked.vm.memslots[SLOT].memory.view
    first = WRITTEN * PAGE + PAGE - 100
    assert bytes(memory[first : first + length]) == b"\x5a" * length


@pytest.mark.parametrize("name", ["load", "prefetch", "clflush", "test", "store_nothing"])
def test_what_does_not_write_is_not_reported(tracked: TrackedVm, name: str) -> None:
    tracked.run(*(Operation(name, tracked.address(SLOT, page)) for page in range(NPAGES)))
    tracked.expect(name, {})
    tracked.write(SLOT, WRITTEN)
    tracked.expect(f"a store after {name}", {SLOT: [WRITTEN]})


def test_reading_a_string_is_not_reported(tracked: TrackedVm) -> None:
    tracked.run(Operation("rep_lodsb", tracked.address(SLOT, 0), count=4 * PAGE))
    tracked.expect("rep lodsb", {})


def test_executing_is_not_reported(tracked: TrackedVm) -> None:
    """Once the page is mapped: the host's write of the code unmaps it, and KVM then maps it writable at the first access of
    any kind, for which it counts as dirty from then on (make_spte(), arch/x86/kvm/mmu/spte.c).
    """
    tracked.vm.memslots[SLOT].memory.view[WRITTEN * PAGE] = RET
    call = Operation("execute", tracked.address(SLOT, WRITTEN))
    tracked.run(call)
    tracked.collect()
    tracked.run(call)
    tracked.expect("a call into the slot", {})


def test_writes_of_user_space_are_not_reported(tracked: TrackedVm) -> None:
    """KVM does not see what goes through user space's own mapping (api.rst 4.8 speaks of the guest)."""
    memory = tracked.vm.memslots[SLOT].memory.view
    for page in range(NPAGES):
        memory[page * PAGE] = 1
    tracked.expect("writes through the host's mapping", {})


def test_an_untracked_slot_is_not_reported(tracked: TrackedVm) -> None:
    tracked.set_tracking(NEIGHBOUR, on=False)
    tracked.write(NEIGHBOUR, 1, 2)
    tracked.write(SLOT, WRITTEN)
    tracked.expect("writes to an untracked slot, and one to a tracked one", {SLOT: [WRITTEN]})
