# SPDX-License-Identifier: GPL-2.0-only
"""Several vCPUs write while several threads collect, clear, reset and toggle dirty logging: no write is lost.

After each round all vCPUs are stopped, the rest is collected, and the judge compares all collections with what each vCPU is
known to have written, and when (lib/dirty_tracking/judge.py).
"""

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import pytest

from dirty_tracking.bitmap import BITS_PER_WORD, new_bitmap, set_pages
from dirty_tracking.cell import Settings
from dirty_tracking.mapping_sizes import MappingSizes
from dirty_tracking.modes import LOG_MODES, smallest_ring
from dirty_tracking.platform import uses_tdp
from dirty_tracking.race import Operation, race, workers_of
from dirty_tracking.shared_log import SharedLog
from dirty_tracking.violations import Kind, violated
from dirty_tracking.vm import PAGE
from dirty_tracking.write_stream import WriteStream
from dirty_tracking.writers_vm import WritersVm
from harness.fixtures import Provided
from kvm_util import uapi
from kvm_util.binary_stats import BinaryStats
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.memory import HUGE_PAGE_SIZE

pytestmark = pytest.mark.threads

Shapes = Sequence[tuple[int, str]]
# Slots that end within a word of their bitmaps, and one that is smaller than a word
SHAPES = [(512 + 9, "anonymous"), (37, "anonymous"), (256 + 1, "shmem")]
# Two huge pages and a part of one
HUGE_NPAGES = 2 * HUGE_PAGE_SIZE // PAGE + 9
HUGE_CASES = [
    *((mode, "anonymous_thp") for mode in LOG_MODES),
    ("dirty-log", "shared_hugetlb_2mb"),
    ("clear-log", "shmem_thp"),
    ("dirty-ring", "shmem_thp"),
]
# Fewer entries than the slots have pages, so that rings fill. With PML this is too small, and KVM's smallest ring is used
RING = 512
# How many writes a vCPU makes before they repeat; a multiple of the guest's batch
WRITES = 1024
PAUSE = 400
# A slot that no vCPU writes
OTHER_SLOT, OTHER_PAGES = 100, 70
SHARINGS = ["same-pages", "own-pages", "same-few-pages"]


def streams(sharing: str, vcpus: int, seed: int, shapes: Shapes) -> list[WriteStream]:
    """What the vCPUs write: all of them all pages, each its own pages, or all of them a few pages and sometimes others."""
    result = []
    npages = sum(count for count, _ in shapes)
    for vcpu in range(vcpus):
        draw = random.Random(f"{seed}/{sharing}/{vcpu}")
        if sharing == "same-pages":
            pages = [draw.randrange(npages) for _ in range(WRITES)]
        elif sharing == "own-pages":
            pages = [draw.randrange(vcpu, npages, vcpus) for _ in range(WRITES)]
        else:
            few = [0, shapes[0][0] - 1, shapes[0][0], npages - 1]
            pages = [draw.choice(few) if draw.random() < 0.9 else draw.randrange(npages) for _ in range(WRITES)]
        result.append(WriteStream(array("I", pages), 0))
    return result


def some_collections(log: SharedLog, draw: random.Random, count: int) -> Iterator[Operation]:
    """The operations of one collector: collections of all kinds that the mode has."""
    for _ in range(count):
        slot = draw.choice(log.vm.slots)
        if log.rings is not None:
            kinds: Sequence[Operation] = (
                log.harvest,
                log.harvest,
                lambda: log.harvest(most=draw.randint(1, 40)),
                log.reset,
            )
            yield draw.choice(kinds)
        elif log.vm.mode.manual and draw.random() < 0.5:
            npages = slot.end - slot.first
            first = draw.randrange(0, npages, BITS_PER_WORD)
            last = draw.choice([*range(first + BITS_PER_WORD, npages, BITS_PER_WORD), npages])
            yield lambda slot=slot, first=first, last=last: log.collect_range(slot, first, last - first)  # type: ignore[misc]
        else:
            yield lambda slot=slot: log.collect(slot)  # type: ignore[misc]


def some_toggles(log: SharedLog, draw: random.Random, count: int, state: dict[int, bool]) -> Iterator[Operation]:
    """Toggle the dirty logging of random slots; *state* has those for which it is enabled."""
    for _ in range(count):
        slot = draw.choice(log.vm.slots)
        state[slot.slot] = not state.get(slot.slot, False)
        yield lambda slot=slot, on=state[slot.slot]: log.set_logging(slot, on)  # type: ignore[misc]


def slot_changes(log: SharedLog, draw: random.Random, count: int) -> Iterator[Operation]:
    """Create, move and delete another slot, with or without dirty logging, right after a slot that vCPUs write."""
    vm = log.vm.vm
    ends = [vm.memslots[pages.slot].gpa + len(pages.range) * PAGE for pages in log.vm.slots]

    def make() -> None:
        gpa = draw.choice(ends)
        flags = draw.choice((0, uapi.KVM_MEM_LOG_DIRTY_PAGES))
        vm.add_memory(OTHER_SLOT, gpa, OTHER_PAGES * PAGE, flags=flags)

    def move() -> None:
        memslot = vm.memslots[OTHER_SLOT]
        gpa = draw.choice([gpa for gpa in ends if gpa != memslot.gpa])
        vm.set_user_memory_region(OTHER_SLOT, gpa, memslot.memory, memslot.flags)

    def look() -> None:
        """Its bitmap is clean; a ring entry of it would be one of an unknown slot (shared_log.py)."""
        if vm.memslots[OTHER_SLOT].flags and log.rings is None:
            bitmap = new_bitmap(OTHER_PAGES)
            vm.get_dirty_log(OTHER_SLOT, bitmap)
            if set_pages(bitmap) != (list(range(OTHER_PAGES)) if log.vm.mode.initially_set else []):
                raise violated(Kind.SPURIOUS, f"pages {set_pages(bitmap)} of a slot that nobody writes")

    def delete() -> None:
        memory = vm.memslots[OTHER_SLOT].memory
        vm.delete_memory_region(OTHER_SLOT)
        memory.close()

    for _ in range(count):
        yield make
        yield look
        yield lambda: log.drop_page_tables(move)
        yield look
        yield lambda: log.drop_page_tables(delete)


def work(log: SharedLog, draw: random.Random, jobs: Sequence[Iterator[Operation]]) -> None:
    """One round: each of *jobs* in a thread of its own; then the last collection, and the check."""
    race(log.vm, workers_of(log.vm, jobs, draw, PAUSE))
    log.check()


Writing = Callable[..., AbstractContextManager[SharedLog]]


@pytest.fixture
def writing(kvm: Kvm, settings: Settings, log_mode: str) -> Writing:
    """Returns a context manager with started writers; at its end KVM must have had pages to report."""
    ring = max(RING, smallest_ring(kvm)) if LOG_MODES[log_mode].uses_ring else RING

    @contextmanager
    def of_writers(
        sharing: str, vcpus: int, on: bool = True, shapes: Shapes = SHAPES, guest_mode: str = "48bit-4k"
    ) -> Iterator[SharedLog]:
        its_streams = streams(sharing, vcpus, settings.seed, shapes)
        with WritersVm(kvm, log_mode, shapes, its_streams, ring, guest_mode=guest_mode) as vm:
            log = SharedLog(vm)
            vm.populate()
            if on:
                log.set_all_logging(on=True)
            yield log
            assert log.judge.pages_required

    return of_writers


@pytest.mark.parametrize("sharing", SHARINGS)
def test_collectors_beside_writers(writing: Writing, thorough: bool, draw: random.Random, sharing: str) -> None:
    """No write is lost while several threads GET, CLEAR, harvest and reset, and vCPUs write."""
    vcpus, rounds, count, collectors = (4, 20, 40, 3) if thorough else (3, 2, 6, 2)
    with writing(sharing, vcpus) as log:
        for _ in range(rounds):
            work(log, draw, [some_collections(log, random.Random(draw.random()), count) for _ in range(collectors)])


@pytest.mark.parametrize("sharing", SHARINGS)
def test_toggling_beside_writers(writing: Writing, thorough: bool, draw: random.Random, sharing: str) -> None:
    """Of running vCPUs each write after dirty logging was enabled is logged, and none after it was disabled."""
    vcpus, rounds, count = (4, 20, 60) if thorough else (2, 1, 4)
    with writing(sharing, vcpus, on=False) as log:

        def job() -> Iterator[Operation]:
            for _ in range(count):
                for slot in log.vm.slots:
                    yield lambda slot=slot: log.set_logging(slot, on=True)  # type: ignore[misc]
                yield lambda: log.collect_all(stopped=False)
                yield lambda: log.collect_all(stopped=False)
                for slot in log.vm.slots:
                    yield lambda slot=slot: log.set_logging(slot, on=False)  # type: ignore[misc]
            for slot in log.vm.slots:
                yield lambda slot=slot: log.set_logging(slot, on=True)  # type: ignore[misc]

        for _ in range(rounds):
            work(log, draw, [job()])
            log.set_all_logging(on=False)


@pytest.mark.parametrize(("log_mode", "backing"), HUGE_CASES, indirect=["log_mode"])
def test_huge_page_splits_beside_writers(
    kvm: Kvm,
    host: Host,
    emulates: bool,
    provided: Provided,
    writing: Writing,
    thorough: bool,
    draw: random.Random,
    backing: str,
) -> None:
    """No write is lost while huge pages are split and recovered, as dirty logging of running vCPUs is toggled."""
    if emulates:
        pytest.skip(f"{host.backend} emulates each instruction of this guest, and maps no page")
    if not kvm.check_extension(uapi.KVM_CAP_BINARY_STATS_FD):
        pytest.skip("this KVM has no KVM_CAP_BINARY_STATS_FD")
    vcpus, rounds, count = (4, 20, 40) if thorough else (2, 2, 8)
    guest_mode = "48bit-4k" if uses_tdp(host) else "48bit-2m"
    with (
        provided(backing, HUGE_NPAGES * PAGE),
        writing("same-pages", vcpus, on=False, shapes=[(HUGE_NPAGES, backing)], guest_mode=guest_mode) as log,
        BinaryStats(log.vm.vm.get_stats_fd()) as stats,
    ):

        def collecting() -> Iterator[Operation]:
            return some_collections(log, random.Random(draw.random()), count)

        for _ in range(rounds):
            huge = MappingSizes.read(stats).counts[HUGE_PAGE_SIZE]
            assert huge, "dirty logging is disabled and the host has huge pages, but none is mapped"
            toggling = some_toggles(log, random.Random(draw.random()), count, {})
            work(log, draw, [toggling, collecting()])
            log.set_all_logging(on=True)
            work(log, draw, [collecting()])
            assert MappingSizes.read(stats).counts[HUGE_PAGE_SIZE] < huge, (
                "pages with dirty logging that were written are mapped huge"
            )
            log.set_all_logging(on=False)
            work(log, draw, [collecting()])


@pytest.mark.parametrize("sharing", SHARINGS)
def test_slot_changes_beside_writers(writing: Writing, thorough: bool, draw: random.Random, sharing: str) -> None:
    """No write to a memslot is lost when KVM zaps its SPTEs because another one is deleted or moved."""
    with writing(sharing, 4 if thorough else 2) as log:
        change_slots(log, draw, thorough)


def test_slot_changes_without_zap_all(
    zap_all_quirk: int,
    writing: Writing,
    thorough: bool,
    draw: random.Random,
) -> None:
    """No write is lost when KVM zaps only the SPTEs of the deleted or moved memslot (KVM_CAP_DISABLE_QUIRKS2)."""
    with writing("same-pages", 4 if thorough else 2) as log:
        log.vm.vm.enable_cap(uapi.KVM_CAP_DISABLE_QUIRKS2, zap_all_quirk)
        change_slots(log, draw, thorough)


def change_slots(log: SharedLog, draw: random.Random, thorough: bool) -> None:
    """Change a slot in one thread and collect in another."""
    rounds, count = (20, 30) if thorough else (1, 4)
    for _ in range(rounds):
        collecting = some_collections(log, random.Random(draw.random()), 2 * count)
        work(log, draw, [slot_changes(log, random.Random(draw.random()), count), collecting])


def test_collectors_and_toggles_at_once(writing: Writing, thorough: bool, draw: random.Random) -> None:
    """No write is lost while several threads collect and another one enables and disables dirty logging."""
    vcpus, rounds, count, collectors = (4, 40, 40, 3) if thorough else (2, 2, 8, 2)
    with writing("same-pages", vcpus) as log:
        state = {slot.slot: True for slot in log.vm.slots}
        for _ in range(rounds):
            jobs = [some_collections(log, random.Random(draw.random()), count) for _ in range(collectors)]
            work(log, draw, [*jobs, some_toggles(log, random.Random(draw.random()), count, state)])
