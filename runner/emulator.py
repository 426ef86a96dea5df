# SPDX-License-Identifier: GPL-2.0-only
"""Which QEMU runs the machines: one that is named, this host's if its emulation is known to be sound, or Debian's."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from runner.apt import Suite, cause, require, unpack
from runner.debian import version_key
from runner.emulator_faults import faults_of
from runner.errors import CannotTest
from runner.store import BUILD, fill, is_complete, locked, say, shown

PROGRAM = "qemu-system-x86_64"
_CACHE = BUILD / "qemu"
_SUITE = "trixie"  # its QEMU, 10.0, is the newest one that the whole suite was seen to pass in
_PACKAGE = "qemu-system-x86"
_INSTEAD = f"install {PROGRAM}, or name one with --qemu PATH"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"


@dataclass(frozen=True)
class Emulator:
    """A QEMU that runs here.

    :ivar command: how it is started
    :ivar origin: where it comes from
    """

    command: tuple[str, ...]
    version: str
    origin: str


def find_emulator(named: str | None, emulates: bool) -> Emulator:
    """The QEMU to use.

    :param named: the path of one; None to choose
    :param emulates: whether it is to emulate the CPU: what its emulation does wrong does not matter where it does not
    :raises CannotTest: there is none, and none can be fetched
    """
    if named is not None:
        path = shutil.which(named)
        if path is None:
            raise CannotTest(f"--qemu {named}: there is no such program")
        return _installed(path, f"--qemu {named}")
    path = shutil.which(PROGRAM)
    if path is None:
        return debian_emulator(f"this host has no {PROGRAM}")
    try:
        host = _installed(path, "this host's")
    except CannotTest as error:
        say(f"{error}; Debian's is used instead")
        return debian_emulator(f"this host's {PROGRAM} does not run")
    fault = next((fault for fault in faults_of(host.version) if fault.avoid), None)
    if fault is None or not emulates:
        return host
    why = f"this host's QEMU {host.version} {fault.does}"
    try:
        return debian_emulator(why)
    except CannotTest as error:
        say(f"{why}; it is used all the same, as no other can be had: {error}")
        return host


def _installed(path: str, origin: str) -> Emulator:
    return Emulator((path,), _version((path,)), origin)


def debian_emulator(why: str) -> Emulator:
    """Debian's QEMU, from the cache; it is fetched if it is not there.

    :param why: the reason that is shown for it
    :raises CannotTest: it cannot be fetched
    """
    if re.search("[:;]", str(_CACHE)):  # both part the folders of the loader's option --library-path (ld.so(8))
        raise CannotTest(
            f"Debian's QEMU does not run from {_CACHE}: move the suite to a path without : and ;, or {_INSTEAD}"
        )
    folder = _newest_cached()
    if folder is None:
        with locked(BUILD / "apt"):
            folder = _newest_cached() or _fetch(why)
    root = folder / "root"
    # By its own C library and loader: the host's may be older, or another one.
    loader = root / _LIBRARIES / "ld-linux-x86-64.so.2"
    libraries = [
        root / _LIBRARIES,
        *(path for path in (root / _LIBRARIES).iterdir() if path.is_dir() and any(path.glob("*.so.*"))),
    ]
    data = [word for name in ("qemu", "seabios") for word in ("-L", str(root / "usr/share" / name))]
    command = (
        *(str(loader), "--library-path", ":".join(map(str, libraries))),
        *(str(root / "usr/bin" / PROGRAM), *data),
    )
    return Emulator(command, _version(command), str(shown(folder)))


def _newest_cached() -> Path | None:
    cached = [path for path in _CACHE.glob("*") if is_complete(path)]
    return max(cached, key=lambda path: version_key(path.name), default=None)


def _fetch(why: str) -> Path:
    require(_INSTEAD)
    say(f"fetching QEMU, about 40 MB of Debian packages, into {shown(_CACHE)}, as {why}")
    suite = Suite.updated(_SUITE)
    packages = suite.download_with_dependencies(_PACKAGE)
    package = next((path for path in packages if path.name.startswith(f"{_PACKAGE}_")), None)
    if package is None:
        raise CannotTest(f"apt-get install {_PACKAGE} ({_SUITE}) downloaded other packages only: {_INSTEAD}")
    version = re.sub(r"^\d+%3a|\+.*", "", package.name.split("_")[1])

    def write(folder: Path) -> None:
        unpack(packages, folder / "root")
        suite.forget_archives()

    return fill(_CACHE / version, write)


def _version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:  # such as one that was built for another machine
        raise CannotTest(f"{command[0]} is not a QEMU that runs here: {error.strerror}") from None
    match = re.search(r"QEMU emulator version v?(\d\S*)", done.stdout)
    if match is None:
        raise CannotTest(f"{command[0]} is not a QEMU that runs here: {cause(done.stderr or done.stdout)}")
    return match[1]
