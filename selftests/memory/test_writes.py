# SPDX-License-Identifier: GPL-2.0-only
"""Every way in which a write reaches guest memory is reported, and nothing else is."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import pytest

from dirty_tracking.tracked_vm import FIRST_GPA, GVA_OFFSET, PAGE, NotEmulated, Operation, TrackedVm
from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.guest import GuestError
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.vcpu import Vcpu

SLOT, NEIGHBOUR = 1, 2
NPAGES = 24
WRITTEN = 5
PORT = 0xE0
RET = 0xC3


@pytest.fixture
def tracked(kvm: Kvm, log_mode: str) -> Iterator[TrackedVm]:
    """Two tracked slots side by side, all of whose pages the guest has read."""
    with TrackedVm(kvm, log_mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.add_slot(NEIGHBOUR, FIRST_GPA + NPAGES * PAGE, NPAGES)
        vm.run(*(Operation("load", vm.address(slot, page)) for slot in (SLOT, NEIGHBOUR) for page in range(NPAGES)))
        vm.assert_dirty("loads of all pages", {})
        yield vm


Emulated = Callable[[str], AbstractContextManager[None]]


@pytest.fixture
def emulated(emulates: bool) -> Emulated:
    """Runs an instruction that a backend which emulates every one may not know; then the test is skipped."""

    @contextmanager
    def emulated(name: str) -> Iterator[None]:
        try:
            yield
        except NotEmulated as error:
            if not emulates:
                raise
            pytest.skip(f"{name}: this backend emulates every instruction: {error}")

    return emulated


Entries = Callable[[int], int]


@pytest.fixture
def entries(emulates: bool) -> Entries:
    """How many entries a page may have in a ring for so many writes of one instruction.

    One, where the CPU makes them: after the first KVM has the page mapped writable, and sees no other. Where KVM's emulator
    makes them, one for each (see TrackedVm.assert_dirty()).
    """
    return (lambda writes: writes) if emulates else lambda _writes: 1


@dataclass(frozen=True)
class Store:
    """An operation that writes *size* bytes at its address.

    :ivar aligned: it faults unless its address is a multiple of its size, and so never straddles two pages
    :ivar exchanges: it writes its value only where its count is what memory holds
    """

    name: str
    size: int
    value: int = 0xA5
    count: int = 0
    aligned: bool = False
    exchanges: bool = False

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
    Store("fxsave", 512),
    Store("add", 8),
    Store("lock_add", 8),
    Store("xchg", 8),
    Store("bts", 8, value=3),
    Store("cmpxchg", 8, exchanges=True),
    Store("lock_cmpxchg", 8, exchanges=True),
    Store("lock_cmpxchg16b", 16, aligned=True, exchanges=True),
    Store("sgdt", 10),
]
# The same done by KVM's emulator, whatever the backend
EMULATED = [
    *(Store(f"emulated_store_{size}", size) for size in (1, 2, 4, 8, 16)),
    Store("emulated_push", 8),
    Store("emulated_add", 8),
    Store("emulated_lock_add", 8),
    Store("emulated_xchg", 8),
    Store("emulated_cmpxchg", 8, exchanges=True),
    Store("emulated_lock_cmpxchg", 8, exchanges=True),
]


def stored_twice(vm: TrackedVm, store: Store, offset: int, pages: list[int], most: int) -> None:
    """*store* is reported in *pages*, with at most *most* entries each; and again, with another value, once tracked anew."""
    start = WRITTEN * PAGE + offset

    def held() -> int:
        return int.from_bytes(vm.vm.memslots[SLOT].memory.view[start : start + store.size], "little")

    for repetition, value in (("first", store.value), ("second", store.value + 1)):
        count = held() if store.exchanges else store.count
        vm.run(Operation(store.name, vm.address(SLOT, WRITTEN, offset), value, count))
        vm.assert_dirty(f"{repetition} {store.name} at offset {offset}", {SLOT: pages}, most)
        assert not store.exchanges or held() == value


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.name)
def test_a_store_is_reported(tracked: TrackedVm, emulated: Emulated, entries: Entries, store: Store) -> None:
    """Inside a page, at its very end, and again after a collection."""
    for offset in (0, PAGE - store.size):
        with emulated(store.name):
            stored_twice(tracked, store, offset, [WRITTEN], entries(store.writes))


@pytest.mark.parametrize(
    "store", [store for store in STORES if not store.aligned and store.size > 1], ids=lambda s: s.name
)
def test_a_store_that_straddles_two_pages_is_reported_in_both(
    tracked: TrackedVm, entries: Entries, store: Store
) -> None:
    """Also where the pages belong to different slots."""
    most = entries(store.writes)
    stored_twice(tracked, store, PAGE - store.size // 2, [WRITTEN, WRITTEN + 1], most)
    tracked.run(Operation(store.name, tracked.address(NEIGHBOUR, 0, -(store.size // 2)), store.value, store.count))
    tracked.assert_dirty(f"{store.name} over a slot's end", {SLOT: [NPAGES - 1], NEIGHBOUR: [0]}, most)


@pytest.fixture
def forced(tracked: TrackedVm, host: Host) -> TrackedVm:
    """A VM whose guest may have KVM emulate an instruction."""
    if host.parameters.get("kvm.force_emulation_prefix", "0") in ("0", "N"):
        pytest.skip("KVM's module parameter force_emulation_prefix is off (load kvm with force_emulation_prefix=1)")
    return tracked


@pytest.mark.parametrize("store", EMULATED, ids=lambda store: store.name)
def test_a_store_that_kvm_emulates_is_reported(forced: TrackedVm, store: Store) -> None:
    """Inside a page, over its end where the instruction allows that, and again after a collection."""
    places = [(0, [WRITTEN]), (PAGE - store.size, [WRITTEN])]
    if store.size > 1 and not store.aligned:
        places.append((PAGE - store.size // 2, [WRITTEN, WRITTEN + 1]))
    for offset, pages in places:
        # KVM writes what straddles two pages in two pieces, and a page each time (emulator_write_emulated()).
        stored_twice(forced, store, offset, pages, 2)


@pytest.mark.parametrize("name", ["emulated_cmpxchg", "emulated_lock_cmpxchg"])
def test_an_emulated_compare_and_exchange_that_fails_is_a_write(forced: TrackedVm, name: str) -> None:
    """As the CPU's: commit 910c57dfa4d1, "KVM: x86: Mark target gfn of emulated atomic instruction as dirty"."""
    forced.run(Operation(name, forced.address(SLOT, WRITTEN), 1, count=77))
    forced.assert_dirty(f"{name} that fails", {SLOT: [WRITTEN]}, 2)
    assert not any(forced.vm.memslots[SLOT].memory.view)


def test_an_emulated_load_is_not_reported(forced: TrackedVm) -> None:
    forced.run(*(Operation("emulated_load", forced.address(SLOT, page)) for page in range(NPAGES)))
    forced.assert_dirty("emulated loads", {})


@pytest.mark.parametrize(("size", "feature"), [(32, "AVX"), (64, "AVX-512")], ids=["32", "64"])
def test_a_vector_store_is_reported(
    tracked: TrackedVm, emulated: Emulated, entries: Entries, size: int, feature: str
) -> None:
    """Inside a page, and over its end."""
    components = dict(arch.vector_stores(tracked.guest.cpuid)).get(size, 0)
    if not components:
        pytest.skip(f"KVM offers no {feature} here (CPUID)")
    with emulated("enable_xsave"):
        tracked.run(Operation("enable_xsave", 0, components))
    for offset, pages in ((64, [WRITTEN]), (PAGE - size, [WRITTEN]), (PAGE - 5, [WRITTEN, WRITTEN + 1])):
        with emulated(f"store_{size}"):
            tracked.run(Operation(f"store_{size}", tracked.address(SLOT, WRITTEN, offset)))
        tracked.assert_dirty(f"store of {size} bytes at offset {offset}", {SLOT: pages}, entries(size))


def test_xsave_is_reported(tracked: TrackedVm, emulated: Emulated) -> None:
    """In one page, and where its area lies in two."""
    if not arch.has_xsave(tracked.guest.cpuid):
        pytest.skip("KVM offers no XSAVE here (CPUID)")
    with emulated("xsave"):
        tracked.run(Operation("enable_xsave", 0, 3), Operation("xsave", tracked.address(SLOT, WRITTEN)))
    tracked.assert_dirty("xsave", {SLOT: [WRITTEN]})
    tracked.run(Operation("xsave", tracked.address(SLOT, WRITTEN, PAGE - 512)))
    tracked.assert_dirty("xsave, with its header in the next page", {SLOT: [WRITTEN, WRITTEN + 1]})


def test_the_frame_of_an_interrupt_is_reported(tracked: TrackedVm, emulated: Emulated, entries: Entries) -> None:
    """The CPU pushes it, while it delivers the interrupt: in one page, and over the end of two."""
    frame = 40
    for below, pages in ((PAGE - 16, [WRITTEN]), (PAGE + 16, [WRITTEN, WRITTEN + 1])):
        for _ in range(2):
            with emulated("interrupt"):
                tracked.run(Operation("interrupt", tracked.address(SLOT, WRITTEN, below)))
            tracked.assert_dirty(
                f"an interrupt's frame of {frame} bytes below offset {below}", {SLOT: pages}, entries(frame)
            )


def test_the_accessed_bit_of_a_segment_is_reported(tracked: TrackedVm, emulated: Emulated) -> None:
    """The CPU sets it in the descriptor table; loaded again, there is nothing to set."""
    selector = 0x18
    table = tracked.address(SLOT, WRITTEN, 64)
    descriptors = [0, *arch.SEGMENT_DESCRIPTORS, arch.SEGMENT_NOT_ACCESSED]
    slot = tracked.vm.memslots[SLOT].memory
    first = WRITTEN * PAGE // 8
    slot.words[first] = (table << 16 | len(descriptors) * 8 - 1) & (1 << 64) - 1
    slot.words[first + 1] = table >> 48
    for index, descriptor in enumerate(descriptors):
        slot.words[first + 8 + index] = descriptor
    # The host's writes unmapped the page: see test_executing_is_not_reported().
    tracked.run(Operation("load", tracked.address(SLOT, WRITTEN)))
    tracked.collect()
    load = Operation("load_segment", tracked.address(SLOT, WRITTEN), selector)
    with emulated("load_segment"):
        tracked.run(load)
    assert slot.words[first + 8 + selector // 8] != arch.SEGMENT_NOT_ACCESSED
    tracked.assert_dirty("loading a segment that was not accessed", {SLOT: [WRITTEN]})
    tracked.run(load)
    tracked.assert_dirty("loading it again", {})


FAULTING = {
    "store": Operation("store_8", 0, 0xA5),
    "locked-add": Operation("lock_add", 0, 1),
    "compare-and-exchange": Operation("lock_cmpxchg", 0, 1, 77),
    "push": Operation("push", 0, 1),
    "string-store": Operation("rep_stosq", 0, 1, 4),
}


@pytest.mark.parametrize("operation", FAULTING.values(), ids=list(FAULTING))
def test_a_store_that_faults_is_not_reported(tracked: TrackedVm, emulated: Emulated, operation: Operation) -> None:
    """The guest's own page tables do not let it write: nothing changes, and nothing is reported."""
    readonly = FIRST_GPA + GVA_OFFSET + (1 << 36)
    tracked.guest.page_tables.map(readonly, FIRST_GPA, NPAGES * PAGE, writable=False)
    before = bytes(tracked.vm.memslots[SLOT].memory.view)
    with emulated(operation.name), pytest.raises(GuestError, match="#PF"):
        tracked.run(replace(operation, address=readonly + WRITTEN * PAGE))
    tracked.assert_dirty(f"{operation.name} to a page that is read-only in the guest", {})
    assert bytes(tracked.vm.memslots[SLOT].memory.view) == before


@pytest.fixture(params=[True, False], ids=["read-only", "not-present"])
def boundary(request: pytest.FixtureRequest, tracked: TrackedVm) -> int:
    """The guest-virtual address behind the page at WRITTEN, where the guest's own page tables end or do not let it write."""
    boundary = FIRST_GPA + GVA_OFFSET + (1 << 36)
    tracked.map_at(boundary - PAGE, FIRST_GPA + WRITTEN * PAGE, 1)
    if request.param:
        tracked.guest.page_tables.map(boundary, FIRST_GPA + (WRITTEN + 1) * PAGE, PAGE, writable=False)
    return boundary


@pytest.mark.parametrize("operation", FAULTING.values(), ids=list(FAULTING))
def test_a_store_that_faults_in_its_second_page_writes_neither(
    tracked: TrackedVm, emulated: Emulated, emulates: bool, boundary: int, operation: Operation
) -> None:
    """The first one may be reported: KVM meets the CPU's attempt to write it before the guest meets the fault."""
    before = bytes(tracked.vm.memslots[SLOT].memory.view)
    with emulated(operation.name), pytest.raises(GuestError, match="#PF"):
        tracked.run(replace(operation, address=boundary - 4))
    changed = tracked.changed_pages(SLOT, before)
    # KVM's emulator writes the first page before it looks at the second (emulator_read_write(), arch/x86/kvm/x86.c).
    assert emulates or not changed
    report = tracked.collect()
    assert set(changed) <= report.dirty(SLOT) <= {WRITTEN}
    assert not report.dirty(NEIGHBOUR)


EMULATED_FAULTING = {
    "store": Operation("emulated_store_8", 0, 0xA5),
    "add": Operation("emulated_add", 0, 1),
    "locked-add": Operation("emulated_lock_add", 0, 1),
    "compare-and-exchange": Operation("emulated_lock_cmpxchg", 0, 1),
    "push": Operation("emulated_push", 0, 1),
}


@pytest.mark.parametrize("operation", EMULATED_FAULTING.values(), ids=list(EMULATED_FAULTING))
def test_an_emulated_store_that_faults_in_its_second_page_is_reported_as_far_as_it_came(
    forced: TrackedVm, boundary: int, operation: Operation
) -> None:
    """KVM's emulator may have written the first page by then: it is reported if, and only if, it has changed."""
    before = bytes(forced.vm.memslots[SLOT].memory.view)
    with pytest.raises(GuestError, match="#PF"):
        forced.run(replace(operation, address=boundary - 4))
    changed = forced.changed_pages(SLOT, before)
    assert changed in ([], [WRITTEN])
    forced.assert_dirty(f"{operation.name} over the end of what the guest may write", {SLOT: changed})


def test_a_string_store_is_reported_as_far_as_it_came(tracked: TrackedVm, emulated: Emulated, entries: Entries) -> None:
    """It runs from the last two pages of what is mapped into what is not."""
    end = FIRST_GPA + GVA_OFFSET + (1 << 36)
    tracked.map_at(end - 2 * PAGE, FIRST_GPA + WRITTEN * PAGE, 2)
    with emulated("rep_stosq"), pytest.raises(GuestError, match="#PF"):
        tracked.run(Operation("rep_stosq", end - PAGE - 16, 1, PAGE))
    tracked.assert_dirty("rep stosq into a page that is not mapped", {SLOT: [WRITTEN, WRITTEN + 1]}, entries(PAGE // 8))


def test_a_write_to_a_read_only_slot_is_not_reported(kvm: Kvm, log_mode: str) -> None:
    """It is no write: user space gets KVM_EXIT_MMIO, and memory stays as it is."""
    if not kvm.check_extension(uapi.KVM_CAP_READONLY_MEM):
        pytest.skip("no KVM_CAP_READONLY_MEM")
    exits = []

    def write_exit(vcpu: Vcpu) -> bool:
        run = vcpu.run
        if run.exit_reason != uapi.KVM_EXIT_MMIO or not run.mmio.is_write:
            return False
        exits.append(run.mmio.phys_addr)
        return True

    with TrackedVm(kvm, log_mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES, readonly=True)
        vm.add_slot(NEIGHBOUR, FIRST_GPA + NPAGES * PAGE, NPAGES)
        vm.run(*(Operation("load", vm.address(SLOT, page)) for page in range(NPAGES)))
        stores = [Operation("store_8", vm.address(SLOT, page), 0xA5) for page in (0, WRITTEN, NPAGES - 1)]
        vm.run(*stores, on_exit=write_exit)
        assert exits == [FIRST_GPA + page * PAGE for page in (0, WRITTEN, NPAGES - 1)]
        vm.write(NEIGHBOUR, 0)
        vm.assert_dirty("stores to a read-only slot, and one to its neighbour", {NEIGHBOUR: [0]})
        assert not any(vm.vm.memslots[SLOT].memory.view)


@pytest.mark.parametrize("name", ["cmpxchg", "lock_cmpxchg", "lock_cmpxchg16b"])
def test_a_compare_and_exchange_that_fails_is_a_write(tracked: TrackedVm, emulated: Emulated, name: str) -> None:
    """The CPU writes the old value back (Intel SDM, CMPXCHG); KVM's emulator has to as well (commit 910c57dfa4d1)."""
    with emulated(name):
        tracked.run(Operation(name, tracked.address(SLOT, WRITTEN), 1, count=77))
    tracked.assert_dirty(f"{name} that fails", {SLOT: [WRITTEN]})
    assert not any(tracked.vm.memslots[SLOT].memory.view)


def test_long_string_stores_are_reported_page_by_page(tracked: TrackedVm, entries: Entries) -> None:
    """Upwards and downwards, from one slot into the next; and a copy reports its target only."""
    words = PAGE // 8
    most = entries(words)
    tracked.run(Operation("rep_stosq", tracked.address(SLOT, NPAGES - 2, 16), 1, 3 * words))
    tracked.assert_dirty("rep stosq", {SLOT: [NPAGES - 2, NPAGES - 1], NEIGHBOUR: [0, 1]}, most)
    tracked.run(Operation("rep_stosq_down", tracked.address(SLOT, 4, 16), 1, 3 * words))
    tracked.assert_dirty("rep stosq downwards", {SLOT: [1, 2, 3, 4]}, most)
    tracked.run(Operation("rep_movsq", tracked.address(SLOT, 8), tracked.address(NEIGHBOUR, 8), 2 * words))
    tracked.assert_dirty("rep movsq", {SLOT: [8, 9]}, most)


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
    tracked.assert_dirty(f"rep insb of {length} bytes", {SLOT: pages}, length)
    memory = tracked.vm.memslots[SLOT].memory.view
    first = WRITTEN * PAGE + PAGE - 100
    assert bytes(memory[first : first + length]) == b"\x5a" * length


@pytest.mark.parametrize("name", ["load", "prefetch", "clflush", "test", "store_nothing"])
def test_what_does_not_write_is_not_reported(tracked: TrackedVm, name: str) -> None:
    tracked.run(*(Operation(name, tracked.address(SLOT, page)) for page in range(NPAGES)))
    tracked.assert_dirty(name, {})
    tracked.write(SLOT, WRITTEN)
    tracked.assert_dirty(f"a store after {name}", {SLOT: [WRITTEN]})


def test_reading_a_string_is_not_reported(tracked: TrackedVm) -> None:
    tracked.run(Operation("rep_lodsb", tracked.address(SLOT, 0), count=4 * PAGE))
    tracked.assert_dirty("rep lodsb", {})


def test_executing_is_not_reported(tracked: TrackedVm) -> None:
    """Once the page is mapped: the host's write of the code unmaps it, and KVM then maps it writable at the first access of
    any kind, for which it counts as dirty from then on (make_spte(), arch/x86/kvm/mmu/spte.c).
    """
    tracked.vm.memslots[SLOT].memory.view[WRITTEN * PAGE] = RET
    call = Operation("execute", tracked.address(SLOT, WRITTEN))
    tracked.run(call)
    tracked.collect()
    tracked.run(call)
    tracked.assert_dirty("a call into the slot", {})


def test_writes_of_user_space_are_not_reported(tracked: TrackedVm) -> None:
    """KVM does not see what goes through user space's own mapping (api.rst 4.8 speaks of the guest)."""
    memory = tracked.vm.memslots[SLOT].memory.view
    for page in range(NPAGES):
        memory[page * PAGE] = 1
    tracked.assert_dirty("writes through the host's mapping", {})


def test_an_untracked_slot_is_not_reported(tracked: TrackedVm) -> None:
    tracked.disable_dirty_logging(NEIGHBOUR)
    tracked.write(NEIGHBOUR, 1, 2)
    tracked.write(SLOT, WRITTEN)
    tracked.assert_dirty("writes to an untracked slot, and one to a tracked one", {SLOT: [WRITTEN]})
