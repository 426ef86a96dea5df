# SPDX-License-Identifier: GPL-2.0-only
"""All that differs between architectures when a kernel is found, packed, booted and talked to.

A port adds an :class:`Arch` to ``_ARCHITECTURES``, and its own emulator_probe.S, emulator_probe.py and emulator_faults.py
where QEMU emulates the guests of its hypervisor.
"""

import platform
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from runner.errors import CannotTest

# Offset and value of the magic number in a boot image (Documentation/arch/x86/boot.rst, Documentation/arch/arm64/booting.rst,
# Documentation/arch/riscv/boot-image-header.rst), and e_machine of an ELF file (include/uapi/linux/elf-em.h)
BOOT_MAGICS = {"x86_64": (0x202, b"HdrS"), "arm64": (56, b"ARM\x64"), "riscv": (56, b"RSC\x05")}
ELF_MACHINES = {3: "i386", 22: "s390", 62: "x86_64", 183: "arm64", 243: "riscv", 258: "loongarch"}
# How much of an image's start has its header
HEADER_SIZE = 0x10000


@dataclass(frozen=True)
class Arch:
    """One architecture.

    :ivar name: the kernel's name for it, a key of BOOT_MAGICS
    :ivar debian: Debian's name for it, in packages and in the flavours of kernels
    :ivar image: where a build tree has the image to boot, which ``make <file name>`` builds
    :ivar image_release: reads the release (``uname -r``) from the first HEADER_SIZE bytes of an image that has the magic
        number; a ValueError completes the sentence "<image> ..."
    :ivar qemu: QEMU's program
    :ivar qemu_package: Debian's package that has it
    :ivar qemu_data: folders of ``usr/share`` with the firmware that it loads
    :ivar loader: the dynamic loader in an unpacked Debian package; the libraries are beside it
    :ivar machine: QEMU's ``-machine``; its first two serial ports are the console and the report port
    :ivar console: the kernel's name for the first serial port
    :ivar report_port: the device file of the second one, which takes the reports of the guest
    :ivar vendor_modules: the modules that KVM has for CPUs of one vendor each
    :ivar emulated_cpu: QEMU's ``-cpu`` when TCG emulates the CPU
    :ivar emulated_module: which of *vendor_modules* fits that CPU
    :ivar emulated_cpu_0_unsafe: whether TCG corrupts guests that run on the first CPU, so that tests stay off it
    :ivar emulated_command_line: more of the kernel's command line then
    :ivar emulator_oops: matches the line of the log by which the kernel reports what only a TCG fault can do
    :ivar added_parameters: parameters of KVM's modules that the suite sets where a module has them
    """

    name: str
    debian: str
    image: str
    image_release: Callable[[bytes], str]
    qemu: str
    qemu_package: str
    qemu_data: tuple[str, ...]
    loader: str
    machine: str
    console: str
    report_port: str
    vendor_modules: tuple[str, ...]
    emulated_cpu: str
    emulated_module: str
    emulated_cpu_0_unsafe: bool
    emulated_command_line: str
    emulator_oops: re.Pattern[str]
    added_parameters: Mapping[str, str]


def this_arch() -> Arch:
    """The architecture of this machine, and of the kernels that it boots.

    :raises CannotTest: it is not supported
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise CannotTest(f"no kernel can be booted on {machine} yet: only {', '.join(_ARCHITECTURES)} is supported")
    return _ARCHITECTURES[machine]


def _bzimage_release(head: bytes) -> str:
    """Read the release from a bzImage (Documentation/arch/x86/boot.rst: xloadflags and kernel_version)."""
    if len(head) < 0x260:
        raise ValueError("ends within its header: it is damaged")
    (flags,) = struct.unpack_from("<H", head, 0x236)
    if not flags & 1:  # XLF_KERNEL_64
        raise ValueError("is a 32-bit x86 kernel: only x86_64 kernels are tested")
    (pointer,) = struct.unpack_from("<H", head, 0x20E)
    version = head[pointer + 0x200 : pointer + 0x400].split(b"\0")[0].decode(errors="replace")
    if not (pointer and version):
        raise ValueError("does not say its release in its header: it is damaged")
    return version.split()[0]


_ARCHITECTURES = {
    "x86_64": Arch(
        name="x86_64",
        debian="amd64",
        image="arch/x86/boot/bzImage",
        image_release=_bzimage_release,
        qemu="qemu-system-x86_64",
        qemu_package="qemu-system-x86",
        qemu_data=("qemu", "seabios"),
        loader="usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
        machine="pc",
        console="ttyS0",
        report_port="/dev/ttyS1",
        vendor_modules=("kvm_intel", "kvm_amd"),
        # Without ERMS and FSRM the kernel clears and copies memory by words, not by string instructions, which TCG runs byte
        # by byte.
        emulated_cpu="max,-erms,-fsrm",
        emulated_module="kvm_amd",  # TCG emulates SVM with nested paging, and no VMX
        emulated_cpu_0_unsafe=True,  # keep_off_cpu_0() in guest_init.py has the cause
        # For the hugetlb backings; pages of 1 GiB can only be allocated at boot.
        emulated_command_line="hugepagesz=1G hugepages=1 hugepagesz=2M hugepages=40",
        # A CPU runs into the breakpoint that another one puts where it switches a static key, and the kernel no longer
        # recognises it as its own: with multi-threaded TCG, never on hardware (emulator_faults.py has the causes).
        emulator_oops=re.compile(r"Oops: int3\b|int3: 0000 \[#"),
        # Lets a guest have KVM emulate an instruction of its choice: 120 tests in selftests/x86_64/ need it.
        added_parameters={"kvm.force_emulation_prefix": "1"},
    ),
}
