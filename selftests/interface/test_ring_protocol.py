# SPDX-License-Identifier: GPL-2.0-only
"""The dirty ring's protocol (api.rst 8.29): filling, harvesting, resetting, and what may be done with its memory."""

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from dirty_tracking.modes import LOG_MODES, smallest_ring
from dirty_tracking.platform import reserved_entries
from dirty_tracking.ring import ENTRY_SIZE, DirtyRing
from dirty_tracking.tracked_vm import FIRST_GPA, PAGE, Operation, TrackedVm
from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS, GIB, GuestMemory
from kvm_util.vcpu import Vcpu

pytestmark = pytest.mark.log_modes("ring")

SLOT, OTHER = 1, 2
DIRTY, RESET = uapi.KVM_DIRTY_GFN_F_DIRTY, uapi.KVM_DIRTY_GFN_F_RESET
NPAGES = 1024


@pytest.fixture
def ringed(kvm: Kvm, log_mode: str) -> Iterator[TrackedVm]:
    """Two vCPUs and two slots."""
    with TrackedVm(kvm, log_mode, vcpus=2) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.add_slot(OTHER, FIRST_GPA + NPAGES * PAGE, NPAGES)
        yield vm


def harvest(ring: DirtyRing, most: int) -> list[tuple[int, int]]:
    """Harvest at most *most* entries, in order; returns (slot, offset) of each."""
    return list(zip(*ring.harvest(most), strict=True))


def is_full(vcpu: Vcpu) -> bool:
    """Whether KVM_RUN returns KVM_EXIT_DIRTY_RING_FULL."""
    return vcpu.kvm_run() == 0 and vcpu.run.exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL


def fill(vm: TrackedVm, first: int) -> int:
    """Write page after page from *first* on, around the slot, until the ring is full.

    :returns: how many writes were done at least
    """
    done = 0

    def full(vcpu: Vcpu) -> bool:
        if vcpu.run.exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL:
            raise _RingFull
        return False

    while True:
        # A load and a store for each page: a backend that emulates batches of instructions before it looks at its ring
        # would overrun it with fewer (known_bugs.toml, pvm-ring-overflow).
        pages = [(first + done + index) % NPAGES for index in range(64)]
        addresses = [vm.address(SLOT, page) for page in pages]
        operations = [Operation(name, address) for address in addresses for name in ("load", "load", "store_8")]
        try:
            vm.run(*operations, on_exit=full)
        except _RingFull:
            return done
        done += 64


class _RingFull(Exception):
    pass


@pytest.mark.usefixtures("entries_in_order")
@pytest.mark.parametrize("lap", range(2), ids=["fresh", "used"])
def test_a_full_ring_stops_its_vcpu_until_it_is_reset(kvm: Kvm, host: Host, log_mode: str, lap: int) -> None:
    """At the soft limit, again at each KVM_RUN, and not any more after the reset; nothing is lost, for several laps.

    Neither a reset of what was not harvested nor a harvest without a reset makes room.
    """
    entries = max(256, smallest_ring(kvm))
    with TrackedVm(kvm, log_mode, ring_count=entries) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.write(SLOT, *range(lap * 100))
        vm.assert_dirty("a few writes before", {SLOT: range(lap * 100)})
        first = 0
        for _ in range(5):
            done = fill(vm, first)
            (handle,), (ring,) = vm.vm.vcpus, vm.rings
            assert all(is_full(handle) for _ in range(3)), "KVM_RUN went on although the ring is full"
            assert vm.vm.reset_dirty_rings() == 0
            assert is_full(handle), "KVM_RUN went on after a reset, with nothing harvested"
            taken = harvest(ring, entries)
            assert is_full(handle), "KVM_RUN went on after a harvest, with nothing reset"
            assert harvest(ring, entries) == [], "a vCPU whose ring is full wrote"
            assert entries - reserved_entries(host) <= len(taken) <= entries
            assert [slot for slot, _ in taken] == [SLOT] * len(taken)
            assert [offset for _, offset in taken] == [(first + index) % NPAGES for index in range(len(taken))]
            assert len(taken) >= done
            assert vm.vm.reset_dirty_rings() == len(taken)
            handle.kvm_run()
            assert handle.run.exit_reason != uapi.KVM_EXIT_DIRTY_RING_FULL
            rest = vm.collect().entries(SLOT)
            # The vCPU may have left with the last page in the ring, and its store to be done again after the reset.
            if rest[:1] == [taken[-1][1]]:
                del rest[0]
            assert rest == [(first + len(taken) + index) % NPAGES for index in range(len(rest))]
            first += len(taken) + len(rest)


def test_a_signal_does_not_hide_that_the_ring_is_full(kvm: Kvm, host: Host, log_mode: str) -> None:
    """``immediate_exit``, the race-free way to send one, comes before it; the next KVM_RUN says again that it is full."""
    entries = max(256, smallest_ring(kvm))
    with TrackedVm(kvm, log_mode, ring_count=entries) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        fill(vm, 0)
        (handle,) = vm.vm.vcpus
        for _ in range(3):
            handle.run.immediate_exit = 1
            assert handle.kvm_run() == errno.EINTR
            handle.run.immediate_exit = 0
            assert handle.kvm_run() == 0
            assert handle.exit_reason() == "KVM_EXIT_DIRTY_RING_FULL"
        taken = harvest(vm.rings[0], entries)
        assert vm.vm.reset_dirty_rings() == len(taken) >= entries - reserved_entries(host)
        handle.kvm_run()
        assert handle.exit_reason() != "KVM_EXIT_DIRTY_RING_FULL"


@pytest.mark.usefixtures("entries_in_order")
def test_each_vcpu_has_its_own_writes_in_its_own_ring(ringed: TrackedVm) -> None:
    """With the slot of each, in the order of the writes."""
    ringed.run(*(Operation("store_8", ringed.address(slot, page)) for slot, page in ((SLOT, 9), (OTHER, 1), (SLOT, 2))))
    ringed.run(*(Operation("store_8", ringed.address(slot, page)) for slot, page in ((OTHER, 7), (SLOT, 3))), vcpu=1)
    one, two = ringed.rings
    assert harvest(one, 10) == [(SLOT, 9), (OTHER, 1), (SLOT, 2)]
    assert harvest(two, 10) == [(OTHER, 7), (SLOT, 3)]
    assert ringed.vm.reset_dirty_rings() == 5


def test_a_high_slot_is_named_right(kvm: Kvm, log_mode: str) -> None:
    """The highest that there is, and one in the middle, side by side."""
    highest = kvm.check_extension(uapi.KVM_CAP_NR_MEMSLOTS) - 1
    with TrackedVm(kvm, log_mode) as vm:
        for index, slot in enumerate((highest, highest // 2)):
            vm.add_slot(slot, FIRST_GPA + index * 64 * PAGE, 64)
        vm.write(highest, 63)
        vm.write(highest // 2, 0)
        vm.assert_dirty("stores to slots with high numbers", {highest: [63], highest // 2: [0]})


@pytest.mark.usefixtures("entries_in_order")
def test_a_reset_takes_what_was_harvested_and_no_more(ringed: TrackedVm) -> None:
    """Entry by entry: it stops at the first that was not harvested; the others stay where they are."""
    ringed.write(SLOT, *range(10))
    ring = ringed.rings[0]
    assert ringed.vm.reset_dirty_rings() == 0
    assert harvest(ring, 4) == [(SLOT, page) for page in range(4)]
    assert ringed.vm.reset_dirty_rings() == 4
    assert ringed.vm.reset_dirty_rings() == 0
    assert harvest(ring, 100) == [(SLOT, page) for page in range(4, 10)]
    assert ringed.vm.reset_dirty_rings() == 6


def mark_harvested(ring: DirtyRing, *numbers: int) -> None:
    for number in numbers:
        ring.entry(number).flags = RESET


@pytest.mark.usefixtures("entries_in_order")
def test_a_reset_stops_at_a_gap_in_each_ring(ringed: TrackedVm, emulates: bool) -> None:
    """What was harvested behind an entry that was not stays in the ring, and its page is not tracked anew.

    User space must not skip entries; KVM looks at each ring's entries in order, and at none behind the first that does not say
    RESET (kvm_dirty_ring_reset(), virt/kvm/dirty_ring.c).
    """
    one, two = ringed.rings

    def write_all() -> None:
        ringed.write(SLOT, *range(5))
        ringed.write(OTHER, *range(5), vcpu=1)

    write_all()
    mark_harvested(one, 0, 1, 3)
    mark_harvested(two, 0, 1, 2, 4)
    assert ringed.vm.reset_dirty_rings() == 2 + 3
    assert [one.entry(number).flags for number in range(5)] == [0, 0, DIRTY, RESET, DIRTY]
    assert [two.entry(number).flags for number in range(5)] == [0, 0, 0, DIRTY, RESET]
    write_all()
    mark_harvested(one, 2)
    assert ringed.vm.reset_dirty_rings() == 2
    write_all()
    mark_harvested(two, 3)
    assert ringed.vm.reset_dirty_rings() == 2
    write_all()
    # A backend that emulates every store pushes each page each time.
    again = [*range(5)] * 3
    one.next, two.next = 4, 5
    assert harvest(one, 100) == [(SLOT, page) for page in (4, *(again if emulates else (0, 1, 2, 3)))]
    assert harvest(two, 100) == [(OTHER, page) for page in (again if emulates else (0, 1, 2, 3, 4))]


def test_a_page_is_tracked_anew_by_the_reset_alone(ringed: TrackedVm, emulates: bool) -> None:
    """Before it, a page that is in the ring is not pushed again by a guest's store; after it, it is."""
    ringed.write(SLOT, 5)
    ringed.write(SLOT, 5)
    ring = ringed.rings[0]
    # What KVM writes itself it pushes each time, so a backend that emulates every store repeats the page.
    assert harvest(ring, 10) == [(SLOT, 5)] * (2 if emulates else 1)
    assert ringed.vm.reset_dirty_rings() == (2 if emulates else 1)
    ringed.write(SLOT, 5)
    assert harvest(ring, 10) == [(SLOT, 5)]


ORDERS = {
    "forward": list(range(200)),
    "backward": list(range(199, -1, -1)),
    "backward-by-7": list(range(NPAGES - 1, 0, -7)),
    "far-apart": [page * 61 % NPAGES for page in range(200)],
    "around-words": [63, 64, 62, 65, 0, 127, 128, 126, 192, 191],
    # Steps of 63 and 64 pages, on and back: what is joined so far has room in 64 bits with the next page, or just has not
    "mask-edges": [100, 163, 99, 36, 37, 101, 38, 300, 364, 428, 365, 366, 303, 302, 200, 136],
    "one": [NPAGES - 1],
}


@pytest.mark.parametrize("slots", [(SLOT,), (OTHER, SLOT, SLOT)], ids=["one-slot", "two-slots"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_entries_in_any_order_are_reset(ringed: TrackedVm, order: list[int], slots: tuple[int, ...]) -> None:
    """KVM joins neighbouring entries to one operation: each page of each order is tracked anew, and only once.

    In one slot up to 64 are joined to a mask, which is shifted when a page comes before its first (kvm_dirty_ring_reset(),
    virt/kvm/dirty_ring.c); an entry of another slot in between ends it.
    """
    for _ in range(3):
        entries = [(slots[index % len(slots)], page) for index, page in enumerate(order)]
        ringed.run(*(Operation("store_8", ringed.address(slot, page)) for slot, page in entries))
        expected = {slot: [page for its, page in entries if its == slot] for slot in (SLOT, OTHER)}
        ringed.assert_dirty("writes in an order of their own", expected)


def ring_map(vcpu: Vcpu, pages: int, flags: int, prot: int, first: int = 0) -> None:
    offset = (arch.KVM_DIRTY_LOG_PAGE_OFFSET + first) * mmap.PAGESIZE
    mmap.mmap(vcpu.fd, pages * mmap.PAGESIZE, flags, prot, offset=offset).close()


def refuses_all_but_shared(vcpu: Vcpu, first: int, pages: int) -> None:
    """Hold the rules to *pages* pages from page *first* of the ring on; shared, and not for execution, they can be mapped."""
    read, write = mmap.PROT_READ, mmap.PROT_WRITE
    ring_map(vcpu, pages, mmap.MAP_SHARED, read | write, first)
    ring_map(vcpu, pages, mmap.MAP_SHARED, read, first)
    for flags, prot in ((mmap.MAP_PRIVATE, read), (mmap.MAP_PRIVATE, read | write)):
        with pytest.raises(OSError, match="Invalid argument"):
            ring_map(vcpu, pages, flags, prot, first)
    # KVM's answer is EINVAL; kernels of 2025 on do not get that far, nothing of anon_inode may be executed there
    # (SB_I_NOEXEC in fs/anon_inodes.c).
    for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
        with pytest.raises(OSError, match=r"Invalid argument|Operation not permitted"):
            ring_map(vcpu, pages, flags, read | mmap.PROT_EXEC, first)


RING_PAGES = 4096 * ENTRY_SIZE // mmap.PAGESIZE


def test_the_ring_can_be_mapped_shared_only_and_not_for_execution(ringed: TrackedVm) -> None:
    """Each rule on its own, for the whole ring and for each of its pages."""
    for first, pages in ((0, RING_PAGES), *((page, 1) for page in range(RING_PAGES))):
        refuses_all_but_shared(ringed.vm.vcpus[0], first, pages)


@pytest.mark.parametrize(
    ("first", "pages"),
    [(-1, 2), (-1, 1 + RING_PAGES), (RING_PAGES - 1, 2), (0, RING_PAGES + 1)],
    ids=["begins-before-first-page", "begins-before-all", "ends-behind-last-page", "ends-behind-all"],
)
def test_the_rules_hold_for_a_mapping_of_which_the_ring_is_a_part(ringed: TrackedVm, first: int, pages: int) -> None:
    """With one end outside: KVM has to look at both, the first page and the last (kvm_vcpu_mmap(), virt/kvm/kvm_main.c).

    It looks at no other page, and so takes a private mapping that begins before the ring and ends behind it. Nobody promises
    that, so nothing asks for it here; a shared one is in test_a_mapping_that_is_longer_than_the_ring_ends_with_it().
    """
    refuses_all_but_shared(ringed.vm.vcpus[0], first, pages)


def can_be_read(mapped: mmap.mmap, offset: int) -> bool:
    """Whether there is memory at *offset* of a mapping: write(2) answers EFAULT where a load would be a SIGBUS."""
    reader, writer = os.pipe()
    try:
        with memoryview(mapped) as view, view[offset : offset + 8] as part:
            os.write(writer, part)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return False
    finally:
        os.close(reader)
        os.close(writer)
    return True


def test_a_mapping_that_is_longer_than_the_ring_ends_with_it(ringed: TrackedVm) -> None:
    """Behind the last entry there is nothing, and nothing right before the first."""
    offset, size = arch.KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE, 4096 * ENTRY_SIZE
    with mmap.mmap(ringed.vm.vcpus[0].fd, 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset) as mapped:
        assert can_be_read(mapped, 0)
        assert can_be_read(mapped, size - 8)
        assert not can_be_read(mapped, size)
    before = offset - mmap.PAGESIZE
    with mmap.mmap(ringed.vm.vcpus[0].fd, 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=before) as mapped:
        assert not can_be_read(mapped, mmap.PAGESIZE - 8)
        assert can_be_read(mapped, mmap.PAGESIZE)
        assert can_be_read(mapped, mmap.PAGESIZE + size - 8)
        assert not can_be_read(mapped, mmap.PAGESIZE + size)


def test_without_a_ring_there_is_none_to_read(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        offset = arch.KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE
        with mmap.mmap(vm.create_vcpu(0).fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset) as mapped:
            assert not can_be_read(mapped, 0)


def test_all_mappings_of_a_ring_are_one(ringed: TrackedVm) -> None:
    """What is harvested through one is harvested."""
    handle = ringed.vm.vcpus[0]
    ringed.write(SLOT, 5)
    offset = arch.KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE
    with mmap.mmap(handle.fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset) as other:
        assert harvest(ringed.rings[0], 10) == [(SLOT, 5)]
        assert int.from_bytes(other[:4], "little") == uapi.KVM_DIRTY_GFN_F_RESET
        assert ringed.vm.reset_dirty_rings() == 1
        assert int.from_bytes(other[:4], "little") == 0


def test_a_page_is_tracked_anew_once_its_entry_says_so(ringed: TrackedVm) -> None:
    """User space owns a harvested entry until the reset: what it writes there is what KVM acts on.

    A slot that is not there, and a page that the slot does not have, are taken as an entry and nothing else is done. Each is
    the only such entry of its reset: two could be joined, as in test_an_offset_that_wraps_around_is_ignored().
    """
    ring = ringed.rings[0]
    for slot, offset in ((77, 5), (SLOT | 9 << 16, 5), (SLOT, NPAGES), (SLOT, (1 << 64) - 1)):
        ringed.write(SLOT, 5)
        assert harvest(ring, 10)[-1] == (SLOT, 5)
        last = ring.entry(ring.next - 1)
        last.slot, last.offset = slot, offset
        assert ringed.vm.reset_dirty_rings() > 0
        ringed.write(SLOT, 6)
        assert harvest(ring, 10)[-1] == (SLOT, 6)
        assert ringed.vm.reset_dirty_rings() > 0
        # Page 5 is still mapped writable: switch its tracking off and on.
        ringed.disable_dirty_logging(SLOT)
        ringed.enable_dirty_logging(SLOT)


def test_an_entry_of_a_slot_that_was_larger_takes_no_other_along(kvm: Kvm, log_mode: str) -> None:
    """A reset tracks anew the pages that are there, whatever was harvested besides: here one of the slot as it was before."""
    with TrackedVm(kvm, log_mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, 70)
        vm.write(SLOT, 69)
        vm.remove_slot(SLOT)
        vm.add_slot(SLOT, FIRST_GPA, 64)
        vm.write(SLOT, 60)
        vm.assert_dirty("writes to the old slot, and to the new one", {SLOT: [60, 69]})
        vm.write(SLOT, 60)
        vm.assert_dirty("a write to the new one", {SLOT: [60]})


@pytest.mark.parametrize("twins", [(5, 5), (5, 6, 5), (6, 5, 5)], ids=["alone", "around", "behind"])
def test_an_entry_that_comes_twice_is_taken_twice(ringed: TrackedVm, twins: tuple[int, ...]) -> None:
    """Its page is tracked anew, and so are the pages beside it."""
    ring = ringed.rings[0]
    ringed.write(SLOT, *range(5, 5 + len(twins)))
    start = ring.next
    count = len(harvest(ring, 4096))
    for index in range(count):
        ring.entry(start + index).offset = twins[min(index, len(twins) - 1)]
    assert ringed.vm.reset_dirty_rings() == count
    ringed.write(SLOT, *sorted(set(twins)))
    ringed.assert_dirty("writes to pages that were taken twice", {SLOT: sorted(set(twins))})


@pytest.mark.disposable_kernel
def test_an_offset_that_wraps_around_is_ignored(ringed: TrackedVm) -> None:
    """Joined with the next entry, it would lie in the slot again: commit 577a8d3bae05, an access out of bounds before.

    An entry that is not joined with it is taken as ever; of the slot's other pages none is tracked anew or forgotten.
    """
    ring = ringed.rings[0]
    for first in ((1 << 64) - 63, (1 << 64) - 1):
        ringed.write(SLOT, 5, 6, 100)
        start = ring.next
        assert len(harvest(ring, 3)) == 3
        for index, offset in enumerate((first, 0, 100)):
            ring.entry(start + index).offset = offset
        assert ringed.vm.reset_dirty_rings() == 3
        ringed.write(SLOT, 0, 5, 6, 63, 100)
        # Pages 5 and 6, whose entries were lost, are still mapped writable.
        ringed.assert_dirty("writes after a reset of an offset that wraps around", {SLOT: [0, 63, 100]})
        ringed.disable_dirty_logging(SLOT)
        ringed.enable_dirty_logging(SLOT)


def test_a_reset_does_not_look_at_the_dirty_bit(ringed: TrackedVm) -> None:
    """An entry that KVM never dirtied, but that says RESET, is taken (kvm_dirty_gfn_harvested())."""
    ring = ringed.rings[0]
    ring.entry(0).flags = uapi.KVM_DIRTY_GFN_F_RESET
    assert ringed.vm.reset_dirty_rings() == 1
    assert ringed.vm.reset_dirty_rings() == 0


def vmalloc_used() -> int:
    """What the kernel has in use of the memory that large bitmaps come from, in bytes."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("VmallocUsed:"))
    return int(line.split()[1]) * 1024


def test_a_large_slot_takes_no_bitmap_in_ring_mode(kvm: Kvm, log_mode: str) -> None:
    """Tracking 64 GiB takes 4 MiB of bitmaps in the bitmap modes, and nothing with rings (commit 044c59c409b7)."""
    npages = 64 * GIB // PAGE
    taken: dict[str, list[int]] = {}
    for mode in ("dirty-log", log_mode):
        with TrackedVm(kvm, mode) as vm:
            memory = GuestMemory(BACKINGS["anonymous"], npages * PAGE, 4 * GIB)
            vm.vm.set_user_memory_region(SLOT, 4 * GIB, memory)
            for _ in range(5):
                before = vmalloc_used()
                vm.enable_dirty_logging(SLOT)
                taken.setdefault(mode, []).append(vmalloc_used() - before)
                vm.disable_dirty_logging(SLOT)
    # Others use the kernel's memory too: so the middle of several measurements, against half of the 4 MiB.
    assert median(taken["dirty-log"]) > npages // 8
    assert median(taken[log_mode]) < npages // 8


def test_the_smallest_ring_holds_what_is_reserved(kvm: Kvm, host: Host, log_mode: str) -> None:
    """And a page at least: it has the next power of two of both, in bytes.

    See kvm_vm_ioctl_enable_dirty_log_ring(), virt/kvm/kvm_main.c.
    """
    least = max(mmap.PAGESIZE, reserved_entries(host) * ENTRY_SIZE)
    assert smallest_ring(kvm, LOG_MODES[log_mode]) * ENTRY_SIZE == 1 << (least - 1).bit_length()


def test_the_ring_lies_beyond_the_vcpus_own_mapping(kvm: Kvm) -> None:
    assert kvm.get_vcpu_mmap_size() <= arch.KVM_DIRTY_LOG_PAGE_OFFSET * os.sysconf("SC_PAGE_SIZE")
