# SPDX-License-Identifier: GPL-2.0-only
"""Debian's kernels: found, downloaded and unpacked with an apt state of our own, so that nothing is installed or changed."""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from runner.errors import CannotTest

_DEFAULT_FLAVOUR = "cloud-amd64"
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_COMPLETE = ".complete"  # written last: a folder without it is left over from a download that was cut short


def fetch(wanted: str, cache: Path) -> Path:
    """Where the newest Debian kernel that fits *wanted* is unpacked.

    :param wanted: a version, as many of its numbers as matter, and maybe a flavour (``6.12-rt-amd64``)

    It comes from *cache* when one that fits is there. Otherwise the suites are searched that the machine has set up, and
    then Debian's unstable.

    :raises CannotTest: there is none, or it cannot be downloaded
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)*)(?:-([a-z0-9-]+))?", wanted)
    if not match:
        raise CannotTest(f"debian:{wanted}: write it as debian:6.12 or debian:6.12-rt-amd64")
    version, flavour = match[1], match[2] or _DEFAULT_FLAVOUR
    release = rf"{re.escape(version)}(?![0-9])[a-z0-9.+~]*(?:-\d+)?-{flavour}"
    name = re.compile(rf"(?:linux-(?:image|binary)-)?{release}(?:-unsigned)?")
    cached = [path for path in cache.glob("*") if is_unpacked(path) and name.fullmatch(path.name)]
    if cached:
        return max(cached, key=lambda path: version_key(path.name))
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise CannotTest(
                f"debian:{wanted} is downloaded with {tool}, which this machine lacks: give a path instead"
            )
    for state in (_AptState(cache / "apt", None), _AptState(cache / "apt-sid", "sid")):
        _say(f"looking for a Debian kernel {version} ({flavour}) in {state.what}")
        state.update()
        packages = [package for package in state.packages() if name.fullmatch(package)]
        if packages:
            release = max((_release(package) for package in packages), key=version_key)
            # Where linux-binary exists, linux-image is an empty package that pulls it in; unsigned is what is there at least.
            kinds = (f"linux-binary-{release}", f"linux-image-{release}", f"linux-image-{release}-unsigned")
            names = [next(kind for kind in kinds if kind in packages)]
            names += [package for package in state.all_packages() if package == f"linux-modules-{release}"]
            _say(f"downloading {' and '.join(names)}")
            return _unpack(state.download(names), cache / release)
    raise CannotTest(
        f"Debian has no kernel {version} of flavour {flavour}, neither in the suites set up here nor in sid"
    )


def unpack(packages: Sequence[Path], cache: Path) -> Path:
    """Where the package files are unpacked together; they are, if they were not before."""
    stamp = "".join(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in packages)
    target = cache / f"deb-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}"
    return target if is_unpacked(target) else _unpack(packages, target)


def is_unpacked(folder: Path) -> bool:
    """Whether *folder* is a package that was unpacked to its end."""
    return (folder / _COMPLETE).exists()


def package_fields(package: Path) -> dict[str, str]:
    """The fields of a package file's description.

    :raises CannotTest: it is no Debian package
    """
    if shutil.which("dpkg-deb") is None:
        raise CannotTest(
            f"{package} is unpacked with dpkg-deb, which this machine lacks: unpack it and give the folder"
        )
    done = subprocess.run(["dpkg-deb", "-f", str(package)], capture_output=True, text=True, check=False)
    fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", done.stdout, re.MULTILINE))
    if done.returncode or "Package" not in fields:
        raise CannotTest(f"{package} is not a Debian package: {done.stderr.strip() or 'it has no description'}")
    return fields


def version_key(text: str) -> list[tuple[int, str]]:
    """A key that sorts names with numbers in them by the numbers' values."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", text)]


def _unpack(packages: Sequence[Path], target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
        partial = Path(folder) / "root"
        partial.mkdir()
        for package in packages:
            command = ["dpkg-deb", "-x", str(package), str(partial)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CannotTest(f"{package} cannot be unpacked: {_last_line(done.stderr)}")
        (partial / _COMPLETE).touch()
        if not is_unpacked(target):  # by another run meanwhile
            partial.rename(target)
    return target


class _AptState:
    """apt with package lists of its own.

    :param suite: the one suite to look in, from the Debian mirror that the machine uses; None for the machine's own suites
    """

    def __init__(self, folder: Path, suite: str | None) -> None:
        self.what = "the suites set up here" if suite is None else suite
        self._folder = folder.absolute()
        for name in ("lists/partial", "archives/partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        sources = folder / "sources.list"
        sources.write_text("".join(f"deb [signed-by={_KEYRING}] {uri} {name} main\n" for uri, name in _suites(suite)))
        self._options = [
            *("-o", f"Dir::State::Lists={self._folder}/lists", "-o", f"Dir::Cache={self._folder}"),
            *("-o", f"Dir::Etc::SourceList={sources.absolute()}", "-o", "Dir::Etc::SourceParts=/dev/null"),
            *("-o", "Acquire::Languages=none", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"),
        ]

    def update(self) -> None:
        """Fetch the package lists."""
        # Error-Mode: without it apt takes a mirror that cannot be reached for a warning.
        self._run("apt-get", "-qq", "-o", "APT::Update::Error-Mode=any", "update")

    def all_packages(self) -> list[str]:
        """The names of all packages that the suites have."""
        # What dpkg has installed is not asked for: a kernel that the machine has is not one that the suites have.
        return self._run("apt-cache", "-o", "Dir::State::Status=/dev/null", "pkgnames", "linux-").split()

    def packages(self) -> list[str]:
        """The names of the kernel packages among them, without debug symbols."""
        return [name for name in self.all_packages() if name.startswith(("linux-image-", "linux-binary-"))]

    def download(self, names: Sequence[str]) -> list[Path]:
        """Download packages."""
        folder = self._folder / "download"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._run("apt-get", "-qq", "download", *names, cwd=folder)
        return sorted(folder.glob("*.deb"))

    def _run(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        done = subprocess.run([tool, *self._options, *arguments], capture_output=True, text=True, check=False, cwd=cwd)
        if done.returncode:
            raise CannotTest(f"{tool} {arguments[-1]} failed: {_last_line(done.stderr)}")
        return done.stdout


def _suites(suite: str | None) -> list[tuple[str, str]]:
    """(mirror, suite) of the machine's Debian sources; with *suite*, that one of the same mirror."""
    command = ["apt-get", "indextargets", "--format", "$(CREATED_BY) $(REPO_URI) $(RELEASE) $(COMPONENT)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    targets = [line.split() for line in done.stdout.splitlines()]
    found = dict.fromkeys(
        (target[1], target[2])
        for target in targets
        if len(target) == 4 and target[0] == "Packages" and target[3] == "main"
        # Mirrors carry the archive under these names (debian.org/mirror/ftpmirror).
        and re.search(r"/debian(-security)?/?$", target[1])
    )  # fmt: skip
    if not found:
        raise CannotTest("apt has no Debian archive among its sources here: give the path of a kernel instead")
    if suite is None:
        return list(found)
    return [(next(uri for uri, _ in found if "security" not in uri.rstrip("/").rpartition("/")[2]), suite)]


def _release(package: str) -> str:
    return re.sub(r"^linux-(image|binary)-|-unsigned$", "", package)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
