# SPDX-License-Identifier: GPL-2.0-only
"""Debian's kernels: found in the archive, downloaded and unpacked, so that nothing is installed."""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from runner.apt import Suite, cause, require, unpack
from runner.errors import CannotTest
from runner.store import BUILD, fill, is_complete, locked, say, shown

_DEFAULT_FLAVOUR = "cloud-amd64"
# Where to look, in this order: stable has the kernel that is fetched most often, oldstable an older one, unstable the newest.
_SUITES = ("trixie", "bookworm", "sid")


def fetch(wanted: str, cache: Path) -> Path:
    """Where the newest Debian kernel that fits *wanted* is unpacked.

    :param wanted: a version, as many of its numbers as matter, and maybe a flavour (``6.12-rt-amd64``)

    It comes from *cache* when one that fits is there. Otherwise the first suite that has one is taken.

    :raises CannotTest: there is none, or it cannot be downloaded
    """
    if candidate := re.fullmatch(r"(\d+(?:\.\d+)*)[-~]?rc\d+.*", wanted):
        raise CannotTest(
            f"debian:{wanted}: release candidates are in none of {', '.join(_SUITES)}; name a release, such as"
            f" debian:{candidate[1]}, or give the tree of a kernel that you built"
        )
    match = re.fullmatch(r"(\d+(?:\.\d+)*)(?:-([a-z0-9-]+))?", wanted)
    if not match:
        raise CannotTest(f"debian:{wanted}: write it as debian:6.12 or debian:6.12-rt-amd64")
    version, flavour = match[1], match[2] or _DEFAULT_FLAVOUR
    fit = rf"{re.escape(version)}(?![0-9])[a-z0-9.+~]*(?:-\d+)?-{flavour}"
    name = re.compile(rf"(?:linux-(?:image|binary)-)?{fit}(?:-unsigned)?")
    if cached := _newest_cached(name, cache):
        return cached
    with locked(BUILD / "apt"):
        if cached := _newest_cached(name, cache):  # another run fetched it meanwhile
            return cached
        require(f"give the path of a kernel instead of debian:{wanted}")
        say(f"fetching a Debian kernel {version} ({flavour}) into {shown(cache)}, as none that fits is there")
        found = _search(name)
        if found is None:
            raise CannotTest(f"Debian has no kernel {version} of flavour {flavour} in {', '.join(_SUITES)}")
        suite, release = found
        return fill(cache / release, lambda folder: _download(suite, release, folder))


def _search(name: re.Pattern[str]) -> tuple[Suite, str] | None:
    """The first suite that has kernel packages that fit *name*, and the newest release among them."""
    for suite in map(Suite.updated, _SUITES):
        if packages := [package for package in suite.packages("linux-") if name.fullmatch(package)]:
            return suite, max((_release(package) for package in packages), key=version_key)
    return None


def unpack_files(packages: Sequence[Path], cache: Path) -> Path:
    """Where the package files are unpacked together; they are, if they were not before."""
    stamp = "".join(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in packages)
    target = cache / f"deb-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}"
    return fill(target, lambda folder: unpack(packages, folder))


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
        raise CannotTest(f"{package} is not a Debian package: {cause(done.stderr)}")
    return fields


def version_key(text: str) -> list[tuple[int, str]]:
    """A key that sorts names with numbers in them by the numbers' values."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", text)]


def _newest_cached(name: re.Pattern[str], cache: Path) -> Path | None:
    cached = [path for path in cache.glob("*") if is_complete(path) and name.fullmatch(path.name)]
    return max(cached, key=lambda path: version_key(path.name), default=None)


def _download(suite: Suite, release: str, folder: Path) -> None:
    """Unpack the packages of the kernel *release* into *folder*."""
    packages = suite.packages("linux-")
    # Where linux-binary exists, linux-image is an empty package that pulls it in; unsigned is what is there at least.
    kinds = (f"linux-binary-{release}", f"linux-image-{release}", f"linux-image-{release}-unsigned")
    names = [next(kind for kind in kinds if kind in packages)]
    names += [package for package in packages if package == f"linux-modules-{release}"]
    unpack(suite.download(names), folder)
    suite.forget_archives()


def _release(package: str) -> str:
    return re.sub(r"^linux-(image|binary)-|-unsigned$", "", package)
