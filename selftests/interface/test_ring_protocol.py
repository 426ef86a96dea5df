# SPDX-License-Identifier: GPL-2.0-only
"""The dirty ring's protocol (api.rst, dirty ring): full rings, harvests, resets, and mappings of the ring's memory."""

import errno
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import TypeVar

import pytest

from dirty_tracking.modes import LOG_MODES, smallest_ring
from dirty_tracking.platform import reserved_entries, ring_order_is_write_order, uses_pml
from dirty_tracking.ring import ENTRY_SIZE, DirtyRing
from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.host import Host
from kvm_util.ioctl import KvmError
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS, GIB, GuestMemory
from kvm_util.vcpu import Vcpu
from kvm_util.vm import Vm

pytestmark = pytest.mark.log_modes("ring")

T = TypeVar("T", int, tuple[int, int])
SLOT, OTHER = 1, 2
DIRTY, RESET = uapi.KVM_DIRTY_GFN_F_DIRTY, uapi.KVM_DIRTY_GFN_F_RESET
NPAGES = 1024
ENTRIES = 4096
RING_SIZE = ENTRIES * ENTRY_SIZE
RING_PAGES = RING_SIZE // PAGE
RING_OFFSET = arch.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE


@pytest.fixture
def ring_vm(kvm: Kvm, log_mode: str) -> Iterator[ScriptedVm]:
    """A VM with two vCPUs, their rings of ENTRIES entries, and two slots with dirty logging."""
    with ScriptedVm(kvm, log_mode, 2, ENTRIES) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.add_slot(OTHER, FIRST_GPA + NPAGES * PAGE, NPAGES)
        yield vm


def harvest(ring: DirtyRing, most: int) -> list[tuple[int, int]]:
    """Harvest at most *most* entries, in order; returns slot and offset of each."""
    return list(zip(*ring.harvest(most), strict=True))


def ordered(entries: Iterable[T], host: Host) -> list[T]:
    """Entries to compare: as they are, or sorted where a ring has those of one exit in another order than that of the writes.

    Entries of pages that were not mapped before are in the order of the writes anyway: each of their writes exits.
    """
    return list(entries) if ring_order_is_write_order(host) else sorted(entries)


def is_full(vcpu: Vcpu) -> bool:
    """Whether KVM_RUN returns KVM_EXIT_DIRTY_RING_FULL."""
    return vcpu.kvm_run() == 0 and vcpu.run.exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL


def fill(vm: ScriptedVm, first: int) -> int:
    """Write page after page from *first* on, wrapping around the slot, until the ring is full.

    :returns: a lower bound of the number of writes
    """
    done, npages = 0, vm.vm.memslots[SLOT].npages

    def full(vcpu: Vcpu) -> bool:
        if vcpu.run.exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL:
            raise _RingFull
        return False

    while True:
        # Loads between the stores: kvm_pvm emulates a batch of instructions before it checks for a full ring, and with
        # stores alone a batch would overrun it (known_bugs.toml, pvm-ring-overflow).
        pages = [(first + done + index) % npages for index in range(64)]
        addresses = [vm.address(SLOT, page) for page in pages]
        operations = [Operation(name, address) for address in addresses for name in ("load", "load", "store_8")]
        try:
            vm.run(*operations, on_exit=full)
        except _RingFull:
            return done
        done += 64


class _RingFull(Exception):
    pass


@pytest.mark.parametrize("lap", range(2), ids=["fresh", "used"])
def test_full_ring_blocks_its_vcpu_until_reset(kvm: Kvm, host: Host, log_mode: str, lap: int) -> None:
    """KVM_RUN returns KVM_EXIT_DIRTY_RING_FULL until the full ring was harvested and reset, and no entry is lost.

    Neither a reset without a harvest nor a harvest without a reset makes room.
    """
    entries = max(256, smallest_ring(kvm))
    with ScriptedVm(kvm, log_mode, ring_count=entries) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.write(SLOT, *range(lap * 100))
        vm.assert_dirty("writes before the ring fills", {SLOT: range(lap * 100)})
        first = 0
        for _ in range(5):
            done = fill(vm, first)
            (handle,), (ring,) = vm.vm.vcpus, vm.rings
            assert all(is_full(handle) for _ in range(3)), "the guest ran although its ring is full"
            assert vm.vm.reset_dirty_rings() == 0
            assert is_full(handle), "the guest ran after a reset without a harvest"
            harvested = harvest(ring, entries)
            assert is_full(handle), "the guest ran after a harvest without a reset"
            assert harvest(ring, entries) == [], "a vCPU with a full ring pushed an entry"
            assert entries - reserved_entries(host) <= len(harvested) <= entries
            assert [slot for slot, _ in harvested] == [SLOT] * len(harvested)
            pages = [(first + index) % NPAGES for index in range(len(harvested))]
            assert ordered([offset for _, offset in harvested], host) == ordered(pages, host)
            assert len(harvested) >= done
            assert vm.vm.reset_dirty_rings() == len(harvested)
            handle.kvm_run()
            assert handle.run.exit_reason != uapi.KVM_EXIT_DIRTY_RING_FULL
            rest = vm.collect().entries(SLOT)
            # The last store may have been in flight: its page was pushed, then the vCPU left, and the store faults again.
            if pages[-1] in (rest[:1] if ring_order_is_write_order(host) else rest):
                rest.remove(pages[-1])
            following = [(first + len(harvested) + index) % NPAGES for index in range(len(rest))]
            assert ordered(rest, host) == ordered(following, host)
            first += len(harvested) + len(rest)


def test_entries_of_a_full_ring(kvm: Kvm, host: Host, emulates: bool, log_mode: str) -> None:
    """A ring is full when all of its entries but the reserved ones are used, where each exit of the vCPU pushes one."""
    if emulates:
        pytest.skip("this backend emulates many instructions before it looks at the ring")
    entries, rounds = max(256, smallest_ring(kvm)), 3
    usable = entries - reserved_entries(host)
    with ScriptedVm(kvm, log_mode, ring_count=entries) as vm:
        vm.add_slot(SLOT, FIRST_GPA, rounds * entries)
        for number in range(rounds):
            # With PML to pages that are not mapped yet: one exit may push 512 entries of others, which the CPU logs itself.
            fill(vm, number * usable if uses_pml(host) else 0)
            assert vm.collect().harvested == usable


def test_signal_at_a_full_ring(kvm: Kvm, host: Host, log_mode: str) -> None:
    """A pending signal ends KVM_RUN with EINTR or a full ring's exit, and no entry is lost or pushed meanwhile."""
    entries = max(256, smallest_ring(kvm))
    with ScriptedVm(kvm, log_mode, ring_count=entries) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        fill(vm, 0)
        (handle,) = vm.vm.vcpus
        for _ in range(3):
            with handle.pending_signal():
                code = handle.kvm_run()
            assert code == errno.EINTR or (code == 0 and handle.exit_reason() == "KVM_EXIT_DIRTY_RING_FULL")
            assert is_full(handle), "the guest ran although its ring is full"
        harvested = harvest(vm.rings[0], entries)
        assert [offset for _, offset in harvested] == [index % NPAGES for index in range(len(harvested))]
        assert vm.vm.reset_dirty_rings() == len(harvested) >= entries - reserved_entries(host)


def test_ring_with_initially_set(kvm: Kvm, log_mode: str) -> None:
    """Writes to pages mapped before logging are logged in a ring also where KVM_DIRTY_LOG_INITIALLY_SET is enabled."""
    flags = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | uapi.KVM_DIRTY_LOG_INITIALLY_SET

    def enable(vm: Vm) -> None:
        try:
            vm.enable_cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags)
        except KvmError as error:
            pytest.skip(f"KVM refuses KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 in a VM with rings: {error}")

    with ScriptedVm(kvm, log_mode, prepare=enable) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES, logged=False)
        vm.write(SLOT, *range(NPAGES))
        vm.enable_dirty_logging(SLOT)
        vm.write(SLOT, 3, 5)
        vm.assert_dirty("writes to pages that were mapped writable before", {SLOT: [3, 5]})


def test_ring_full_after_immediate_exit(kvm: Kvm, host: Host, log_mode: str) -> None:
    """``immediate_exit`` ends KVM_RUN with EINTR also while the ring is full, and the next KVM_RUN reports the full ring."""
    entries = max(256, smallest_ring(kvm))
    with ScriptedVm(kvm, log_mode, ring_count=entries) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        fill(vm, 0)
        (handle,) = vm.vm.vcpus
        for _ in range(3):
            handle.run.immediate_exit = 1
            assert handle.kvm_run() == errno.EINTR
            handle.run.immediate_exit = 0
            assert handle.kvm_run() == 0
            assert handle.exit_reason() == "KVM_EXIT_DIRTY_RING_FULL"
        harvested = harvest(vm.rings[0], entries)
        assert vm.vm.reset_dirty_rings() == len(harvested) >= entries - reserved_entries(host)
        handle.kvm_run()
        assert handle.exit_reason() != "KVM_EXIT_DIRTY_RING_FULL"


def test_vcpu_writes_go_to_its_own_ring(ring_vm: ScriptedVm) -> None:
    """KVM pushes each write to the ring of the vCPU that made it, with slot and offset, in the order of the writes."""
    ring_vm.run(
        *(Operation("store_8", ring_vm.address(slot, page)) for slot, page in ((SLOT, 9), (OTHER, 1), (SLOT, 2)))
    )
    ring_vm.run(*(Operation("store_8", ring_vm.address(slot, page)) for slot, page in ((OTHER, 7), (SLOT, 3))), vcpu=1)
    first, second = ring_vm.rings
    assert harvest(first, 10) == [(SLOT, 9), (OTHER, 1), (SLOT, 2)]
    assert harvest(second, 10) == [(OTHER, 7), (SLOT, 3)]
    assert ring_vm.vm.reset_dirty_rings() == 5


def test_entries_of_high_slot_numbers(kvm: Kvm, log_mode: str) -> None:
    """Ring entries have the right number for the highest slot and for one in the middle."""
    highest = kvm.check_extension(uapi.KVM_CAP_NR_MEMSLOTS) - 1
    with ScriptedVm(kvm, log_mode) as vm:
        for index, slot in enumerate((highest, highest // 2)):
            vm.add_slot(slot, FIRST_GPA + index * 64 * PAGE, 64)
        vm.write(highest, 63)
        vm.write(highest // 2, 0)
        vm.assert_dirty("stores to slots with high numbers", {highest: [63], highest // 2: [0]})


def test_reset_of_partial_harvest(ring_vm: ScriptedVm) -> None:
    """A reset stops at the first entry that was not harvested, and the entries from there on stay in the ring."""
    ring_vm.write(SLOT, *range(10))
    ring = ring_vm.rings[0]
    assert ring_vm.vm.reset_dirty_rings() == 0
    assert harvest(ring, 4) == [(SLOT, page) for page in range(4)]
    assert ring_vm.vm.reset_dirty_rings() == 4
    assert ring_vm.vm.reset_dirty_rings() == 0
    assert harvest(ring, 100) == [(SLOT, page) for page in range(4, 10)]
    assert ring_vm.vm.reset_dirty_rings() == 6


def mark_harvested(ring: DirtyRing, *numbers: int) -> None:
    for number in numbers:
        ring.entry(number).flags = RESET


def test_reset_stops_at_a_gap_in_each_ring(ring_vm: ScriptedVm, host: Host, emulates: bool) -> None:
    """Entries that were harvested after one that was not are not reset, and their pages not write-protected again.

    User space must not skip entries: in each ring KVM stops at the first entry without the RESET flag
    (kvm_dirty_ring_reset(), virt/kvm/dirty_ring.c).
    """
    one, two = ring_vm.rings

    def write_all() -> None:
        ring_vm.write(SLOT, *range(5))
        ring_vm.write(OTHER, *range(5), vcpu=1)

    write_all()
    mark_harvested(one, 0, 1, 3)
    mark_harvested(two, 0, 1, 2, 4)
    assert ring_vm.vm.reset_dirty_rings() == 2 + 3
    assert [one.entry(number).flags for number in range(5)] == [0, 0, DIRTY, RESET, DIRTY]
    assert [two.entry(number).flags for number in range(5)] == [0, 0, 0, DIRTY, RESET]
    write_all()
    mark_harvested(one, 2)
    assert ring_vm.vm.reset_dirty_rings() == 2
    write_all()
    mark_harvested(two, 3)
    assert ring_vm.vm.reset_dirty_rings() == 2
    write_all()
    # A backend that emulates every store pushes the page at each store.
    again = [*range(5)] * 3
    one.next, two.next = 4, 5
    in_one, in_two = (4, *(again if emulates else range(4))), again if emulates else range(5)
    assert ordered(harvest(one, 100), host) == ordered(((SLOT, page) for page in in_one), host)
    assert ordered(harvest(two, 100), host) == ordered(((OTHER, page) for page in in_two), host)


def test_page_is_pushed_once_until_reset(ring_vm: ScriptedVm, emulates: bool) -> None:
    """Stores to a page that is in a ring push no second entry until a reset write-protects the page again."""
    ring_vm.write(SLOT, 5)
    ring_vm.write(SLOT, 5)
    ring = ring_vm.rings[0]
    # Writes by KVM itself are pushed each time (mark_page_dirty_in_slot()), and here KVM may emulate every store.
    assert harvest(ring, 10) == [(SLOT, 5)] * (2 if emulates else 1)
    assert ring_vm.vm.reset_dirty_rings() == (2 if emulates else 1)
    ring_vm.write(SLOT, 5)
    assert harvest(ring, 10) == [(SLOT, 5)]


ORDERS = {
    "forward": list(range(200)),
    "backward": list(range(199, -1, -1)),
    "backward-by-7": list(range(NPAGES - 1, 0, -7)),
    "far-apart": [page * 61 % NPAGES for page in range(200)],
    "around-words": [63, 64, 62, 65, 0, 127, 128, 126, 192, 191],
    # Steps of 63 and 64 pages, up and down: the next page just fits into the 64-bit mask of those before, or just does not
    "mask-edges": [100, 163, 99, 36, 37, 101, 38, 300, 364, 428, 365, 366, 303, 302, 200, 136],
    "one": [NPAGES - 1],
}


@pytest.mark.parametrize("slots", [(SLOT,), (OTHER, SLOT, SLOT)], ids=["one-slot", "two-slots"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_reset_of_entries_in_any_order(ring_vm: ScriptedVm, order: list[int], slots: tuple[int, ...]) -> None:
    """A reset write-protects the page of each harvested entry, whatever the order of pages and slots.

    KVM coalesces entries of a slot that are within 64 pages into one mask, and shifts it when a page comes before its
    first (kvm_dirty_ring_reset(), virt/kvm/dirty_ring.c). An entry of another slot ends the mask.
    """
    for _ in range(3):
        entries = [(slots[index % len(slots)], page) for index, page in enumerate(order)]
        ring_vm.run(*(Operation("store_8", ring_vm.address(slot, page)) for slot, page in entries))
        expected = {slot: [page for entry_slot, page in entries if entry_slot == slot] for slot in (SLOT, OTHER)}
        ring_vm.assert_dirty("writes in this order", expected)


def ring_map(vcpu: Vcpu, pages: int, flags: int, prot: int, first: int = 0) -> None:
    mmap.mmap(vcpu.fd, pages * PAGE, flags, prot, offset=RING_OFFSET + first * PAGE).close()


def assert_only_shared_mappings(vcpu: Vcpu, first: int, pages: int) -> None:
    """Assert that *pages* pages from page *first* of the ring on can be mapped shared, but not private or executable."""
    read, write = mmap.PROT_READ, mmap.PROT_WRITE
    ring_map(vcpu, pages, mmap.MAP_SHARED, read | write, first)
    ring_map(vcpu, pages, mmap.MAP_SHARED, read, first)
    for flags, prot in ((mmap.MAP_PRIVATE, read), (mmap.MAP_PRIVATE, read | write)):
        with pytest.raises(OSError, match="Invalid argument"):
            ring_map(vcpu, pages, flags, prot, first)
    # KVM returns EINVAL. Newer kernels refuse any executable mapping of an anonymous inode with EPERM before they ask KVM
    # (SB_I_NOEXEC in fs/anon_inodes.c).
    for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
        with pytest.raises(OSError, match=r"Invalid argument|Operation not permitted"):
            ring_map(vcpu, pages, flags, read | mmap.PROT_EXEC, first)


def test_ring_mmap_is_shared_and_no_exec(ring_vm: ScriptedVm) -> None:
    """The ring and each of its pages can be mapped shared, to read and write, and neither private nor executable."""
    for first, pages in ((0, RING_PAGES), *((page, 1) for page in range(RING_PAGES))):
        assert_only_shared_mappings(ring_vm.vm.vcpus[0], first, pages)


@pytest.mark.parametrize(
    ("first", "pages"),
    [(-1, 2), (-1, 1 + RING_PAGES), (RING_PAGES - 1, 2), (0, RING_PAGES + 1)],
    ids=["begins-before-first-page", "begins-before-all", "ends-after-last-page", "ends-after-all"],
)
def test_ring_mmap_with_one_end_outside(ring_vm: ScriptedVm, first: int, pages: int) -> None:
    """A mapping of which only the first or only the last page is in the ring cannot be private or executable.

    KVM checks the first page and the last (kvm_vcpu_mmap(), virt/kvm/kvm_main.c), and so accepts a private mapping that
    begins before the ring and ends after it. No documentation promises that, so no test requires it;
    test_mapping_beyond_the_ring_is_unbacked() has a shared one.
    """
    assert_only_shared_mappings(ring_vm.vm.vcpus[0], first, pages)


def can_be_read(mapped: mmap.mmap, offset: int) -> bool:
    """Whether there is memory at *offset* of a mapping: write(2) fails with EFAULT where a load would raise SIGBUS."""
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


def test_mapping_beyond_the_ring_is_unbacked(ring_vm: ScriptedVm) -> None:
    """A mapping that is larger than the ring has no memory right before the first entry or after the last."""
    fd, flags, prot = ring_vm.vm.vcpus[0].fd, mmap.MAP_SHARED, mmap.PROT_READ
    with mmap.mmap(fd, 2 * RING_SIZE, flags, prot, offset=RING_OFFSET) as mapped:
        assert can_be_read(mapped, 0)
        assert can_be_read(mapped, RING_SIZE - 8)
        assert not can_be_read(mapped, RING_SIZE)
    with mmap.mmap(fd, 2 * RING_SIZE, flags, prot, offset=RING_OFFSET - PAGE) as mapped:
        assert not can_be_read(mapped, PAGE - 8)
        assert can_be_read(mapped, PAGE)
        assert can_be_read(mapped, PAGE + RING_SIZE - 8)
        assert not can_be_read(mapped, PAGE + RING_SIZE)


def test_no_ring_memory_without_rings(kvm: Kvm) -> None:
    """On a VM without dirty rings, a mapping at a vCPU's ring offset has no memory."""
    flags, prot = mmap.MAP_SHARED, mmap.PROT_READ
    with kvm.create_vm() as vm, mmap.mmap(vm.create_vcpu(0).fd, PAGE, flags, prot, offset=RING_OFFSET) as mapped:
        assert not can_be_read(mapped, 0)


def test_ring_mappings_share_their_memory(ring_vm: ScriptedVm) -> None:
    """A harvest through one mapping of a ring, and its reset, are visible through another."""
    handle = ring_vm.vm.vcpus[0]
    ring_vm.write(SLOT, 5)
    prot = mmap.PROT_READ | mmap.PROT_WRITE
    with mmap.mmap(handle.fd, PAGE, mmap.MAP_SHARED, prot, offset=RING_OFFSET) as other:
        assert harvest(ring_vm.rings[0], 10) == [(SLOT, 5)]
        assert int.from_bytes(other[:4], "little") == uapi.KVM_DIRTY_GFN_F_RESET
        assert ring_vm.vm.reset_dirty_rings() == 1
        assert int.from_bytes(other[:4], "little") == 0


def test_reset_of_entries_of_absent_pages(ring_vm: ScriptedVm) -> None:
    """A reset counts a harvested entry that user space changed to an absent slot or page, and does nothing else for it.

    Each is the only such entry of its reset: KVM could coalesce two, as in test_reset_ignores_wrapping_offsets().
    """
    ring = ring_vm.rings[0]
    for slot, offset in ((77, 5), (SLOT | 9 << 16, 5), (SLOT, NPAGES), (SLOT, (1 << 64) - 1)):
        ring_vm.write(SLOT, 5)
        assert harvest(ring, 10)[-1] == (SLOT, 5)
        last = ring.entry(ring.next - 1)
        last.slot, last.offset = slot, offset
        assert ring_vm.vm.reset_dirty_rings() > 0
        ring_vm.write(SLOT, 6)
        assert harvest(ring, 10)[-1] == (SLOT, 6)
        assert ring_vm.vm.reset_dirty_rings() > 0
        # Page 5 is still mapped writable: enabling logging again write-protects it.
        ring_vm.disable_dirty_logging(SLOT)
        ring_vm.enable_dirty_logging(SLOT)


def test_reset_ignores_only_out_of_range_entries(kvm: Kvm, log_mode: str) -> None:
    """A reset write-protects the page of each valid entry, also next to one beyond the end of a slot recreated smaller."""
    with ScriptedVm(kvm, log_mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, 70)
        vm.write(SLOT, 69)
        vm.remove_slot(SLOT)
        vm.add_slot(SLOT, FIRST_GPA, 64)
        vm.write(SLOT, 60)
        vm.assert_dirty("writes to the slot before and after it was recreated", {SLOT: [60, 69]})
        vm.write(SLOT, 60)
        vm.assert_dirty("a write to a page that was reset", {SLOT: [60]})


@pytest.mark.parametrize("offsets", [(5, 5), (5, 6, 5), (6, 5, 5)], ids=["alone", "around", "after"])
def test_reset_of_duplicate_entries(ring_vm: ScriptedVm, offsets: tuple[int, ...]) -> None:
    """A reset counts two entries of the same page, and write-protects that page and those of the adjacent entries."""
    ring = ring_vm.rings[0]
    ring_vm.write(SLOT, *range(5, 5 + len(offsets)))
    start = ring.next
    count = len(harvest(ring, ENTRIES))
    for index in range(count):
        ring.entry(start + index).offset = offsets[min(index, len(offsets) - 1)]
    assert ring_vm.vm.reset_dirty_rings() == count
    ring_vm.write(SLOT, *sorted(set(offsets)))
    ring_vm.assert_dirty("writes to the pages of duplicate entries", {SLOT: sorted(set(offsets))})


@pytest.mark.disposable_kernel
def test_reset_ignores_wrapping_offsets(ring_vm: ScriptedVm) -> None:
    """A reset ignores an entry whose offset wraps around to the start of the slot, and resets no page but those named.

    Coalesced with the next entry, such an offset seemed to lie in the slot and led to an access out of bounds before
    commit 577a8d3bae05. An entry that is not coalesced with it is reset as usual.
    """
    ring = ring_vm.rings[0]
    for first in ((1 << 64) - 63, (1 << 64) - 1):
        ring_vm.write(SLOT, 5, 6, 100)
        start = ring.next
        assert len(harvest(ring, 3)) == 3
        for index, offset in enumerate((first, 0, 100)):
            ring.entry(start + index).offset = offset
        assert ring_vm.vm.reset_dirty_rings() == 3
        ring_vm.write(SLOT, 0, 5, 6, 63, 100)
        # Pages 5 and 6, whose entries were overwritten, are still mapped writable.
        ring_vm.assert_dirty("writes after a reset of an offset that wraps around", {SLOT: [0, 63, 100]})
        ring_vm.disable_dirty_logging(SLOT)
        ring_vm.enable_dirty_logging(SLOT)


def test_reset_ignores_the_dirty_flag(ring_vm: ScriptedVm) -> None:
    """A reset counts an entry with the RESET flag that KVM never made dirty (kvm_dirty_gfn_harvested())."""
    ring = ring_vm.rings[0]
    ring.entry(0).flags = uapi.KVM_DIRTY_GFN_F_RESET
    assert ring_vm.vm.reset_dirty_rings() == 1
    assert ring_vm.vm.reset_dirty_rings() == 0


def vmalloc_used() -> int:
    """How many bytes of vmalloc memory the kernel uses: large dirty bitmaps are allocated there."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("VmallocUsed:"))
    return int(line.split()[1]) * 1024


def test_no_bitmap_allocated_in_ring_mode(kvm: Kvm, log_mode: str) -> None:
    """Enabling dirty logging for a 64 GiB slot allocates no bitmap in ring mode, and 4 MiB otherwise (commit 044c59c409b7)."""
    npages = 64 * GIB // PAGE
    allocated: dict[str, list[int]] = {}
    for mode in ("dirty-log", log_mode):
        with ScriptedVm(kvm, mode) as vm:
            memory = GuestMemory(BACKINGS["anonymous"], npages * PAGE, 4 * GIB)
            vm.vm.set_user_memory_region(SLOT, 4 * GIB, memory)
            for _ in range(5):
                before = vmalloc_used()
                vm.enable_dirty_logging(SLOT)
                allocated.setdefault(mode, []).append(vmalloc_used() - before)
                vm.disable_dirty_logging(SLOT)
    # Other processes change VmallocUsed too: compare the median of several measurements with half of the 4 MiB.
    assert median(allocated["dirty-log"]) > npages // 8
    assert median(allocated[log_mode]) < npages // 8


def test_smallest_ring_size(kvm: Kvm, host: Host, log_mode: str) -> None:
    """The smallest ring that KVM accepts has the first power of two of bytes that holds a page and the reserved entries.

    See kvm_vm_ioctl_enable_dirty_log_ring(), virt/kvm/kvm_main.c.
    """
    least = max(PAGE, reserved_entries(host) * ENTRY_SIZE)
    assert smallest_ring(kvm, LOG_MODES[log_mode]) * ENTRY_SIZE == 1 << (least - 1).bit_length()


def test_ring_offset_is_beyond_kvm_run(kvm: Kvm) -> None:
    """A vCPU's ring is mapped at an offset beyond the area that KVM_GET_VCPU_MMAP_SIZE names."""
    assert kvm.get_vcpu_mmap_size() <= RING_OFFSET
