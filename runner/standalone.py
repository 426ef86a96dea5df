# SPDX-License-Identifier: GPL-2.0-only
"""standalone.py FILE: makes one executable file of the suite, its packages and its guest programs (`make standalone`).

It is an archive that Python runs (zipapp). The same tree and packages make the same bytes.
"""

import os
import stat
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.metadata import Distribution
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from kvm_util.guest_program import assemble_all
from runner import ROOT
from runner.initramfs import SUITE_FILES, SUITE_FOLDERS
from runner.packages import needed_packages
from runner.standalone_start import NATIVE
from runner.store import BUILD

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
_PLATFORM = "manylinux2014_x86_64"
_INTERPRETER = b"#!/usr/bin/env python3\n"
_TIME = (1980, 1, 1, 0, 0, 0)  # the first that an archive can have
# What pip writes about the installation
_NOT_PACKED = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
_OWN_TESTS = "selftests/unit/"


def main(target: Path, pythons: Sequence[str] = PYTHONS) -> None:
    """Write the file *target*, for these Pythons, as far as pip finds packages for them, and for this one."""
    assemble_all()
    files = {"__main__.py": (ROOT / "runner/standalone_start.py").read_bytes()} | _packages(pythons) | _suite()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent) as file:
        file.write(_INTERPRETER)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, data in files.items():
                entry = zipfile.ZipInfo(name, _TIME)
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, (stat.S_IFREG | 0o644) << 16
                archive.writestr(entry, data)
        file.flush()
        partial = target.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        os.link(file.name, partial)
    partial.chmod(0o755)
    partial.replace(target)
    print(f"{os.path.relpath(target)}: {target.stat().st_size / 2**20:.1f} MiB, for {', '.join(_tags(files))}")


def _suite() -> dict[str, bytes]:
    """The suite's own files; the guest programs last, so that they are newer than their sources when unpacked."""
    folders = [path for folder in SUITE_FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    paths = [*(ROOT / name for name in (*SUITE_FILES, "LICENSE")), *folders]
    names = {str(path.relative_to(ROOT)): path for path in paths if path.is_file() and path.suffix != ".pyc"}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(_OWN_TESTS)}


def _packages(pythons: Sequence[str]) -> dict[str, bytes]:
    """The files of the packages, with those for one Python only in a folder of that Python's."""
    files: dict[str, bytes] = {}
    for package in sorted(needed_packages(), key=lambda package: package.name):
        parts = {str(file): Path(str(file.locate())) for file in package.files or () if ".." not in file.parts}
        packed = {name: path for name, path in sorted(parts.items()) if _is_packed(name)}
        files |= {f"site/{name}": path.read_bytes() for name, path in packed.items() if not name.endswith(".so")}
        native = {name: path.read_bytes() for name, path in packed.items() if name.endswith(".so")}
        if native:
            files |= {f"{NATIVE}/{sys.implementation.cache_tag}/{name}": data for name, data in native.items()}
            files |= _of_other_pythons(package, pythons)
    return files


def _is_packed(name: str) -> bool:
    return not name.endswith(".pyc") and PurePosixPath(name).name not in _NOT_PACKED


def _of_other_pythons(package: Distribution, pythons: Sequence[str]) -> dict[str, bytes]:
    """What *package* has for one of the other Pythons only, from its wheels."""
    files: dict[str, bytes] = {}
    for version in pythons:
        tag = f"cpython-{version.replace('.', '')}"
        if tag == sys.implementation.cache_tag:
            continue
        with tempfile.TemporaryDirectory() as folder:
            pip = ["pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
            pip += [f"--python-version={version}", f"--platform={_PLATFORM}", f"--dest={folder}"]
            done = subprocess.run(
                [sys.executable, "-m", *pip, f"{package.name}=={package.version}"],
                env=os.environ | {"PYTHONPATH": _pip_wheel()},
                capture_output=True,
                text=True,
                check=False,
            )
            wheels = [*Path(folder).glob("*.whl")]
            if not wheels:
                print(f"not for Python {version}: {(done.stderr.splitlines() or ['no wheel'])[-1]}", file=sys.stderr)
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    shared = [name for name in sorted(archive.namelist()) if name.endswith(".so")]
                    files |= {f"{NATIVE}/{tag}/{name}": archive.read(name) for name in shared}
    return files


def _pip_wheel() -> str:
    """The wheel of pip that make_venv.sh has used, as the environment has no pip; empty if it took the system's."""
    folders = [BUILD / "debian/usr/share/python-wheels"]
    if find_spec("ensurepip"):
        import ensurepip

        given = sysconfig.get_config_var("WHEEL_PKG_DIR")
        folders.insert(0, Path(given) if given else Path(ensurepip.__file__).parent / "_bundled")
    return str(next((wheel for folder in folders for wheel in folder.glob("pip-*.whl")), ""))


def _tags(files: dict[str, bytes]) -> list[str]:
    return sorted({name.split("/")[1] for name in files if name.startswith(f"{NATIVE}/")})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
