# SPDX-License-Identifier: GPL-2.0-only
"""The reader of binary statistics, with synthetic files, valid and malformed, and with KVM's own."""

import os
import struct
from collections.abc import Callable

import pytest

from kvm_util import uapi
from kvm_util.binary_stats import BadStats, BinaryStats, Statistic
from kvm_util.kvm import Kvm

NAME_SIZE = 16
HEADER = struct.Struct("=6I")
DESCRIPTOR = struct.Struct(f"=IhHII{NAME_SIZE}s")
ID = b"kvm-1"
INSTANT = (uapi.KVM_STATS_TYPE_INSTANT, 0, 1, 0, 0, b"pages_2m")
HISTOGRAM = (uapi.KVM_STATS_TYPE_LOG_HIST | 0x120, -9, 3, 8, 0, b"halt_hist")
PEAK = (uapi.KVM_STATS_TYPE_PEAK, 0, 1, 32, 0, b"max_rmap")


def stats_file(*descriptors: tuple[int, int, int, int, int, bytes], data: bytes = bytes(40), name: bytes = ID) -> int:
    """Create a statistics file (api.rst 4.133) with a gap before each part."""
    at_id, at_descriptors = 32, 64
    at_data = at_descriptors + len(descriptors) * DESCRIPTOR.size + 8
    file = os.memfd_create("stats")
    os.pwrite(file, HEADER.pack(0, NAME_SIZE, len(descriptors), at_id, at_descriptors, at_data), 0)
    os.pwrite(file, name.ljust(NAME_SIZE, b"\0"), at_id)
    os.pwrite(file, b"".join(DESCRIPTOR.pack(*one) for one in descriptors), at_descriptors)
    os.pwrite(file, data, at_data)
    return file


def test_statistics_are_parsed() -> None:
    """Names, types and values of statistics are read from the file."""
    with BinaryStats(stats_file(INSTANT, HISTOGRAM, PEAK, data=struct.pack("=5Q", 7, 1, 2, 1 << 63, 9))) as stats:
        assert stats.id == "kvm-1"
        assert {name: (one.kind, one.count) for name, one in stats.statistics.items()} == {
            "pages_2m": ("instant", 1),
            "halt_hist": ("logarithmic histogram", 3),
            "max_rmap": ("peak", 1),
        }
        assert stats.value("pages_2m") == 7
        assert stats.values("halt_hist") == (1, 2, 1 << 63)
        assert stats.value("max_rmap") == 9


def test_values_are_read_at_each_call() -> None:
    """A value is read from the file at each call."""
    file = stats_file(INSTANT)
    with BinaryStats(file) as stats:
        assert stats.value("pages_2m") == 0
        os.pwrite(file, struct.pack("=Q", 3), stats.statistics["pages_2m"].offset)
        assert stats.value("pages_2m") == 3


def test_unknown_statistic() -> None:
    """Asking for an unknown statistic is a KeyError."""
    with BinaryStats(stats_file(INSTANT)) as stats, pytest.raises(KeyError, match="pages_4k"):
        stats.value("pages_4k")


def test_file_without_statistics() -> None:
    """A file without statistics is valid."""
    with BinaryStats(stats_file()) as stats:
        assert stats.statistics == {}


BAD: dict[str, tuple[Callable[[], int], str]] = {
    "empty": (lambda: os.memfd_create("stats"), "0 bytes of 24 at 0"),
    "type": (lambda: stats_file((0xF, 0, 1, 0, 0, b"odd")), "statistic odd is of unknown type, its flags are 0xf"),
    "no-value": (lambda: stats_file((0, 0, 0, 0, 0, b"none")), "statistic none has no value"),
    "no-name": (lambda: stats_file((0, 0, 1, 0, 0, b"")), "a statistic's name is empty"),
    "endless-name": (lambda: stats_file((0, 0, 1, 0, 0, b"x" * NAME_SIZE)), "a statistic's name .* has no end"),
    "no-id": (lambda: stats_file(INSTANT, name=b""), "the id is empty"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=list(BAD))
def test_malformed_statistics_file(make: Callable[[], int], message: str) -> None:
    """A malformed file is an error that names the defect, and its descriptor is closed."""
    file = make()
    with pytest.raises(BadStats, match=message):
        BinaryStats(file)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_value_beyond_the_end_of_file() -> None:
    """A descriptor that points beyond the end of the file is an error when its value is read."""
    with BinaryStats(stats_file(PEAK, data=bytes(8))) as stats, pytest.raises(BadStats, match="0 bytes of 8"):
        stats.value("max_rmap")


def test_kvm_page_size_statistics(kvm: Kvm) -> None:
    """KVM's pages_4k, pages_2m and pages_1g are instant values, 0 for a VM without memory."""
    if not kvm.check_extension(uapi.KVM_CAP_BINARY_STATS_FD):
        pytest.skip("this KVM has no KVM_CAP_BINARY_STATS_FD")
    with kvm.create_vm() as vm, BinaryStats(vm.get_stats_fd()) as stats:
        assert stats.id.startswith("kvm-")
        for name in ("pages_4k", "pages_2m", "pages_1g"):
            assert stats.statistics[name] == Statistic(name, "instant", stats.statistics[name].offset, 1)
            assert stats.value(name) == 0
