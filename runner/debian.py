# SPDX-License-Identifier: GPL-2.0-only
"""Debian's kernels: finding them in the archive, downloading and unpacking them, without installing anything."""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from runner.apt import Suite, cause, require, unpack
from runner.arch import this_arch
from runner.errors import CannotTest
from runner.store import BUILD, fill, locked, newest, say, shown, version_key

# In the order of the search: stable has the kernel that is fetched most often, oldstable an older one, unstable the newest.
_SUITES = ("trixie", "bookworm", "sid")


def fetch(wanted: str, cache: Path) -> Path:
    """The folder of the newest Debian kernel that matches *wanted*: in *cache*, or else in the first suite that has one.

    :param wanted: the start of a version, with or without a flavour (``6.12-rt-amd64``)
    """
    architecture = this_arch().debian
    if candidate := re.fullmatch(r"(\d+(?:\.\d+)*)[-~]?rc\d+.*", wanted):
        raise CannotTest(
            f"debian:{wanted}: release candidates are in none of {', '.join(_SUITES)}; name a release, such as"
            f" debian:{candidate[1]}, or give the tree of a kernel that you built"
        )
    match = re.fullmatch(r"(\d+(?:\.\d+)*)(?:-([a-z0-9-]+))?", wanted)
    if not match:
        raise CannotTest(f"debian:{wanted}: write it as debian:6.12 or debian:6.12-rt-{architecture}")
    version, flavour = match[1], match[2] or f"cloud-{architecture}"
    pattern = rf"{re.escape(version)}(?![0-9])[a-z0-9.+~]*(?:-\d+)?-{flavour}"
    name = re.compile(rf"(?:linux-(?:image|binary)-)?{pattern}(?:-unsigned)?")
    if cached := newest(cache, name):
        return cached
    with locked(BUILD / "apt"):
        if cached := newest(cache, name):  # another run fetched it meanwhile
            return cached
        require(f"give the path of a kernel instead of debian:{wanted}")
        say(f"fetching a Debian kernel {version} ({flavour}) into {shown(cache)}, as no matching one is there")
        found = _search(name)
        if found is None:
            raise CannotTest(f"Debian has no kernel {version} of flavour {flavour} in {', '.join(_SUITES)}")
        suite, release = found
        return fill(cache / release, lambda folder: _download(suite, release, folder))


def _search(name: re.Pattern[str]) -> tuple[Suite, str] | None:
    """The first suite with kernel packages that match *name*, and the newest release among them."""
    for suite in map(Suite.updated, _SUITES):
        if packages := [package for package in suite.packages("linux-") if name.fullmatch(package)]:
            return suite, max((_release(package) for package in packages), key=version_key)
    return None


def unpack_files(packages: Sequence[Path], cache: Path) -> Path:
    """The folder in *cache* with the content of all *packages*, which are unpacked once."""
    stamp = "".join(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in packages)
    target = cache / f"deb-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}"
    return fill(target, lambda folder: unpack(packages, folder))


def name_of_package(package: Path) -> tuple[str, str]:
    """The name and the architecture of a package file."""
    if shutil.which("dpkg-deb") is None:
        raise CannotTest(
            f"{package} is unpacked with dpkg-deb, which this machine lacks: unpack it and give the folder"
        )
    command = ["dpkg-deb", "--show", "--showformat=${Package} ${Architecture}", str(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotTest(f"{package} is not a Debian package: {cause(done.stderr)}")
    name, architecture = done.stdout.split(" ")
    return name, architecture


def _download(suite: Suite, release: str, folder: Path) -> None:
    """Unpack the packages of the kernel *release* into *folder*."""
    packages = suite.packages("linux-")
    # If there is a linux-binary, linux-image only depends on it. Not all kernels are signed.
    kinds = (f"linux-binary-{release}", f"linux-image-{release}", f"linux-image-{release}-unsigned")
    names = [next(kind for kind in kinds if kind in packages)]
    names += [package for package in packages if package == f"linux-modules-{release}"]
    unpack(suite.download(names), folder)
    suite.forget_archives()


def _release(package: str) -> str:
    return re.sub(r"^linux-(image|binary)-|-unsigned$", "", package)
