# SPDX-License-Identifier: GPL-2.0-only
"""Snapshots: a base image and the pages that are reported at each pause are the memory, byte for byte."""

import random
from contextlib import closing

import pytest

from dirty_tracking.memory_copy import MemoryCopy
from dirty_tracking.vm import PAGE
from dirty_tracking.writers import Pace
from dirty_tracking.writers_vm import WritersVm
from kvm_util.kvm import Kvm
from kvm_util.lazy_memory import LazyMemory
from kvm_util.memory import BACKINGS, Backing
from selftests.scenarios.guests import RING, streams

pytestmark = pytest.mark.threads

SHAPES = [(70, "shmem"), (50, "anonymous")]
VCPUS = 2
# The least number of writes of each vCPU between two pauses, and how many pages of each slot the host fills then
WRITES, FILLED = 32, 4


def lazy_memory(draw: random.Random, backing: Backing, size: int, gpa: int) -> LazyMemory:
    """Memory of random contents, but for the first half of each page, to which the vCPUs write."""
    return LazyMemory(backing, b"".join(bytes(PAGE // 2) + draw.randbytes(PAGE // 2) for _ in range(size // PAGE)), gpa)


@pytest.fixture
def userfaultfd() -> None:
    """Skips where this user's memory cannot be supplied by userfaultfd."""
    LazyMemory(BACKINGS["anonymous"], bytes(PAGE), 0).close()


@pytest.mark.log_modes("dirty-log", "clear-log", "dirty-ring")
@pytest.mark.usefixtures("userfaultfd")
def test_snapshots_of_lazily_restored_vm(kvm: Kvm, log_mode: str, draw: random.Random, thorough: bool) -> None:
    """The base image and the pages reported at each pause make up the memory of a VM that was restored by userfaultfd.

    All slots are logged before the first instruction. That the host fills a page is no write of the guest's.
    """
    npages = sum(count for count, _ in SHAPES)
    vm = WritersVm(
        kvm, log_mode, SHAPES, streams(VCPUS, npages, "random", draw), RING, Pace.VERY_SPARSE, touch=False,
        make_memory=lambda backing, size, gpa: lazy_memory(draw, backing, size, gpa),
    )  # fmt: skip
    with vm, closing(MemoryCopy(vm)) as snapshot:
        for slot, memslot in vm.vm.memslots.items():
            memory = memslot.memory
            snapshot.copies[slot][:] = memory.image if isinstance(memory, LazyMemory) else bytes(memory.view)
        snapshot.enable_logging(stopped=True)
        # In the base image, too, where all pages are dirty at first
        snapshot.collect(stopped=True)
        vm.populate()
        for _ in range(60 if thorough else 6):
            for pages in vm.slots:
                for page in draw.sample(range(len(pages.range)), FILLED):
                    bytes(vm.vm.memslots[pages.slot].memory.view[page * PAGE : page * PAGE + 1])
            before = vm.writers.published()
            vm.writers.resume()
            vm.writers.wait_for_writes(WRITES, before)
            vm.stop()
            snapshot.transfer(stopped=True)
        for memslot in vm.vm.memslots.values():
            # Else a page that could not be filled would look like a lost write.
            if isinstance(memslot.memory, LazyMemory):
                memslot.memory.complete()
        snapshot.verify()
