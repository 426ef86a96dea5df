# SPDX-License-Identifier: GPL-2.0-only
"""The KVM device, ``/dev/kvm``: its system ioctls."""

import errno
import grp
import os
import stat
from functools import cached_property

from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.closing import Closing
from kvm_util.host_limits import explained
from kvm_util.ioctl import ioctl, raw_ioctl
from kvm_util.vm import Vm

DEFAULT_DEVICE = "/dev/kvm"
_GROUP_MAY_USE = stat.S_IRGRP | stat.S_IWGRP


class KvmUnavailable(Exception):
    """KVM cannot be used on this host; the message says why and what to do."""


class Kvm(Closing):
    """An open KVM device. Methods are named after the system ioctls.

    :param device: path of the device node
    :raises KvmUnavailable: the device is missing, may not be opened, or lacks API version 12 or KVM_CAP_IMMEDIATE_EXIT
    :raises HostLimit: a limit of the host keeps it from being opened
    """

    def __init__(self, device: str = DEFAULT_DEVICE) -> None:
        self.device = device
        self.fd = _open(device)
        try:
            version, code = raw_ioctl(self.fd, uapi.KVM_GET_API_VERSION)
            if code:
                raise KvmUnavailable(
                    f"{device} does not answer KVM_GET_API_VERSION ({os.strerror(code)}): not a KVM device"
                )
            if version != uapi.KVM_API_VERSION:
                raise KvmUnavailable(f"{device} speaks KVM API version {version}, this suite {uapi.KVM_API_VERSION}")
            if not self.check_extension(uapi.KVM_CAP_IMMEDIATE_EXIT):
                raise KvmUnavailable(
                    f"{device} has no KVM_CAP_IMMEDIATE_EXIT: a kernel of Linux 4.12 or later is needed"
                )
        except BaseException:
            self.close()
            raise

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 if *cap* is not supported, else a positive value that depends on it (api.rst 4.4)."""
        return ioctl(self.fd, uapi.KVM_CHECK_EXTENSION, "KVM_CHECK_EXTENSION", cap, f"cap={cap}")

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: the size in bytes of a vCPU's shared region, which begins with ``struct kvm_run``."""
        return ioctl(self.fd, uapi.KVM_GET_VCPU_MMAP_SIZE, "KVM_GET_VCPU_MMAP_SIZE")

    @cached_property
    def supported_cpuid(self) -> "arch.Cpuid":
        """What KVM_GET_SUPPORTED_CPUID returned first; nothing in the suite changes it."""
        return arch.get_supported_cpuid(self.fd)

    def create_vm(self) -> Vm:
        """KVM_CREATE_VM with the default machine type."""
        size = self.get_vcpu_mmap_size()  # before the VM exists, so that a failure leaks none
        return Vm(ioctl(self.fd, uapi.KVM_CREATE_VM, "KVM_CREATE_VM", 0), size)

    def close(self) -> None:
        """Close the device. Its VMs stay open until they are closed themselves."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open(device: str) -> int:
    try:
        with explained(f"{device} cannot be opened"):
            return os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        if device != DEFAULT_DEVICE:
            raise KvmUnavailable(f"{device} does not exist (--kvm-device; KVM's own is {DEFAULT_DEVICE})") from None
        raise KvmUnavailable(
            f"{device} does not exist: load KVM (modprobe kvm_intel or modprobe kvm_amd), and if that fails switch on VT-x or"
            " SVM in the firmware, or nested virtualization in the hypervisor below"
        ) from None
    except PermissionError as error:
        raise KvmUnavailable(f"{device} may not be opened by this user: {_how_to_open(device, error)}") from None
    except OSError as error:
        raise KvmUnavailable(f"{device} cannot be opened: {error.strerror}") from None


def _how_to_open(device: str, error: PermissionError) -> str:
    """How to get permission to open *device*."""
    elsewhere = "or, without it, make check-kernel KERNEL=debian:6.12"
    if error.errno == errno.EPERM:
        return f"the container's list of devices leaves it out (docker run --device {device}), {elsewhere}"
    try:
        status = os.stat(device)
        group = grp.getgrgid(status.st_gid).gr_name
    except (OSError, KeyError):
        return f"look at its owner and mode (ls -l {device}), {elsewhere}"
    if status.st_gid and status.st_mode & _GROUP_MAY_USE == _GROUP_MAY_USE:
        if status.st_gid in (os.getegid(), *os.getgroups()):
            return f"look at its access list and the folders above it (getfacl {device}), {elsewhere}"
        return f"join its group (sudo usermod -aG {group} $USER, then log in again), {elsewhere}"
    return (
        f"it is group {group}'s with mode {stat.filemode(status.st_mode)[1:]}"
        f" (be root, or: sudo chgrp kvm {device}; sudo chmod 660 {device}; and join group kvm), {elsewhere}"
    )
