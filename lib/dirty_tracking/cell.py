# SPDX-License-Identifier: GPL-2.0-only
"""A cell of the test matrix, the settings that all cells share, and where a cell's test memory goes."""

from dataclasses import dataclass, fields

from dirty_tracking.memory_check import WORDS_PER_PAGE
from dirty_tracking.vm import PAGE
from kvm_util.guest import program_slot_size
from kvm_util.kvm import DEFAULT_DEVICE
from kvm_util.memory import BACKINGS, GIB, align_down, size_text

STOPS = {
    "cooperative": "the guest sees a flag after a batch of writes, and calls the host",
    "forced": "a signal and immediate_exit end KVM_RUN wherever the guest is",
}


@dataclass(frozen=True)
class Density:
    """How a guest writes: in which order, and with how many instructions per write."""

    pattern: str
    sparse: bool


DENSITIES = {
    "sparse": Density("random", sparse=True),
    "dense-sequential": Density("sequential", sparse=False),
    "dense-random": Density("random", sparse=False),
}

# Pages added to the size that the user asked for, so that the last word of a bitmap is a partial one, as in the C test
EXTRA_PAGES = 3
# The least number of writes of each vCPU in an iteration, however slow the machine (kernel commit 73eaa2aa14b7)
MIN_WRITES = 256
# Each vCPU has a word of each page.
MAX_VCPUS = WORDS_PER_PAGE
# A vCPU that should write and has written nothing for this many seconds hangs.
HANG_TIMEOUT = 60.0


@dataclass(frozen=True)
class Cell:
    """One combination of the matrix's dimensions; each value is a key of that dimension's table."""

    log_mode: str
    guest_mode: str
    backing: str
    stop: str
    density: str
    vcpus: int

    def __str__(self) -> str:
        values = [str(getattr(self, field.name)) for field in fields(self)]
        return "-".join(values) + ("vcpu" if self.vcpus == 1 else "vcpus")


@dataclass(frozen=True)
class Settings:
    """The settings that all cells of a run share; the defaults are the C test's.

    :ivar iterations: how many times the memory is verified
    :ivar interval: the least time that the guest runs in an iteration, in milliseconds
    :ivar ring_count: entries of a dirty ring
    :ivar test_mem: size of the test memory in bytes; three pages are added
    :ivar phys_offset: guest-physical address of the test memory; None for the top of the address space
    :ivar seed: decides what the guest writes and when the host collects
    """

    iterations: int = 32
    interval: float = 10.0
    ring_count: int = 65536
    test_mem: int = GIB
    phys_offset: int | None = None
    seed: int = 0
    kvm_device: str = DEFAULT_DEVICE

    @property
    def slot_size(self) -> int:
        """The size of the test slot in bytes."""
        return self.test_mem + EXTRA_PAGES * PAGE


# Bytes of slot 0 for each vCPU's block, stacks and table of addresses, beyond 8 bytes per page of test memory
_VCPU_DATA = 4 << 20


def guest_data_size(slot_size: int, vcpus: int) -> int:
    """How many bytes of slot 0 the writers of *vcpus* vCPUs and the page tables of the test memory need."""
    per_vcpu = slot_size // PAGE * 8 + _VCPU_DATA
    return vcpus * per_vcpu + slot_size // PAGE * 8


def place_test_memory(settings: Settings, cell: Cell, limit: int) -> int:
    """The guest-physical address of the test memory.

    Without an offset it is the top of the usable range, rounded down to the backing's pages: with base pages that is an
    address which no larger unit divides, as in the C test.

    :param limit: the first address above the usable range
    :raises ValueError: the offset is not page-aligned, or the memory does not fit there
    """
    size = settings.slot_size
    lowest = program_slot_size(guest_data_size(size, cell.vcpus))
    if settings.phys_offset is None:
        gpa = align_down(limit - size, BACKINGS[cell.backing].alignment)
    else:
        gpa = settings.phys_offset
        if gpa % PAGE:
            raise ValueError(f"offset {gpa:#x} is not a multiple of the page size ({PAGE:#x})")
    if gpa < lowest:
        raise ValueError(f"test memory at {gpa:#x} runs into the guest's own memory, which ends at {lowest:#x}")
    if gpa + size > limit:
        raise ValueError(
            f"test memory of {size_text(settings.test_mem)} at {gpa:#x} ends beyond the guest-physical limit {limit:#x}"
        )
    return gpa
