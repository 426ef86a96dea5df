# SPDX-License-Identifier: GPL-2.0-only
"""Packages from the Debian archive, by apt with a state of its own: nothing is installed, and the host's apt is unchanged."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from kvm_util.wording import counted
from runner.apt_sources import mirror
from runner.arch import this_arch
from runner.errors import CannotTest
from runner.store import BUILD, say
from runner.waiting import bytes_in, duration, waiting

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_TOOLS = ("apt-get", "apt-cache", "dpkg-deb")
_COPY_FETCHED = "run make fetch in a clone that has it, and copy its build/kernels and build/qemu here"
# Read after the host's configuration: it clears hooks and the preferred release, and keeps how to reach the network.
_CLEARED = "".join(f"#clear {name};\n" for name in ("APT::Update", "APT::Default-Release", "AptCli"))
# Which line of the output of apt-get and dpkg-deb names the cause, the most specific first; the last one rarely does.
_NO_NETWORK = "Failed to fetch|does not have a Release file"
_CAUSES = ("No space left|enough free space", _NO_NETWORK, "^E: ", "error:")


def require(instead: str) -> None:
    """Check that this host can fetch packages."""
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            raise CannotTest(
                f"Debian packages are fetched with {tool}, which this machine lacks: {instead}, or {_COPY_FETCHED}"
            )
    if not _KEYRING.exists():
        raise CannotTest(f"{_KEYRING} is not there: apt install debian-archive-keyring, or {instead}")


class Suite:
    """The main component of one suite of the Debian archive, such as ``trixie``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._folder = BUILD / "apt" / name
        for folder in ("lists/partial", "archives/partial"):
            (self._folder / folder).mkdir(parents=True, exist_ok=True)
        sources, status, config = (self._folder / file for file in ("sources.list", "status", "apt.conf"))
        # With file: apt uses packages where they are, with copy: it puts them with the other archives (sources.list(5)).
        uri = re.sub("^file:", "copy:", mirror())
        sources.write_text(f"deb [signed-by={_KEYRING}] {uri} {name} main\n")
        status.touch()
        config.write_text(_CLEARED)
        debian = this_arch().debian
        # With an empty status nothing counts as installed, so that all dependencies are downloaded.
        self._options = [
            *("-c", str(config), "-o", f"Dir::State={self._folder}", "-o", f"Dir::State::Lists={self._folder}/lists"),
            *("-o", f"Dir::State::status={status}", "-o", f"Dir::Cache={self._folder}"),
            *("-o", f"Dir::Cache::archives={self._folder}/archives", "-o", "Dir::Cache::pkgcache=pkgcache.bin"),
            *("-o", "Dir::Cache::srcpkgcache=srcpkgcache.bin"),
            *("-o", f"Dir::Etc::SourceList={sources}", "-o", "Dir::Etc::SourceParts=/dev/null"),
            *("-o", "Dir::Etc::Preferences=/dev/null", "-o", "Dir::Etc::PreferencesParts=/dev/null"),
            *("-o", "Acquire::Languages=none", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"),
            *("-o", f"APT::Architecture={debian}", "-o", f"APT::Architectures={debian}", "-o", "Debug::NoLocking=1"),
        ]

    @classmethod
    @cache
    def updated(cls, name: str) -> "Suite":
        """The suite *name* with its current package lists, which are fetched once."""
        suite = cls(name)
        suite._update()
        return suite

    def packages(self, prefix: str) -> list[str]:
        """The names of the suite's packages that begin with *prefix*."""
        return self._run("apt-cache", "pkgnames", prefix).split()

    def download(self, names: Sequence[str]) -> list[Path]:
        """Download the packages *names*."""
        folder = self._folder / "download"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._fetch(folder, "download", *names, cwd=folder)
        return sorted(folder.glob("*.deb"))

    def download_with_dependencies(self, name: str) -> list[Path]:
        """Download the package *name* and its dependencies, down to the C library, without recommended packages."""
        self._run("apt-get", "clean")
        archives = self._folder / "archives"
        self._fetch(archives, "-y", "--no-install-recommends", "--download-only", "install", name)
        return sorted(archives.glob("*.deb"))

    def forget_archives(self) -> None:
        """Remove the downloaded packages."""
        self._run("apt-get", "clean")
        shutil.rmtree(self._folder / "download", ignore_errors=True)

    def _update(self) -> None:
        lists = self._folder / "lists"
        with waiting(
            f"reading Debian's package lists of {self.name}", lambda: (None, f"{_megabytes(bytes_in(lists))} MB")
        ):
            # Without Error-Mode=any apt only warns about a mirror that it cannot reach.
            self._run("apt-get", "-qq", "-o", "APT::Update::Error-Mode=any", "update")

    def _fetch(self, folder: Path, *arguments: str, cwd: Path | None = None) -> None:
        """Run apt-get with *arguments* that make it download packages into *folder*, and show the progress."""
        uris = self._run("apt-get", "-qq", "--print-uris", *arguments, cwd=cwd)
        sizes = [int(size) for size in re.findall(r"^'.*?' \S+ (\d+)", uris, re.MULTILINE)]
        total, started = sum(sizes), time.monotonic()
        packages = counted(len(sizes), "package")
        what, size = f"downloading {packages}", f"{_megabytes(total)} MB"

        def figure() -> tuple[float, str]:
            done = bytes_in(folder)
            return done / max(total, 1), f"{_megabytes(done)} of {size}"

        with waiting(what, figure, f"{what}, {size}"):
            self._run("apt-get", "-qq", *arguments, cwd=cwd)
        say(f"downloaded {packages}, {size}, in {duration(max(time.monotonic() - started, 1))}")

    def _run(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        command = [tool, *self._options, *arguments]
        english = os.environ | {"LC_ALL": "C.UTF-8"}  # for cause()
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=english)
        if done.returncode:
            why = cause(done.stderr)
            offline = re.search(_NO_NETWORK, why) and not re.search(_CAUSES[0], why)
            hint = f" (without network, {_COPY_FETCHED})" if offline else ""
            raise CannotTest(f"{tool} {arguments[-1]} ({self.name}) failed: {why}{hint}")
        return done.stdout


def unpack(packages: Sequence[Path], folder: Path) -> None:
    """Unpack package files into *folder*."""
    unpacked = 0
    with waiting("unpacking packages", lambda: (unpacked / len(packages), f"{unpacked} of {len(packages)}")):
        for package in packages:
            command = ["dpkg-deb", "-x", str(package), str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CannotTest(f"{package} cannot be unpacked: {cause(done.stderr)}")
            unpacked += 1


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


def cause(text: str) -> str:
    """The line in the output of apt-get or dpkg-deb that names the cause of its failure."""
    lines = text.strip().splitlines() or ["no message"]
    return next((line for pattern in _CAUSES for line in lines if re.search(pattern, line)), lines[-1])
