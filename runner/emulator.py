# SPDX-License-Identifier: GPL-2.0-only
"""The QEMU to use: the named one, this host's if its emulation has no known fault to avoid, or Debian's."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from runner.apt import Suite, cause, require, unpack
from runner.arch import this_arch
from runner.emulator_faults import faults_of
from runner.errors import CannotTest
from runner.store import BUILD, fill, locked, newest, say, shown

_CACHE = BUILD / "qemu"
_SUITE = "trixie"  # QEMU 10.0, the newest version in which the whole suite was seen to pass


@dataclass(frozen=True)
class Emulator:
    """A QEMU that runs on this host."""

    command: tuple[str, ...]
    version: str
    origin: str


def find_emulator(named: str | None, emulates: bool) -> Emulator:
    """Choose a QEMU.

    :param named: the path of one; None to choose
    :param emulates: whether it will emulate the CPU; if not, the faults of its emulation do not matter
    """
    if named is not None:
        path = shutil.which(named)
        if path is None:
            raise CannotTest(f"--qemu {named}: there is no such program")
        return _installed(path, f"--qemu {named}")
    program = this_arch().qemu
    path = shutil.which(program)
    if path is None:
        return debian_emulator(f"this host has no {program}")
    try:
        host = _installed(path, "this host's")
    except CannotTest as error:
        say(f"{error}; Debian's is used instead")
        return debian_emulator(f"this host's {program} does not run")
    fault = next((fault for fault in faults_of(host.version) if fault.avoid), None)
    if fault is None or not emulates:
        return host
    why = f"this host's QEMU {host.version} {fault.does}"
    try:
        return debian_emulator(why)
    except CannotTest as error:
        say(f"{why}; it is used anyway, as there is no other: {error}")
        return host


def _installed(path: str, origin: str) -> Emulator:
    return Emulator((path,), _version((path,)), origin)


def debian_emulator(why: str) -> Emulator:
    """Debian's QEMU, which is fetched once."""
    if re.search("[:;]", str(_CACHE)):  # both separate the folders of --library-path (ld.so(8))
        raise CannotTest(
            f"Debian's QEMU does not run from {_CACHE}: move the suite to a path without : and ;, or {_instead()}"
        )
    any_version = re.compile(r"\d.*")
    folder = newest(_CACHE, any_version)
    if folder is None:
        with locked(BUILD / "apt"):
            folder = newest(_CACHE, any_version) or _fetch(why)
    root, arch = folder / "root", this_arch()
    # With its own loader and C library, as the host's may be older, or another one.
    loader = root / arch.loader
    libraries = [loader.parent, *sorted({library.parent for library in loader.parent.glob("*/*.so.*")})]
    data = [word for name in arch.qemu_data for word in ("-L", str(root / "usr/share" / name))]
    paths = ":".join(map(str, libraries))
    command = (str(loader), "--library-path", paths, str(root / "usr/bin" / arch.qemu), *data)
    return Emulator(command, _version(command), str(shown(folder)))


def _fetch(why: str) -> Path:
    require(_instead())
    say(f"fetching QEMU, about 40 MB of Debian packages, into {shown(_CACHE)}, as {why}")
    suite = Suite.updated(_SUITE)
    name = this_arch().qemu_package
    packages = suite.download_with_dependencies(name)
    package = next((path for path in packages if path.name.startswith(f"{name}_")), None)
    if package is None:
        raise CannotTest(f"apt-get install {name} ({_SUITE}) downloaded other packages only: {_instead()}")
    version = re.sub(r"^\d+%3a|\+.*", "", package.name.split("_")[1])

    def write(folder: Path) -> None:
        unpack(packages, folder / "root")
        suite.forget_archives()

    return fill(_CACHE / version, write)


def _instead() -> str:
    """What a user can do where no QEMU can be fetched."""
    return f"install {this_arch().qemu}, or name one with --qemu PATH"


def _version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:  # such as a program for another architecture
        raise CannotTest(f"{command[0]} is not a QEMU that runs here: {error.strerror}") from None
    match = re.search(r"QEMU emulator version v?(\d\S*)", done.stdout)
    if match is None:
        raise CannotTest(f"{command[0]} is not a QEMU that runs here: {cause(done.stderr or done.stdout)}")
    return match[1]
