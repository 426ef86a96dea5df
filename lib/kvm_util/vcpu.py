# SPDX-License-Identifier: GPL-2.0-only
"""A vCPU: its ioctls and its shared ``struct kvm_run``."""

import ctypes
import errno
import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from kvm_util import uapi
from kvm_util.ioctl import call_on_kvm, fail, ioctl, raw_ioctl

EXIT_REASONS = {
    value: name
    for name, value in vars(uapi).items()
    if name.startswith("KVM_EXIT_") and not name.startswith("KVM_EXIT_IO_")
}

_SIGSET_SIZE = 8  # bytes of the kernel's sigset_t


class Vcpu:
    """An open vCPU; owns its descriptor.

    :ivar run: the ``struct kvm_run`` that it shares with KVM (api.rst section 5)
    :ivar closing: closed before the vCPU is, such as views of what :meth:`map_shared` returned
    :param fd: what KVM_CREATE_VCPU returned
    :param mmap_size: what KVM_GET_VCPU_MMAP_SIZE returned, in bytes
    """

    def __init__(self, fd: int, vcpu_id: int, mmap_size: int) -> None:
        self.fd = fd
        self.id = vcpu_id
        try:
            self._map = self.map_shared(mmap_size, 0, f"struct kvm_run of vCPU {vcpu_id}")
        except BaseException:
            os.close(fd)
            raise
        # Access goes through the address because a ctypes view of the map would keep it from being closed.
        self._run_address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.run = uapi.kvm_run.from_address(self._run_address)
        self.closing = ExitStack()

    def kvm_run(self) -> int:
        """KVM_RUN: run the guest until its next exit; returns 0, or EINTR if a signal or immediate_exit ended it.

        :raises KvmError: any other error
        :raises HostLimit: a limit of the host explains the error
        """
        result, code = raw_ioctl(self.fd, uapi.KVM_RUN)
        if result < 0 and code != errno.EINTR:
            fail(code, "KVM_RUN", f"vCPU {self.id}")
        return code

    @contextmanager
    def pending_signal(self) -> Iterator[None]:
        """A signal is pending in each KVM_RUN of this thread, from its first moment on (api.rst 4.22, KVM_SET_SIGNAL_MASK)."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        none_blocked = bytes(uapi.kvm_signal_mask(len=_SIGSET_SIZE)) + bytes(_SIGSET_SIZE)
        try:
            ioctl(self.fd, uapi.KVM_SET_SIGNAL_MASK, "KVM_SET_SIGNAL_MASK", none_blocked, f"vCPU {self.id}")
            signal.raise_signal(signal.SIGUSR2)
            yield
        finally:
            signal.sigtimedwait({signal.SIGUSR2}, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            ioctl(self.fd, uapi.KVM_SET_SIGNAL_MASK, "KVM_SET_SIGNAL_MASK", None, f"vCPU {self.id}")

    def enable_cap(self, cap: int) -> None:
        """KVM_ENABLE_CAP on the vCPU, without arguments (api.rst section 6)."""
        request = uapi.kvm_enable_cap(cap=cap)
        ioctl(self.fd, uapi.KVM_ENABLE_CAP, "KVM_ENABLE_CAP", ctypes.byref(request), f"vCPU {self.id}, cap={cap}")

    def pre_fault_memory(self, gpa: int, size: int) -> None:
        """:meth:`pre_fault_some`, again until all *size* bytes at *gpa* are mapped."""
        left = size
        while left:
            left = self.pre_fault_some(gpa + size - left, left)

    def pre_fault_some(self, gpa: int, size: int) -> int:
        """KVM_PRE_FAULT_MEMORY: map the first of *size* bytes at *gpa* as read faults would (api.rst 4.143).

        The vCPU must not be running.

        :returns: how many bytes are left to do; fewer than *size*
        """
        request = uapi._kvm_pre_fault_memory(gpa=gpa, size=size)
        asked = f"vCPU {self.id}, gpa={gpa:#x}, size={size:#x}"
        ioctl(self.fd, uapi.KVM_PRE_FAULT_MEMORY, "KVM_PRE_FAULT_MEMORY", ctypes.byref(request), asked)
        return int(request.size)

    def map_shared(self, size: int, offset: int, what: str) -> mmap.mmap:
        """Map *size* bytes at *offset* of the vCPU's file, shared and writable. The mapping keeps the VM alive.

        :param what: the region in words, for the error message
        :raises KvmError: mmap failed
        """
        with call_on_kvm("mmap", what, size):
            return mmap.mmap(self.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)

    def exit_reason(self) -> str:
        """The reason for the last exit by name, such as ``KVM_EXIT_IO``."""
        reason = self.run.exit_reason
        return EXIT_REASONS.get(reason, f"exit reason {reason}")

    def exit_details(self) -> str:
        """Details of the last exit, in parentheses after a space; empty for reasons that have none."""
        run = self.run
        if run.exit_reason == uapi.KVM_EXIT_IO:
            direction = "out" if run.io.direction == uapi.KVM_EXIT_IO_OUT else "in"
            return f" ({direction}, port {run.io.port:#x})"
        if run.exit_reason == uapi.KVM_EXIT_MMIO:
            return f" ({'write' if run.mmio.is_write else 'read'} of gpa {run.mmio.phys_addr:#x}, no memslot there)"
        if run.exit_reason == uapi.KVM_EXIT_FAIL_ENTRY:
            return f" (hardware reason {run.fail_entry.hardware_entry_failure_reason:#x})"
        if run.exit_reason == uapi.KVM_EXIT_INTERNAL_ERROR:
            values = " ".join(f"{run.internal.data[i]:#x}" for i in range(min(run.internal.ndata, 16)))
            return f" (suberror {run.internal.suberror}: {values})"
        if run.exit_reason == uapi.KVM_EXIT_SHUTDOWN:
            return " (triple fault)"
        return ""

    def close(self) -> None:
        """Unmap the shared region and close the vCPU, which must not be running."""
        if self.fd >= 0:
            self.closing.close()
            del self.run
            self._map.close()
            os.close(self.fd)
            self.fd = -1
