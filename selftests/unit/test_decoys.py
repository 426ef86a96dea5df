# SPDX-License-Identifier: GPL-2.0-only
"""The decoys lie where KVM takes a memslot, on CPUs with few bits of physical address, too."""

import pytest

from dirty_tracking.scripted_vm import LIST_SIZE
from dirty_tracking.vm import PAGE
from kvm_util.guest import program_slot_size
from kvm_util.memory import BACKINGS, GIB, MIB
from kvm_util.vm import Memslot
from selftests.decoys import BYTE_ADDRESS_DECOY, HOST_ADDRESS_DECOY, decoys, low_memory
from selftests.stores import NPAGES, SLOT, SLOT_GPA, WRITTEN


@pytest.mark.parametrize(
    ("bits", "expected"), [(36, [HOST_ADDRESS_DECOY]), (39, [HOST_ADDRESS_DECOY, BYTE_ADDRESS_DECOY])]
)
def test_decoys_below_the_address_limit(bits: int, expected: list[int]) -> None:
    """A decoy that ends above what a CPU can address is left out, and all decoys are within 39 bits."""
    memory = low_memory(BACKINGS["anonymous"], NPAGES * PAGE, SLOT_GPA)
    try:
        places = list(decoys(Memslot(SLOT, SLOT_GPA, memory, 0), WRITTEN, 2, 1 << bits))
    finally:
        memory.close()
    assert [slot for slot, _, _ in places] == expected
    assert all(gpa + size <= 1 << bits for _, gpa, size in places)
    assert GIB <= places[0][1] < 2 * GIB


def test_slot_beside_decoys() -> None:
    """The slot that has decoys begins above the program's slot, with the lists and page tables of several vCPUs."""
    assert program_slot_size(8 * 2 * LIST_SIZE + 16 * MIB) <= SLOT_GPA
