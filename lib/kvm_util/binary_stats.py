# SPDX-License-Identifier: GPL-2.0-only
"""Reader for the binary statistics of a VM or a vCPU (KVM_GET_STATS_FD, api.rst 4.133)."""

import ctypes
import os
import struct
from dataclasses import dataclass

from kvm_util import uapi
from kvm_util.closing import Closing
from kvm_util.ioctl import call_on_kvm

_TYPES = {
    uapi.KVM_STATS_TYPE_CUMULATIVE: "cumulative",
    uapi.KVM_STATS_TYPE_INSTANT: "instant",
    uapi.KVM_STATS_TYPE_PEAK: "peak",
    uapi.KVM_STATS_TYPE_LINEAR_HIST: "linear histogram",
    uapi.KVM_STATS_TYPE_LOG_HIST: "logarithmic histogram",
}
_VALUE_SIZE = 8


class BadStats(Exception):
    """The statistics file does not follow api.rst 4.133; the message says where."""


@dataclass(frozen=True)
class Statistic:
    """Where one statistic is in the file, and how to read it.

    :ivar kind: ``instant`` (goes up and down), ``cumulative`` (only goes up), ``peak`` (highest value so far), or
        ``linear histogram`` and ``logarithmic histogram``
    :ivar offset: of its first value, in bytes from the start of the file
    :ivar count: number of 64-bit values; more than one for a histogram
    """

    name: str
    kind: str
    offset: int
    count: int


class BinaryStats(Closing):
    """The statistics in file *fd*; owns the descriptor.

    The constructor reads the layout, which never changes. Values are read from the file at each call.

    :raises BadStats: the file does not follow api.rst 4.133
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        try:
            header = uapi.kvm_stats_header.from_buffer_copy(self._read(0, ctypes.sizeof(uapi.kvm_stats_header)))
            self.id = _text(self._read(header.id_offset, header.name_size), "the id")
            size = ctypes.sizeof(uapi.kvm_stats_desc) + header.name_size
            table = self._read(header.desc_offset, header.num_desc * size)
            found = [_statistic(table[at : at + size], header.data_offset) for at in range(0, len(table), size)]
        except BaseException:
            self.close()
            raise
        self.statistics = {statistic.name: statistic for statistic in found}

    def values(self, name: str) -> tuple[int, ...]:
        """The current values of statistic *name*.

        :raises KeyError: this kernel has no statistic of that name
        """
        statistic = self.statistics[name]
        return struct.unpack(f"={statistic.count}Q", self._read(statistic.offset, statistic.count * _VALUE_SIZE))

    def value(self, name: str) -> int:
        """The current value of statistic *name*, which must have exactly one."""
        (value,) = self.values(name)
        return value

    def _read(self, offset: int, size: int) -> bytes:
        with call_on_kvm("pread", f"statistics file, {size} bytes at {offset}"):
            data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise BadStats(f"the statistics file has {len(data)} bytes of {size} at {offset}")
        return data

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _statistic(data: bytes, data_offset: int) -> Statistic:
    """Parse one descriptor, including the name that follows it."""
    descriptor = uapi.kvm_stats_desc.from_buffer_copy(data)
    name = _text(data[ctypes.sizeof(uapi.kvm_stats_desc) :], "a statistic's name")
    kind = _TYPES.get(descriptor.flags & uapi.KVM_STATS_TYPE_MASK)
    if kind is None:
        raise BadStats(f"statistic {name} is of unknown type, its flags are {descriptor.flags:#x}")
    if not descriptor.size:
        raise BadStats(f"statistic {name} has no value")
    return Statistic(name, kind, data_offset + descriptor.offset, descriptor.size)


def _text(data: bytes, what: str) -> str:
    """The NUL-terminated string at the start of *data*."""
    text, zero, _ = data.partition(b"\0")
    if not zero or not text:
        raise BadStats(f"{what} is empty, or has no end: {data!r}")
    return text.decode("ascii", "backslashreplace")
