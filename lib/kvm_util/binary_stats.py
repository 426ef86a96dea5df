# SPDX-License-Identifier: GPL-2.0-only
"""KVM's binary statistics of a VM or a vCPU: the file that KVM_GET_STATS_FD gives (api.rst 4.133)."""

import ctypes
import os
import struct
from dataclasses import dataclass
from types import TracebackType

from kvm_util import uapi
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
    """The file is not what api.rst says; the text says where."""


@dataclass(frozen=True)
class Statistic:
    """One statistic of the file.

    :ivar kind: ``instant`` values go up and down, ``cumulative`` ones only up, ``peak`` ones are the highest so far
    :ivar offset: of its values in the file, in bytes
    :ivar count: of its values; a histogram has several
    """

    name: str
    kind: str
    offset: int
    count: int


class BinaryStats:
    """The statistics in file *fd*, which is closed with this object.

    The file's layout is read once, for it does not change; the values are read anew each time.

    :raises BadStats: the file is not what api.rst says
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        try:
            header = uapi.kvm_stats_header.from_buffer_copy(self._read(0, ctypes.sizeof(uapi.kvm_stats_header)))
            self.id = _text(self._read(header.id_offset, header.name_size), "the id")
            one = ctypes.sizeof(uapi.kvm_stats_desc) + header.name_size
            table = self._read(header.desc_offset, header.num_desc * one)
            found = [_statistic(table[at : at + one], header.data_offset) for at in range(0, len(table), one)]
        except BaseException:
            self.close()
            raise
        self.statistics = {statistic.name: statistic for statistic in found}

    def values(self, name: str) -> tuple[int, ...]:
        """The values of statistic *name* as they are now.

        :raises KeyError: this kernel has none of that name
        """
        statistic = self.statistics[name]
        return struct.unpack(f"={statistic.count}Q", self._read(statistic.offset, statistic.count * _VALUE_SIZE))

    def value(self, name: str) -> int:
        """The value of statistic *name*, which has one."""
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

    def __enter__(self) -> "BinaryStats":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _statistic(data: bytes, data_offset: int) -> Statistic:
    """The statistic whose descriptor, name included, is *data*."""
    descriptor = uapi.kvm_stats_desc.from_buffer_copy(data)
    name = _text(data[ctypes.sizeof(uapi.kvm_stats_desc) :], "a statistic's name")
    kind = _TYPES.get(descriptor.flags & uapi.KVM_STATS_TYPE_MASK)
    if kind is None:
        raise BadStats(f"statistic {name} is of unknown type, its flags are {descriptor.flags:#x}")
    if not descriptor.size:
        raise BadStats(f"statistic {name} has no value")
    return Statistic(name, kind, data_offset + descriptor.offset, descriptor.size)


def _text(data: bytes, what: str) -> str:
    """The zero-terminated text that *data* begins with."""
    text, zero, _ = data.partition(b"\0")
    if not zero or not text:
        raise BadStats(f"{what} is empty, or has no end: {data!r}")
    return text.decode("ascii", "backslashreplace")
