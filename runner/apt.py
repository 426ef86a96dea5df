# SPDX-License-Identifier: GPL-2.0-only
"""Packages from the Debian archive, with an apt state of our own: nothing is installed, and the machine's apt is unchanged."""

import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from runner.apt_sources import mirror
from runner.errors import CannotTest
from runner.store import BUILD

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_CARRY = "without network, run make fetch in a clone that has it, and copy its build/kernels and build/qemu here"
_TOOLS = ("apt-get", "apt-cache", "dpkg-deb")


class Suite:
    """One suite of the Debian archive, such as ``trixie``; its main component.

    :raises CannotTest: this machine has no apt, no key or no mirror for it
    """

    def __init__(self, name: str) -> None:
        for tool in _TOOLS:
            if shutil.which(tool) is None:
                raise CannotTest(f"Debian packages are fetched with {tool}, which this machine lacks ({_CARRY})")
        if not _KEYRING.exists():
            raise CannotTest(f"{_KEYRING} is not there: apt install debian-archive-keyring")
        self.name = name
        self._folder = BUILD / "apt" / name
        for folder in ("lists/partial", "archives/partial"):
            (self._folder / folder).mkdir(parents=True, exist_ok=True)
        sources, status = self._folder / "sources.list", self._folder / "status"
        sources.write_text(f"deb [signed-by={_KEYRING}] {mirror()} {name} main\n")
        status.touch()
        # With an empty status nothing counts as installed: what a package needs is all of it in the archive.
        self._options = [
            *("-o", f"Dir::State={self._folder}", "-o", f"Dir::State::Lists={self._folder}/lists"),
            *("-o", f"Dir::State::status={status}", "-o", f"Dir::Cache={self._folder}"),
            *("-o", f"Dir::Etc::SourceList={sources}", "-o", "Dir::Etc::SourceParts=/dev/null"),
            *("-o", "Dir::Etc::Preferences=/dev/null", "-o", "Dir::Etc::PreferencesParts=/dev/null"),
            *("-o", "Acquire::Languages=none", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"),
            *("-o", "APT::Architecture=amd64", "-o", "APT::Architectures=amd64", "-o", "Debug::NoLocking=1"),
        ]

    @classmethod
    @cache
    def updated(cls, name: str) -> "Suite":
        """The suite *name* with its present package lists, which are fetched once.

        :raises CannotTest: the mirror cannot be reached
        """
        suite = cls(name)
        suite._update()
        return suite

    def packages(self, prefix: str) -> list[str]:
        """The names of the suite's packages that begin with *prefix*."""
        return self._run("apt-cache", "pkgnames", prefix).split()

    def download(self, names: Sequence[str]) -> list[Path]:
        """Download the packages *names*.

        :raises CannotTest: one is not there, or the download fails
        """
        folder = self._folder / "download"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._run("apt-get", "-qq", "download", *names, cwd=folder)
        return sorted(folder.glob("*.deb"))

    def download_with_dependencies(self, name: str) -> list[Path]:
        """Download the package *name* and all that it depends on, down to the C library; nothing that is recommended.

        :raises CannotTest: one is not there, or the download fails
        """
        self._run("apt-get", "clean")
        options = ("-qq", "-y", "--no-install-recommends", "--download-only")
        self._run("apt-get", *options, "install", name)
        return sorted((self._folder / "archives").glob("*.deb"))

    def forget_archives(self) -> None:
        """Remove what was downloaded, once it is unpacked."""
        self._run("apt-get", "clean")
        shutil.rmtree(self._folder / "download", ignore_errors=True)

    def _update(self) -> None:
        # Error-Mode: without it apt takes a mirror that cannot be reached for a warning.
        self._run("apt-get", "-qq", "-o", "APT::Update::Error-Mode=any", "update")

    def _run(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        done = subprocess.run([tool, *self._options, *arguments], capture_output=True, text=True, check=False, cwd=cwd)
        if done.returncode:
            raise CannotTest(f"{tool} {arguments[-1]} ({self.name}) failed: {last_line(done.stderr)} ({_CARRY})")
        return done.stdout


def unpack(packages: Sequence[Path], folder: Path) -> None:
    """Unpack package files into *folder*.

    :raises CannotTest: one is damaged, or there is no space
    """
    for package in packages:
        command = ["dpkg-deb", "-x", str(package), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotTest(f"{package} cannot be unpacked: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """The last line of what a tool said."""
    return (text.strip().splitlines() or ["no message"])[-1]
