# SPDX-License-Identifier: GPL-2.0-only
"""The reader of binary statistics, with synthetic files, valid and truncated, and with KVM's own."""

import os
import struct

import pytest

from kvm_util import uapi
from kvm_util.binary_stats import BadStats, BinaryStats
from kvm_util.kvm import Kvm

NAME_SIZE = 16
HEADER = struct.Struct("=6I")
DESCRIPTOR = struct.Struct(f"=IhHII{NAME_SIZE}s")
# Type, exponent, number of values, offset, bucket size and name
INSTANT = (1, 0, 1, 0, 0, b"pages_2m")
HISTOGRAM = (4 | 0x120, -9, 3, 8, 0, b"halt_hist")
PEAK = (2, 0, 1, 32, 0, b"max_rmap")


def stats_file(*descriptors: tuple[int, int, int, int, int, bytes], data: bytes = bytes(40)) -> int:
    """Create a statistics file (api.rst 4.133) with a gap before each part."""
    at_id, at_descriptors = 32, 64
    at_data = at_descriptors + len(descriptors) * DESCRIPTOR.size + 8
    file = os.memfd_create("stats")
    os.pwrite(file, HEADER.pack(0, NAME_SIZE, len(descriptors), at_id, at_descriptors, at_data), 0)
    os.pwrite(file, b"".join(DESCRIPTOR.pack(*fields) for fields in descriptors), at_descriptors)
    os.pwrite(file, data, at_data)
    return file


def test_values_are_read_at_each_call() -> None:
    """Each statistic's value is found in the file, and read at each call; an unknown one is a KeyError."""
    file = stats_file(INSTANT, HISTOGRAM, PEAK, data=struct.pack("=5Q", 7, 1, 2, 1 << 63, 9))
    with BinaryStats(file) as stats:
        assert [stats.value(name) for name in ("pages_2m", "halt_hist", "max_rmap")] == [7, 1, 9]
        os.pwrite(file, struct.pack("=Q", 3), 64 + 3 * DESCRIPTOR.size + 8)
        assert stats.value("pages_2m") == 3
        with pytest.raises(KeyError, match="pages_4k"):
            stats.value("pages_4k")


def test_truncated_statistics_file() -> None:
    """A file that ends too early is an error that says where; a constructor that fails closes the descriptor."""
    file = os.memfd_create("stats")
    with pytest.raises(BadStats, match="0 bytes of 24 at 0"):
        BinaryStats(file)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
    with BinaryStats(stats_file(PEAK, data=bytes(8))) as stats, pytest.raises(BadStats, match="0 bytes of 8"):
        stats.value("max_rmap")


def test_kvm_page_size_statistics(kvm: Kvm) -> None:
    """KVM's pages_4k, pages_2m and pages_1g are 0 for a VM without memory."""
    if not kvm.check_extension(uapi.KVM_CAP_BINARY_STATS_FD):
        pytest.skip("this KVM has no KVM_CAP_BINARY_STATS_FD")
    with kvm.create_vm() as vm, BinaryStats(vm.get_stats_fd()) as stats:
        assert [stats.value(name) for name in ("pages_4k", "pages_2m", "pages_1g")] == [0, 0, 0]
