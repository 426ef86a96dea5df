# SPDX-License-Identifier: GPL-2.0-only
"""Dirty rings that fill, wrap around and are reset while vCPUs run, from several threads, and with many signals.

In each test the judge compares each ring with its vCPU's writes, and the sum of KVM_RESET_DIRTY_RINGS' counts with the
number of harvested entries.
"""

import itertools
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest

from dirty_tracking.modes import smallest_ring
from dirty_tracking.race import (
    Operation,
    Worker,
    race,
    signal_vcpus_randomly,
    signal_workers_randomly,
    workers_of,
)
from dirty_tracking.ring import ENTRY_SIZE
from dirty_tracking.shared_log import SharedLog
from dirty_tracking.vm import PAGE
from dirty_tracking.write_stream import WriteStream
from dirty_tracking.writers_vm import WritersVm
from kvm_util.kvm import Kvm

pytestmark = [pytest.mark.log_modes("ring"), pytest.mark.threads]

SHAPES = [(512 + 9, "anonymous"), (37, "anonymous")]
NPAGES = sum(count for count, _ in SHAPES)
WRITES = 1024
# KVM accepts none smaller than the first, which fills a page: kvm_vm_ioctl_enable_dirty_log_ring(), virt/kvm/kvm_main.c
SIZES = [1 << bit for bit in range((PAGE // ENTRY_SIZE).bit_length() - 1, 17)]
# More entries than all slots have pages
LARGE = 16384
# The largest ring that the short form fills
MOST_ENTRIES = 4096
# The most writes between two operations
PAUSE, STORM_PAUSE = 400, 20


def streams(vcpus: int, draw: random.Random, npages: int = NPAGES) -> list[WriteStream]:
    """All vCPUs write all pages."""
    return [WriteStream(array("I", [draw.randrange(npages) for _ in range(WRITES)]), 0) for _ in range(vcpus)]


def started(vm: WritersVm) -> SharedLog:
    """Start the vCPUs, and enable dirty logging of all slots."""
    log = SharedLog(vm)
    vm.populate()
    log.set_all_logging(on=True)
    return log


def harvests(log: SharedLog, draw: random.Random, count: int) -> Iterator[Operation]:
    """Harvests of whole rings and of some entries, in turn, so that the rings fill in between."""
    for _ in range(count):
        yield lambda: log.harvest(most=draw.randint(1, 60))
        yield log.harvest


@pytest.fixture(params=["smallest-ring", "large-ring"])
def size(request: pytest.FixtureRequest, kvm: Kvm, log_mode: str) -> int:
    """The entries of a ring that fills repeatedly, and of one that fills only if KVM emulates each store."""
    return LARGE if request.param == "large-ring" else smallest_ring(kvm)


Background = Callable[[SharedLog, Sequence[Worker]], Iterable[Operation]]
RaceHarvests = Callable[..., None]


@pytest.fixture
def race_harvests(kvm: Kvm, thorough: bool, draw: random.Random, log_mode: str, size: int) -> RaceHarvests:
    """Call it to harvest and reset in some threads while vCPUs write, and others repeat the operations of *background*."""

    def race_harvests(threads: int, background: Background = lambda _log, _harvesters: ()) -> None:
        vcpus, rounds, count = (4, 20, 60) if thorough else (2, 2, 5)
        with WritersVm(kvm, log_mode, SHAPES, streams(vcpus, draw), size) as vm:
            log = started(vm)
            for _ in range(rounds):
                jobs = [harvests(log, random.Random(draw.random()), count) for _ in range(threads)]
                harvesters = workers_of(vm, jobs, draw, PAUSE)
                others = [itertools.repeat(operation) for operation in background(log, harvesters)]
                race(vm, harvesters, workers_of(vm, others, draw, STORM_PAUSE))
                log.check()
            assert log.judge.pages_required

    return race_harvests


def test_reset_from_another_thread(race_harvests: RaceHarvests) -> None:
    """No entry is lost or reported twice when one thread harvests and another one resets at any moment."""
    race_harvests(1, lambda log, _harvesters: [log.reset])


def test_two_threads_reset_at_once(race_harvests: RaceHarvests, thorough: bool) -> None:
    """Threads that harvest and reset at once together reset as many entries as they harvested."""
    race_harvests(3 if thorough else 2)


def test_vcpus_in_a_storm_of_signals(race_harvests: RaceHarvests, draw: random.Random) -> None:
    """No write is lost when signals end KVM_RUN at any instruction."""
    race_harvests(2, lambda log, _harvesters: [signal_vcpus_randomly(log.vm, random.Random(draw.random()))])


@pytest.mark.parametrize("at", ["resetters", "both"])
def test_resets_in_a_storm_of_signals(race_harvests: RaceHarvests, draw: random.Random, at: str) -> None:
    """When signals end KVM_RESET_DIRTY_RINGS early, as since Linux 6.17, the next calls reset the rest."""

    def storms(log: SharedLog, resetters: Sequence[Worker]) -> Iterator[Operation]:
        assert log.rings is not None
        log.rings.signalled = True
        yield signal_workers_randomly(resetters, random.Random(draw.random()))
        if at == "both":
            yield signal_vcpus_randomly(log.vm, random.Random(draw.random()))

    race_harvests(2, storms)


def fill(log: SharedLog) -> None:
    """Let the vCPU write until its ring is full, at the latest when all pages are written; then stop it."""
    writers = log.vm.writers
    goal = sum(writers.published()) + sum(len(stream.pages) for stream in writers.streams)
    writers.resume()
    writers.wait(lambda: writers.any_ring_full() or sum(writers.published()) >= goal, "filling a ring")
    full = writers.any_ring_full()
    log.vm.stop()
    assert full, (
        "more pages were written than the ring has entries, and KVM_RUN did not return KVM_EXIT_DIRTY_RING_FULL"
    )


@pytest.mark.log_modes("dirty-ring")  # the other mode differs in how it is enabled, which no size changes
@pytest.mark.parametrize("entries", SIZES)
def test_every_ring_size_wraps_around(kvm: Kvm, thorough: bool, draw: random.Random, entries: int) -> None:
    """A ring of any size that KVM supports has each entry once and in its place, for several laps."""
    smallest = smallest_ring(kvm)
    if entries < smallest:
        pytest.skip(f"the smallest ring is one of {smallest} entries")
    fills = thorough or entries <= MOST_ENTRIES
    laps = 3 if fills else 1
    npages = entries + 70 if fills else MOST_ENTRIES
    pages = array("I", range(npages))
    pages.extend(range(-npages % 64))
    shapes = [(npages, "anonymous")]
    with WritersVm(kvm, "dirty-ring", shapes, [WriteStream(pages, 0)], entries) as vm:
        log = started(vm)
        while log.ledger.harvested < laps * entries:
            before = log.ledger.harvested
            race(vm, workers_of(vm, [[log.harvest]], draw, npages))
            log.check()
            assert log.ledger.harvested > before, "writes were made, and none is in the ring"
            if fills:
                fill(log)
                log.check()
        assert log.judge.pages_required
