# SPDX-License-Identifier: GPL-2.0-only
"""Small parts of the library: bitmaps, write streams, rings, reports, page tables, address limits, memory, messages."""

import ctypes
import itertools
import mmap
import random
import re
import signal
import struct
from array import array
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from dirty_tracking import ring as dirty_ring
from dirty_tracking.bitmap import new_bitmap, set_pages
from dirty_tracking.report import DirtyReport, Source
from dirty_tracking.ring import ENTRY_SIZE, DirtyRing, reset_harvested
from dirty_tracking.shared_rings import SharedRings
from dirty_tracking.violations import ContractViolation, Kind
from dirty_tracking.write_stream import WriteStream, make_stream, sweep_length
from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.arch.x86_64.uapi import kvm_cpuid2, kvm_cpuid_entry2
from kvm_util.kept_memory import KeptMemory
from kvm_util.memory import BACKINGS, GIB, KIB, MIB, GuestMemory, HugePagesMissing, align_down, size_text
from kvm_util.vm import Vm

# --- bitmaps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("npages", "size"), [(1, 8), (64, 8), (65, 16), (262147, 32776)])
def test_bitmap_has_whole_words(npages: int, size: int) -> None:
    """A bitmap is as large as the 64-bit words that hold a bit per page."""
    assert len(new_bitmap(npages)) == size


def test_set_pages_of_a_bitmap() -> None:
    """set_pages() agrees with a bit-by-bit reading of empty, full, sparse and dense words."""
    draw = random.Random(1)
    bitmap = bytearray(draw.randbytes(64)) + bytearray(64) + bytearray(b"\xff" * 64) + bytearray(b"\0" * 7 + b"\x80")
    slow = [page for page in range(len(bitmap) * 8) if bitmap[page // 8] >> page % 8 & 1]
    assert set_pages(bitmap) == slow


# --- write streams ----------------------------------------------------------------------------------------------------


def test_write_stream_ranges() -> None:
    """A range of a write stream is its head followed by its repeated loop."""
    stream = WriteStream(array("I", [10, 11, 0, 1, 2]), 2)
    endless = [10, 11] + [0, 1, 2] * 20
    for first in range(20):
        for end in range(first, 40):
            assert stream.between(first, end).tolist() == endless[first:end]


@pytest.mark.parametrize("pattern", ["random", "sequential"])
@pytest.mark.parametrize(("npages", "vcpus"), [(1, 1), (100, 3), (4099, 2)])
def test_write_streams_cover_the_slot(pattern: str, npages: int, vcpus: int) -> None:
    """The first writes of all vCPUs together reach each page of the slot, in whole batches."""
    written: set[int] = set()
    for vcpu in range(vcpus):
        stream = make_stream(pattern, npages, vcpu, vcpus, seed=7, multiple=64)
        written.update(stream.between(0, sweep_length(npages, vcpus)))
        assert len(stream.pages) % 64 == stream.loop % 64 == 0
        assert len(stream.pages) > stream.loop
        assert max(stream.pages) < npages
    assert written == set(range(npages))


def test_write_streams_depend_on_the_seed() -> None:
    """A write stream is determined by seed and vCPU, and differs between them."""

    def pages(seed: int, vcpu: int) -> list[int]:
        return make_stream("random", 1000, vcpu, 2, seed, 64).between(1000, 2000).tolist()

    assert pages(1, 0) == pages(1, 0)
    assert pages(1, 0) != pages(2, 0)
    assert pages(1, 0) != pages(1, 1)


# --- dirty rings ------------------------------------------------------------------------------------------------------


class FakeRing:
    """A dirty ring in memory, with the test in KVM's place.

    :ivar ring: the library's view of it
    """

    def __init__(self, entries: int) -> None:
        self.map = mmap.mmap(-1, entries * ENTRY_SIZE)
        self.ring = DirtyRing(self.map)
        self._entries = entries
        self._index = 0

    def push(self, *pages: int, slot: int = 1, flags: int = 1) -> None:
        for page in pages:
            struct.pack_into("=IIQ", self.map, self._index % self._entries * ENTRY_SIZE, flags, slot, page)
            self._index += 1

    def harvest(self, most: int | None = None) -> list[tuple[int, int]]:
        """Slot and offset of each entry that the ring's own harvest returns."""
        return list(zip(*self.ring.harvest(most), strict=True))

    def peek(self) -> list[tuple[int, int]]:
        return list(zip(*self.ring.peek(), strict=True))

    def flags(self) -> list[int]:
        return memoryview(self.map).cast("I")[::4].tolist()


def test_harvest_in_ring_order() -> None:
    """harvest() returns the dirty entries in order and marks them for reset, many times around the ring."""
    fake = FakeRing(8192)
    page = 0
    for count in (1, 0, 4095, 4097, 8191, 8192, 5000, 3):
        for _ in range(count):
            fake.push(page + (1 << 33), slot=page % 7)
            page += 1
        assert fake.harvest() == [(number % 7, (1 << 33) + number) for number in range(page - count, page)]
        assert fake.flags().count(2) >= count
        assert fake.harvest() == []


@pytest.mark.parametrize("other", [0, 2, 3, 1 << 8 | 1, 1 << 31 | 1], ids=hex)
@pytest.mark.parametrize("slot", [1, 7])
@pytest.mark.parametrize("before", [0, 2, 63, 64, 65, 200])
def test_harvest_stops_at_a_gap(before: int, slot: int, other: int) -> None:
    """harvest() stops at the first entry whose flags are not DIRTY alone; dirty entries after that gap are counted."""
    fake = FakeRing(256)
    fake.push(*range(250))
    assert len(fake.harvest()) == 250  # so that the next ones wrap
    fake.map[: 250 * ENTRY_SIZE] = bytes(250 * ENTRY_SIZE)
    fake.push(*range(before))
    fake.push(before, flags=other, slot=slot)
    fake.push(before + 1, before + 2)
    flags = fake.flags()
    assert fake.harvest() == [(1, page) for page in range(before)]
    harvested = {(250 + number) % 256 for number in range(before)}
    assert fake.flags() == [2 if number in harvested else value for number, value in enumerate(flags)]
    assert fake.ring.dirty_behind_gap() == 2 + (other & 0xFF == 1)


def test_peek_leaves_the_ring_unchanged() -> None:
    """peek() returns each dirty entry once and leaves it to harvest(), also in a full ring."""
    fake = FakeRing(256)
    ring = fake.ring
    fake.push(*range(256))
    assert fake.peek() == [(1, page) for page in range(256)]
    assert fake.peek() == []
    ring.mark = uapi.KVM_DIRTY_GFN_F_DIRTY | uapi.KVM_DIRTY_GFN_F_RESET
    assert fake.harvest(3) == [(1, 0), (1, 1), (1, 2)]
    assert fake.flags()[:4] == [3, 3, 3, 1]
    assert fake.peek() == []
    fake.push(300, 301, 302)
    assert fake.peek() == [(1, 300), (1, 301), (1, 302)]
    assert fake.harvest() == [(1, page) for page in (*range(3, 256), 300, 301, 302)]


def test_not_reset_counts_entries_once() -> None:
    """Harvested entries that a reset has left are counted once."""
    fake = FakeRing(256)
    ring = fake.ring
    fake.push(*range(4))
    ring.harvest(3)
    fake.map[:ENTRY_SIZE] = bytes(ENTRY_SIZE)
    assert [ring.is_harvested(number) for number in range(4)] == [False, True, True, False]
    assert ring.not_reset() == 2
    assert ring.not_reset() == 0


class Resets(Vm):
    """A VM whose KVM_RESET_DIRTY_RINGS does one thing after the other.

    :param calls: what it does in each call; each returns the answer
    """

    def __init__(self, *calls: Callable[[], int]) -> None:
        super().__init__(-1, 0)
        self._calls = list(calls)

    def reset_dirty_rings(self) -> int:
        return self._calls.pop(0)()


def test_reset_without_signals() -> None:
    """No signal can end KVM_RESET_DIRTY_RINGS early: all are blocked, and delivered after it."""
    seen: list[str] = []
    previous = signal.signal(signal.SIGALRM, lambda _number, _frame: seen.append("signal"))

    def reset() -> int:
        signal.raise_signal(signal.SIGALRM)
        seen.append("reset")
        return 7

    try:
        assert reset_harvested(Resets(reset)) == 7
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert seen == ["reset", "signal"]


@pytest.mark.parametrize("signalled", [False, True])
def test_reset_in_several_calls(signalled: bool) -> None:
    """A call that leaves harvested entries breaks the contract, unless a signal may have ended it: the next does the rest."""
    fake = FakeRing(256)
    fake.push(0, 1, 2)

    def reset(*entries: int) -> int:
        for entry in entries:
            fake.map[entry * ENTRY_SIZE : (entry + 1) * ENTRY_SIZE] = bytes(ENTRY_SIZE)
        return len(entries)

    vm = Resets(lambda: reset(0), lambda: reset(1, 2))
    rings = SharedRings(vm, [fake.ring])
    rings.signalled = signalled
    fake.harvest()
    with nullcontext() if signalled else pytest.raises(ContractViolation, match=r"1 call left .* vCPUs \[0\]"):
        assert rings.reset_up_to([3]) == 3


def test_reset_of_a_stopped_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call during which the thread slept, as when it was stopped, is repeated, and no other."""
    sleeps = iter([0, 1, 1, 1])
    monkeypatch.setattr(dirty_ring, "_sleeps", lambda: next(sleeps))
    assert reset_harvested(Resets(lambda: 3, lambda: 4)) == 7


def test_entry_of_the_next_lap() -> None:
    """An entry that another thread has harvested in the same place, a lap later, is not the one that had to be reset."""
    fake = FakeRing(256)
    fake.push(*range(256))
    fake.harvest()
    fake.map[:] = bytes(len(fake.map))
    fake.push(7)
    assert fake.harvest() == [(1, 7)]
    rings = SharedRings(Resets(lambda: 0, lambda: 0), [fake.ring])
    assert rings.reset_up_to([1]) == 0
    with pytest.raises(ContractViolation, match="left harvested entries"):
        rings.reset_up_to([257])


# --- dirty reports ----------------------------------------------------------------------------------------------------


def test_report_of_rings_and_bitmaps() -> None:
    """A dirty report may have rings and bitmaps at once, as on arm64; bitmaps do not count as harvested."""
    report = DirtyReport([Source([1, 2, 1], [5, 6, 5], 0), Source([2], [7], 1), Source([2, 3], [6, 0])], reset=4)
    assert report.slots == {1, 2, 3}
    assert report.harvested == 4
    assert [report.entries(slot) for slot in (1, 2, 3, 4)] == [[5, 5], [6, 7, 6], [0], []]
    assert [report.dirty(slot) for slot in (1, 2, 4)] == [{5}, {6, 7}, set()]
    report.check()


def test_report_violations() -> None:
    """Gaps and wrong reset counts are violations whatever the guest wrote."""
    report = DirtyReport([Source([1, 9, 1], [5, 2, 8], 0, behind_gap=2)], reset=2)
    with pytest.raises(ContractViolation) as error:
        report.check()
    found = [(violation.kind, violation.vcpu) for violation in error.value.violations]
    assert found == [
        (Kind.GAP, 0),
        (Kind.RESET_COUNT, None),
    ]


# --- page tables and addresses ----------------------------------------------------------------------------------------


def walk(memory: bytearray, root: int, levels: int, gva: int) -> int | None:
    """Translate *gva* as the CPU does; None if it is not mapped (Intel SDM volume 3, "Paging")."""
    table = root
    for level in range(levels, 0, -1):
        shift = 12 + 9 * (level - 1)
        at = table + (gva >> shift & 511) * 8
        entry = int.from_bytes(memory[at : at + 8], "little")
        if not entry & 1:
            return None
        address = entry & 0x000F_FFFF_FFFF_F000
        if level == 1 or entry & 0x80:
            assert address % (1 << shift) == 0, "reserved bits"
            return address | gva % (1 << shift)
        table = address
    raise AssertionError


def page_tables(levels: int, memory: bytearray) -> arch.PageTables:
    """Page tables in *memory*, whose pages they take from the second on."""
    free = itertools.count(4096, 4096)
    return arch.PageTables(
        levels, lambda: next(free), lambda address: memoryview(memory)[address : address + 4096].cast("Q")
    )


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("page_size", [4 * KIB, 2 * MIB, GIB])
@pytest.mark.parametrize("gpa", [0x1_2345_6000, 0xFFFC_BFFF_D000])
def test_page_tables_translate(levels: int, page_size: int, gpa: int) -> None:
    """Page tables translate a range of any size with every page size, and nothing beyond its pages; entries can be found."""
    memory = bytearray(8 * MIB)
    tables = page_tables(levels, memory)
    gva = (1 << 40 if levels == 4 else 1 << 52) + gpa % page_size
    size = GIB + 3 * 4096
    tables.map(gva, gpa, size, page_size)
    for offset in (0, 1, 4095, 2 * MIB, size // 2 + 123, size - 1):
        assert walk(memory, tables.root, levels, gva + offset) == gpa + offset
        entry = tables.entry(gva + offset)
        assert int.from_bytes(memory[entry : entry + 8], "little") & ~0xFFF == align_down(gpa + offset, page_size)
    assert walk(memory, tables.root, levels, align_down(gva, page_size) - 1) is None
    assert walk(memory, tables.root, levels, align_down(gva + size - 1, page_size) + page_size) is None


def test_page_tables_check_congruence() -> None:
    """A mapping whose gva and gpa are not congruent modulo the page size is refused."""
    with pytest.raises(ValueError, match="not congruent"):
        page_tables(4, bytearray(MIB)).map(0x1000, 0x200000, 4096, 2 * MIB)


def cpuid(vendor: bytes, family: int, address_sizes: int) -> arch.Cpuid:
    names = [int.from_bytes(vendor[i : i + 4], "little") for i in (0, 4, 8)]
    base, extended = (family, 0) if family < 0xF else (0xF, family - 0xF)
    entries = (kvm_cpuid_entry2 * 3)(
        kvm_cpuid_entry2(function=0, ebx=names[0], edx=names[1], ecx=names[2]),
        kvm_cpuid_entry2(function=1, eax=base << 8 | extended << 20),
        kvm_cpuid_entry2(function=0x80000008, eax=address_sizes),
    )
    return arch.Cpuid(ctypes.create_string_buffer(bytes(kvm_cpuid2(nent=3)) + bytes(entries)))


@pytest.mark.parametrize(
    ("vendor", "family", "address_sizes", "host_bits", "limit"),
    [
        (b"GenuineIntel", 6, 46, 46, 1 << 46),
        (b"GenuineIntel", 6, 48 << 16 | 52, 52, 1 << 48),
        (b"AuthenticAMD", 0x10, 39, 39, 1 << 39),
        (b"AuthenticAMD", 0x10, 48, 48, (1 << 40) - 12 * GIB),
        (b"AuthenticAMD", 0x19, 48, 48, (1 << 48) - 12 * GIB),
        (b"AuthenticAMD", 0x19, 48, 43, (1 << 43) - 12 * GIB),  # the host encrypts memory
        (b"HygonGenuine", 0x18, 48, 48, (1 << 48) - 12 * GIB),
        (b"AuthenticAMD", 0x19, 48 << 16 | 52, 52, 1 << 48),
    ],
)
def test_guest_phys_limit(
    monkeypatch: pytest.MonkeyPatch, vendor: bytes, family: int, address_sizes: int, host_bits: int, limit: int
) -> None:
    """The limit of guest-physical addresses excludes the ranges that AMD CPUs reserve, and bits for memory encryption."""
    monkeypatch.setattr("kvm_util.arch.x86_64.cpuid._host_phys_bits", lambda: host_bits)
    assert arch.guest_phys_limit(cpuid(vendor, family, address_sizes)) == limit


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["anonymous", "anonymous_thp", "shmem", "shmem_thp"])
@pytest.mark.parametrize("gpa", [0, 0x1000, 0xFFFC_BFFF_D000])
def test_guest_memory_alignment(name: str, gpa: int) -> None:
    """Guest memory is zero, and its hva and gpa are congruent modulo the backing's page size."""
    memory = GuestMemory(BACKINGS[name], 4 * MIB, gpa)
    assert (memory.hva - gpa) % BACKINGS[name].alignment == 0
    populate(memory)
    assert not any(memory.words[::512].tolist())
    memory.words[-1] = 1
    assert ctypes.c_uint64.from_address(memory.hva + 4 * MIB - 8).value == 1
    memory.close()


@pytest.mark.parametrize(
    ("name", "flag"), [("anonymous", "nh"), ("shmem", "nh"), ("anonymous_thp", "hg"), ("shmem_thp", "hg")]
)
def test_advice_about_huge_pages(name: str, flag: str) -> None:
    """Memory of small pages asks for no huge ones, so that it stays small where the host's settings are always or force."""
    memory = GuestMemory(BACKINGS[name], 4 * MIB, 0)
    smaps = Path("/proc/self/smaps").read_text()
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (?:.*\n)+?VmFlags: (.*)", smaps, re.MULTILINE)
    (flags,) = [flags for first, end, flags in found if int(first, 16) <= memory.hva < int(end, 16)]
    memory.close()
    assert {"nh", "hg"} & set(flags.split()) == {flag}


@pytest.mark.parametrize("name", ["anonymous", "anonymous_thp", "shmem", "shmem_thp"])
def test_huge_pages_are_detected(name: str) -> None:
    """Transparent huge pages are counted in memory that has them, and in no other."""
    if reason := BACKINGS["shmem_thp" if name == "shmem_thp" else "anonymous_thp"].missing(8 * MIB):
        pytest.skip(reason)
    memory = GuestMemory(BACKINGS[name], 8 * MIB, 0)
    try:
        memory.populate()
    except HugePagesMissing as error:
        pytest.skip(str(error))
    assert bool(memory.transparent_huge_size()) is name.endswith("_thp")
    memory.close()


@pytest.mark.parametrize("name", ["anonymous", "anonymous_thp", "shmem", "shmem_thp"])
def test_kept_memory_is_zero_again(name: str) -> None:
    """Memory that is kept comes back zeroed, at its old address; for another size or backing it is freed first."""
    with KeptMemory() as kept:
        memory = kept.make(BACKINGS[name], 4 * MIB, 4096)
        hva = memory.hva
        populate(memory)
        memory.view[:] = b"\xff" * memory.size
        memory.close()
        assert in_maps(hva)
        memory = kept.make(BACKINGS[name], 4 * MIB, 4096)
        assert memory.hva == hva
        assert not any(memory.words.tolist())
        populate(memory)
        memory.close()
        other = kept.make(BACKINGS[name], 64 * KIB, 4096)
        assert not in_maps(hva + 2 * MIB)
        hva = other.hva
        populate(other)
        other.close()
    assert not in_maps(hva)


def populate(memory: GuestMemory) -> None:
    """Populate *memory*, or skip the test where the host has no huge page for it."""
    try:
        memory.populate()
    except HugePagesMissing as error:
        pytest.skip(str(error))


def test_unfit_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was not allocated, or has few of the huge pages that it is to have, is freed."""
    with KeptMemory() as kept:
        for name, huge in (("anonymous", None), ("anonymous_thp", 2 * MIB), ("anonymous_thp", 0)):
            memory = kept.make(BACKINGS[name], 8 * MIB, 4096)
            hva = memory.hva
            if huge is not None:
                monkeypatch.setattr(GuestMemory, "transparent_huge_size", lambda _, huge=huge: huge)
                with nullcontext() if huge else pytest.raises(HugePagesMissing):
                    memory.populate()
            memory.close()
            assert not in_maps(hva)


def in_maps(address: int) -> bool:
    """Whether something is mapped at *address*."""
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(int(first, 16) <= address < int(end, 16) for first, end in ranges)


def test_no_hugetlb_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Huge pages from the pool are given back when their memory is closed."""
    monkeypatch.setattr("kvm_util.memory._map_backing", lambda _backing, size: mmap.mmap(-1, 2 * size))
    with KeptMemory() as kept:
        memory = kept.make(BACKINGS["anonymous_hugetlb_2mb"], 2 * MIB, 0)
        hva = memory.hva
        memory.close()
        assert not in_maps(hva)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (4096, "4 KiB"), (GIB, "1 GiB"), (3 * MIB, "3 MiB"), (5, "5 bytes")]
)
def test_size_text_units(size: int, text: str) -> None:
    """A size is shown in the largest unit that divides it."""
    assert size_text(size) == text


def test_memory_of_an_interrupted_run() -> None:
    """Memory that is closed by an interruption is not kept, and views in what was interrupted do no harm."""
    with KeptMemory() as kept:
        memory = kept.make(BACKINGS["anonymous"], MIB, 0)
        memory.populate()
        view = memory.view[:8]
        with pytest.raises(KeyboardInterrupt):
            try:
                raise KeyboardInterrupt
            finally:
                memory.close()
    view.release()
