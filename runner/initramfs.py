# SPDX-License-Identifier: GPL-2.0-only
"""The initramfs of the booted kernel: this Python, pytest, KVM's modules and the suite.

It needs nothing of the kernel but CONFIG_BLK_DEV_INITRD, and under emulation it is faster than any file system that is shared
with the host.
"""

import compileall
import hashlib
import io
import json
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from runner import ROOT
from runner.cpio import CpioWriter
from runner.errors import CannotTest
from runner.guest_init import JOB, Job
from runner.modules import Module
from runner.packages import needed_packages
from runner.store import BUILD, locked, scratch

CACHE = BUILD / "initramfs"
PYTHON = "/usr/bin/python3"
SITE = "/usr/lib/site-packages"
_LIBRARY = f"/usr/{sys.platlibdir}/python{sys.version_info.major}.{sys.version_info.minor}"

# The parts of this checkout that a run needs
SUITE_FOLDERS = ("lib", "runner", "selftests", "guest_code", "build/guest_code")
SUITE_FILES = ("conftest.py", "pytest.ini", "pyproject.toml", "known_bugs.toml")

# Parts of the standard library that take space and that no test uses
_LEFT_OUT = (
    "test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "pydoc_data", "site-packages",
    "dist-packages", "__pycache__", "config-*", "sqlite3", "_sqlite3*", "curses", "_curses*", "dbm", "_dbm*", "_gdbm*",
    "_test*", "_xx*", "xx*", "_tkinter*", "turtle*", "_codecs_*", "distutils", "wsgiref", "xmlrpc", "venv",
)  # fmt: skip


def build(folder: Path, modules: Sequence[Module], job: Job) -> BinaryIO:
    """Make an initramfs whose init does *job*: an unnamed file in *folder*, so that nothing is left of a killed run.

    :raises CannotTest: it cannot be written
    """
    with ExitStack() as failing:
        try:
            file = failing.enter_context(tempfile.TemporaryFile(dir=folder))
            with _base().open("rb") as base:
                shutil.copyfileobj(base, file, 1 << 20)
            file.write(_overlay(modules, job))
            file.flush()
            failing.pop_all()
            return file
        except OSError as error:
            where = error.filename or folder
            raise CannotTest(f"the initramfs cannot be made: {where}: {error.strerror}") from None
        except subprocess.CalledProcessError as error:
            raise CannotTest(f"the initramfs cannot be made: {error.stderr.decode(errors='replace').strip()}") from None


def base_digest() -> str:
    """A digest of all that the cached part depends on: Python, the packages, and this file."""
    packages = sorted(f"{package.name} {package.version}" for package in needed_packages())
    text = f"{sys.version} {sys.executable} {packages}".encode() + Path(__file__).read_bytes()
    return hashlib.sha256(text).hexdigest()[:16]


def _base() -> Path:
    """The part that all runs share, made once."""
    path = CACHE / f"python-{base_digest()}.cpio"
    if not path.exists():
        with locked(CACHE):
            if not path.exists():
                _make_base(path)
    return path


def _make_base(path: Path) -> None:
    with scratch(CACHE) as folder:
        tree = folder / "tree"
        _collect_python(tree)
        partial = folder / "cpio"
        with partial.open("wb") as file:
            archive = CpioWriter(file)
            archive.add_node("/dev/console", 5, 1)  # the kernel opens it for the first program
            archive.add_tree("", tree)
            archive.finish()
        for old in CACHE.glob("python-*.cpio"):
            old.unlink(missing_ok=True)
        partial.rename(path)


def _collect_python(tree: Path) -> None:
    binary = Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    ignore = shutil.ignore_patterns(*_LEFT_OUT)
    shutil.copytree(library, tree / _LIBRARY[1:], ignore=ignore, ignore_dangling_symlinks=True)
    (tree / PYTHON[1:]).parent.mkdir(parents=True)
    shutil.copy(binary, tree / PYTHON[1:])
    for package in needed_packages():
        for file in package.files or ():
            if file.suffix != ".pyc" and ".." not in file.parts:
                target = tree / SITE[1:] / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), target)
    extensions = [path for folder in (_LIBRARY, SITE) for path in (tree / folder[1:]).rglob("*.so")]
    for shared in _shared_libraries([binary, *extensions]):
        target = tree / str(shared)[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        # binutils are there: they assemble the guest programs. The guest has less to unpack.
        subprocess.run(["strip", "--strip-debug", "-o", str(target), str(shared)], check=True, capture_output=True)
    for folder in (_LIBRARY, SITE):
        # Without the sources the guest has half as much to unpack.
        _compile(tree, folder, legacy=True)
        for source in (tree / folder[1:]).rglob("*.py"):
            source.unlink()


def _compile(tree: Path, folder: str, legacy: bool = False) -> None:
    """Compile all Python files here; in an emulated guest that takes minutes.

    :param legacy: put the compiled files beside the sources, which can then be left out
    """
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(
        tree / folder[1:], quiet=2, legacy=legacy, workers=0, invalidation_mode=unchecked, stripdir=tree, prependdir="/"
    )


def _ignore_compiled(_folder: str, names: list[str]) -> list[str]:
    """Leave compiled files out, except for the test modules that pytest compiled with rewritten assertions."""
    return [name for name in names if name.endswith(".pyc") and "-pytest-" not in name]


def _shared_libraries(binaries: Sequence[Path]) -> Iterator[Path]:
    """The shared libraries that *binaries* load, and the loader."""
    done = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, check=False)
    found = {Path(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", done.stdout, re.MULTILINE)}
    yield from sorted(found)
    for libc in found:
        # glibc loads libgcc_s.so when a thread is cancelled or exits (pthread_exit(3)).
        if libc.name.startswith("libc.so") and (unwinder := libc.with_name("libgcc_s.so.1")).exists():
            yield unwinder


def _overlay(modules: Sequence[Module], job: Job) -> bytes:
    """The part that differs from run to run."""
    file = io.BytesIO()
    archive = CpioWriter(file)
    archive.add_file("/init", (ROOT / "runner" / "guest_init.py").read_bytes(), 0o755)
    archive.add_file(JOB, json.dumps(vars(job)).encode())
    for module in modules:
        archive.add_file(module.guest_path, module.data)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in SUITE_FOLDERS:
            shutil.copytree(ROOT / name, tree / "suite" / name, ignore=_ignore_compiled)
        for path in (ROOT / "__pycache__").glob("conftest.*-pytest-*.pyc"):
            (tree / "suite/__pycache__").mkdir(exist_ok=True)
            shutil.copy2(path, tree / "suite/__pycache__")
        for name in SUITE_FILES:
            shutil.copy2(ROOT / name, tree / "suite")
        _compile(tree, "/suite")
        archive.add_tree("", tree)
    archive.finish()
    return file.getvalue()
