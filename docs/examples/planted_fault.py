# SPDX-License-Identifier: GPL-2.0-only
"""A planted fault as a plugin: pages with an odd number are missing from each report."""

import pytest

from dirty_tracking.ring import DirtyRing
from kvm_util import Vm

get_dirty_log, harvest = Vm.get_dirty_log, DirtyRing.harvest


def lose_odd_bits(vm: Vm, slot: int, bitmap: bytearray) -> None:
    get_dirty_log(vm, slot, bitmap)
    bitmap[:] = bytes(byte & 0b01010101 for byte in bitmap)


def lose_odd_entries(ring: DirtyRing, most: int | None = None) -> tuple[list[int], list[int]]:
    even = [(slot, offset) for slot, offset in zip(*harvest(ring, most), strict=True) if offset % 2 == 0]
    return [slot for slot, _ in even], [offset for _, offset in even]


patch = pytest.MonkeyPatch()
patch.setattr(Vm, "get_dirty_log", lose_odd_bits)
patch.setattr(DirtyRing, "harvest", lose_odd_entries)
