# SPDX-License-Identifier: GPL-2.0-only
"""Reader for the binary statistics of a VM or a vCPU (KVM_GET_STATS_FD, api.rst 4.133)."""

import ctypes
import os

from kvm_util import uapi
from kvm_util.closing import Closing
from kvm_util.ioctl import call_on_kvm

_VALUE_SIZE = 8


class BadStats(Exception):
    """The statistics file is shorter than it says; the message says where."""


class BinaryStats(Closing):
    """The statistics in file *fd*; owns the descriptor.

    The constructor reads the layout, which never changes. Values are read from the file at each call.

    :raises BadStats: the file does not follow api.rst 4.133
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._offsets: dict[str, int] = {}
        try:
            header = uapi.kvm_stats_header.from_buffer_copy(self._read(0, ctypes.sizeof(uapi.kvm_stats_header)))
            size = ctypes.sizeof(uapi.kvm_stats_desc) + header.name_size
            for number in range(header.num_desc):
                data = self._read(header.desc_offset + number * size, size)
                name, _, _ = data[ctypes.sizeof(uapi.kvm_stats_desc) :].partition(b"\0")
                descriptor = uapi.kvm_stats_desc.from_buffer_copy(data)
                self._offsets[name.decode("ascii", "backslashreplace")] = header.data_offset + descriptor.offset
        except BaseException:
            self.close()
            raise

    def value(self, name: str) -> int:
        """The current value of statistic *name*; of a histogram the first one.

        :raises KeyError: this kernel has no statistic of that name
        """
        return int.from_bytes(self._read(self._offsets[name], _VALUE_SIZE), "little")

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
