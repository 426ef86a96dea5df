# SPDX-License-Identifier: GPL-2.0-only
"""The source of a Debian kernel, and its KVM modules built from it, as it is and with a patch."""

import lzma
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from runner.apt import Suite, require, unpack
from runner.errors import CannotTest
from runner.kernel import Kernel
from runner.store import BUILD, fill, locked
from runner.waiting import waiting

_SUITE = "sid"
# Without pahole the configuration loses BTF, and the kernel refuses modules whose struct module is of another size.
_TOOLS = ("gcc", "make", "flex", "bison", "bc", "pahole", "patch", "tar", "xz")
_INSTALL = "apt install gcc make flex bison bc dwarves patch xz-utils libelf-dev libssl-dev"
_KVM = "arch/x86/kvm"
# Only the modules are built: without the rest modpost cannot resolve their symbols. The kernel does when it loads them.
_MAKE = ("make", f"-j{os.cpu_count() or 1}", "KBUILD_MODPOST_WARN=1", "KCFLAGS=-g0")


def fetch_source(series: str) -> Path:
    """A folder with the unpacked packages that have the source and the configuration of Debian's kernel *series*.

    :raises CannotTest: they cannot be fetched, or a program to build with is missing
    """
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        raise CannotTest(f"a kernel is built with {', '.join(missing)}, which this machine lacks ({_INSTALL})")

    def download(folder: Path) -> None:
        require("run this on another machine")
        with locked(BUILD / "apt"):
            suite = Suite.updated(_SUITE)
            unpack(suite.download([f"linux-source-{series}", f"linux-config-{series}"]), folder)
            suite.forget_archives()

    return fill(BUILD / "source" / series, download)


class SourceTree:
    """A kernel's source in *folder*, configured so that modules built from it can be loaded into *kernel*.

    :param packages: what :func:`fetch_source` returns
    :param deadline: in seconds of the monotonic clock; what runs longer is stopped
    :raises CannotTest: the source is of another version than the kernel, or does not build
    """

    def __init__(self, packages: Path, kernel: Kernel, folder: Path, deadline: float) -> None:
        self._folder, self._deadline = folder, deadline
        (archive,) = packages.glob("usr/src/linux-source-*.tar.xz")
        with waiting("unpacking the kernel's source"):
            self._run("tar", "-xf", str(archive), "--strip-components=1")
        version = ".".join(
            re.findall(r"^(?:VERSION|PATCHLEVEL|SUBLEVEL) = (\d+)$", self._text("Makefile"), re.MULTILINE)
        )
        if not re.match(rf"{re.escape(version)}(?!\d)", kernel.release):
            raise CannotTest(
                f"the source is of {version}, the kernel is {kernel.release}: remove the older one, in build/source or kernels"
            )
        flavour = kernel.release.partition("-")[2]
        (config,) = packages.glob(f"usr/src/linux-config-*/config.*_none_{flavour}.xz")
        own_name = f'\nCONFIG_LOCALVERSION="{kernel.release.removeprefix(version)}"\n'
        (folder / ".config").write_text(lzma.decompress(config.read_bytes()).decode() + own_name)
        with waiting("configuring the kernel"):
            self._run("make", "olddefconfig")
            self._run(*_MAKE, "modules_prepare")
            self._run(*_MAKE, "M=virt/lib", "modules")  # whose symbols KVM's modules depend on

    def apply(self, patch: Path) -> None:
        """Apply *patch*, as ``git format-patch`` writes it."""
        self._run("patch", "-p1", "--no-backup-if-mismatch", "-i", str(patch))

    def build_kvm(self) -> list[Path]:
        """Build KVM's modules."""
        symbols = f"KBUILD_EXTRA_SYMBOLS={self._folder}/virt/lib/Module.symvers"
        with waiting("building KVM's modules"):
            self._run(*_MAKE, f"M={_KVM}", symbols, "modules")
        return sorted((self._folder / _KVM).glob("*.ko"))

    def _text(self, name: str) -> str:
        return (self._folder / name).read_text()

    def _run(self, *command: str) -> None:
        left = max(self._deadline - time.monotonic(), 0)
        try:
            done = subprocess.run(
                command, cwd=self._folder, capture_output=True, text=True, errors="replace", check=False, timeout=left
            )
        except subprocess.TimeoutExpired:
            raise CannotTest(f"{' '.join(command[:2])}: the time is over") from None
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            first = next(
                (line for line in lines if re.search(r"error|FAILED|not found", line)), lines[-1] if lines else ""
            )
            raise CannotTest(f"{' '.join(command)} failed: {first} ({_INSTALL})")
