# SPDX-License-Identifier: GPL-2.0-only
"""userfaultfd(2): memory whose pages stay missing until somebody provides them (admin-guide/mm/userfaultfd.rst)."""

import ctypes
import errno
import os
import select
import signal
from ctypes import Structure, c_int64, c_uint64
from pathlib import Path
from typing import NoReturn

from kvm_util import filtered_calls, host_limits
from kvm_util.arch import current as arch
from kvm_util.closing import Closing
from kvm_util.host_limits import HostLimit
from kvm_util.ioctl import _IOWR, KvmError, errno_name, ioctl, raw_ioctl
from kvm_util.memory import HOST_PAGE_SIZE, align_down

_UFFD = 0xAA
_UFFD_API = 0xAA
_REGISTER_MODE_MISSING, _REGISTER_MODE_WP = 1 << 0, 1 << 1
_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
_WRITEPROTECT_MODE_WP = 1 << 0
_MESSAGE_SIZE = 32
_CAP_SYS_PTRACE = 19  # <linux/capability.h>
_ADDRESS_OFFSET = 16  # of the address in a page-fault message (struct uffd_msg)


class _Api(Structure):
    _fields_ = (("api", c_uint64), ("features", c_uint64), ("ioctls", c_uint64))


class _Register(Structure):
    _fields_ = (("start", c_uint64), ("len", c_uint64), ("mode", c_uint64), ("ioctls", c_uint64))


class _Zeropage(Structure):
    _fields_ = (("start", c_uint64), ("len", c_uint64), ("mode", c_uint64), ("zeropage", c_int64))


class _Copy(Structure):
    _fields_ = (("dst", c_uint64), ("src", c_uint64), ("len", c_uint64), ("mode", c_uint64), ("copy", c_int64))


class _WriteProtect(Structure):
    _fields_ = (("start", c_uint64), ("len", c_uint64), ("mode", c_uint64))


_UFFDIO_REGISTER = _IOWR(_UFFD, 0x00, _Register)
_UFFDIO_COPY = _IOWR(_UFFD, 0x03, _Copy)
_UFFDIO_ZEROPAGE = _IOWR(_UFFD, 0x04, _Zeropage)
_UFFDIO_WRITEPROTECT = _IOWR(_UFFD, 0x06, _WriteProtect)
_UFFDIO_API = _IOWR(_UFFD, 0x3F, _Api)

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall


def _why_not(code: int) -> str:
    """Why userfaultfd(2) failed with errno *code*."""
    switch = Path("/proc/sys/vm/unprivileged_userfaultfd")  # exists if the kernel has the call (Linux 5.2)
    if (
        code == errno.EPERM
        and not host_limits.capable(_CAP_SYS_PTRACE)
        and switch.exists()
        and switch.read_text().strip() == "0"
    ):
        return "EPERM, this user may not handle the kernel's page faults (sysctl vm.unprivileged_userfaultfd=1)"
    if switch.exists() and (reason := filtered_calls.why_refused("userfaultfd", code)):
        return reason
    if code == errno.ENOSYS:
        return "this kernel has none (CONFIG_USERFAULTFD)"
    return host_limits.explain(code) or errno_name(code)


class _RegisteredPages(Closing):
    """A range of memory that is registered with a userfaultfd.

    :param hva: where the range begins, page-aligned
    :param size: in bytes, whole pages
    :param mode: of UFFDIO_REGISTER
    :param features: that UFFDIO_API has to have
    :raises HostLimit: the kernel has no userfaultfd or not these features, or this user may not handle kernel faults with it
    """

    def __init__(self, hva: int, size: int, mode: int, features: int = 0) -> None:
        self._fd = _syscall(arch.SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            raise HostLimit(f"userfaultfd: {_why_not(ctypes.get_errno())}")
        try:
            api = _Api(api=_UFFD_API, features=features)
            try:
                ioctl(self._fd, _UFFDIO_API, "UFFDIO_API", ctypes.byref(api), f"features={features:#x}")
            except KvmError as error:
                if not features or error.errno != errno.EINVAL:
                    raise
                raise HostLimit(
                    f"userfaultfd: this kernel lacks features of {features:#x} (UFFDIO_API: EINVAL)"
                ) from None
            request = _Register(start=hva, len=size, mode=mode)
            ioctl(
                self._fd, _UFFDIO_REGISTER, "UFFDIO_REGISTER", ctypes.byref(request), f"start={hva:#x}, len={size:#x}"
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unregister the range: missing pages become ordinary demand-zero pages, and waiting threads wake up."""
        os.close(self._fd)


class WriteProtectedPages(_RegisteredPages):
    """A range of memory that is write-protected until it is closed; see the base class. No vCPU may write it meanwhile."""

    def __init__(self, hva: int, size: int) -> None:
        super().__init__(hva, size, _REGISTER_MODE_WP, _FEATURE_PAGEFAULT_FLAG_WP)
        self._range = (hva, size)
        try:
            self._write_protect(_WRITEPROTECT_MODE_WP)
        except BaseException:
            super().close()
            raise

    def close(self) -> None:
        """End the write protection."""
        self._write_protect(0)
        super().close()

    def _write_protect(self, mode: int) -> None:
        start, size = self._range
        request = _WriteProtect(start=start, len=size, mode=mode)
        ioctl(self._fd, _UFFDIO_WRITEPROTECT, "UFFDIO_WRITEPROTECT", ctypes.byref(request), f"mode={mode}")


class MissingPages(_RegisteredPages):
    """A range of untouched memory whose pages stay missing until :meth:`provide`; see the base class."""

    def __init__(self, hva: int, size: int) -> None:
        super().__init__(hva, size, _REGISTER_MODE_MISSING)

    def wait(self, timeout: float) -> int:
        """Wait for a fault on a missing page; returns the faulting hva.

        :param timeout: in seconds
        :raises TimeoutError: no page was touched
        """
        if not select.select([self._fd], [], [], timeout)[0]:
            raise TimeoutError(f"no missing page was touched within {timeout:g} s")
        return self._next_fault()

    def provide(self, address: int) -> None:
        """Map a zero page at hva *address*, rounded down to a page, and wake the threads that fault on it."""
        start = align_down(address, HOST_PAGE_SIZE)
        request = _Zeropage(start=start, len=HOST_PAGE_SIZE)
        ioctl(self._fd, _UFFDIO_ZEROPAGE, "UFFDIO_ZEROPAGE", ctypes.byref(request), f"start={start:#x}")

    def _next_fault(self) -> int:
        """The hva of the next message."""
        return int.from_bytes(os.read(self._fd, _MESSAGE_SIZE)[_ADDRESS_OFFSET : _ADDRESS_OFFSET + 8], "little")


class SuppliedPages(MissingPages):
    """A range of untouched memory that gets its pages from *image* when they are touched, until it is closed.

    A child process supplies them, as for a VMM that restores a snapshot. A thread could not: any other thread of this process
    that touches a missing page waits for it with the interpreter's lock.

    :param hva: where the range begins, page-aligned; it is as long as *image*
    """

    def __init__(self, hva: int, image: bytes) -> None:
        super().__init__(hva, len(image))
        self._hva = hva
        self._image = image
        self._child = 0
        parent = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            try:
                # Else a signal's handler could run in the child, and what it raises go through this process's frames there.
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                self._child = os.fork()
                if not self._child:
                    self._supply(parent)
            finally:
                # The child's file is the last: if the child dies, the pages become zero pages, and nobody waits for them.
                super().close()
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except BaseException:
            self.close()
            raise

    def finish(self) -> None:
        """Supply no more pages.

        :raises HostLimit: the child has ended before, and pages lack their contents since
        """
        # What waits for a page wakes before an ending child can be waited for. One that ends does not stop any more.
        os.kill(self._child, signal.SIGSTOP)
        state = os.waitid(os.P_PID, self._child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert state is not None
        if state.si_code != os.CLD_STOPPED:
            failed = f"UFFDIO_COPY: {errno_name(state.si_status)}"
            why = failed if state.si_code == os.CLD_EXITED else f"signal {state.si_status}"
            raise HostLimit(f"userfaultfd: the process that supplies missing pages has ended: {why}")

    def close(self) -> None:
        """End the child, and unregister the range."""
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._child = 0

    def _supply(self, parent: int) -> NoReturn:
        """Supply pages without end; in the child, which ends with its parent, or with the errno of what failed."""
        status = 0
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            # A thread may have stopped waiting since there was a message to read.
            os.set_blocking(self._fd, True)
            source = ctypes.cast(ctypes.c_char_p(self._image), ctypes.c_void_p).value or 0
            while os.getppid() == parent:
                start = align_down(self._next_fault(), HOST_PAGE_SIZE)
                request = _Copy(dst=start, src=source + start - self._hva, len=HOST_PAGE_SIZE)
                result, code = raw_ioctl(self._fd, _UFFDIO_COPY, ctypes.byref(request))
                # Several threads can wait for one page, and each has a message.
                if result and code != errno.EEXIST:
                    status = code
                    break
        finally:
            os._exit(status)
