# SPDX-License-Identifier: GPL-2.0-only
"""The folder for a run's files, and checks before the run that all its files can be written, so that none is lost.

One that cannot is a pytest.UsageError: one line for the user.
"""

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvm_util.host_limits import explain
from runner import ROOT

# The one file (runner/standalone_start.py) is unpacked in a temporary folder, and puts its results elsewhere.
RESULTS = Path(os.environ.get("DIRTY_TRACKING_RESULTS", ROOT / "results"))
# A probe writes as much as the results of a small run, to find out whether the file system is full
_BLOCK, _BLOCKS = 4096, 64
_ATTEMPTS = 3


def new_folder(label: str) -> Path:
    """An unused path below results/, named after *label* and the time; nothing is created."""
    name = f"{label}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (name, *(f"{name}-{number}" for number in range(2, 100)))
    return next(path for path in (RESULTS / name for name in names) if not path.exists())


def chosen_folder(given: str | None, label: str) -> Path:
    """The folder that *given*, a value of ``--results``, names, seen from the current one; without it, a new one."""
    return new_folder(label) if given is None else Path(os.path.abspath(os.path.expanduser(given)))


def check_folder(option: str, folder: Path) -> None:
    """Check that *folder*, which *option* names, can be created and written to; leaves nothing behind."""
    with _refusals(f"{option} DIR puts the files elsewhere", folder):
        _probe(folder.resolve() / f".probe-{os.getpid()}")  # the target of a symbolic link may not exist yet


def check_file(option: str, path: Path) -> None:
    """Check that file *path* can be written, and its folder created; keeps an existing file and leaves nothing behind."""
    with _refusals(f"{option} FILE puts it elsewhere", path):
        if not (path := path.resolve()).exists():
            _probe(path)
        elif not stat.S_ISFIFO(path.stat().st_mode):  # opening a pipe would block until there is a reader
            path.open("ab").close()


def make_folder(option: str, folder: Path) -> list[Path]:
    """Create *folder* for the run, and its parents.

    :returns: the folders that were missing, outermost first, for :func:`remove_if_empty`
    """
    with _refusals(f"{option} DIR puts the files elsewhere", folder):
        return _make(folder)


def remove_if_empty(made: list[Path]) -> None:
    """Remove the folders in *made* that are empty; the list begins with the outermost."""
    for folder in reversed(made):
        try:
            folder.rmdir()
        except OSError:
            return  # it is not empty, or does not exist any more


def _make(folder: Path) -> list[Path]:
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)][::-1]
    try:
        for attempt in range(_ATTEMPTS):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                break
            except FileNotFoundError:  # another run has just removed the parent because it was empty
                if attempt == _ATTEMPTS - 1:
                    raise
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    except OSError:
        remove_if_empty([path for path in missing if path.exists()])
        raise
    return missing


def _probe(path: Path) -> None:
    """Write a new file *path* to disk, and remove it and its folders, where they were missing."""
    made = _make(path.parent)
    try:
        with path.open("xb", buffering=0) as file:
            try:
                for _ in range(_BLOCKS):
                    file.write(bytes(_BLOCK))
                os.fsync(file.fileno())
            finally:
                path.unlink()
    finally:
        remove_if_empty(made)


@contextmanager
def _refusals(remedy: str, path: Path) -> Iterator[None]:
    """Turn an error about *path* into a UsageError; *remedy* begins with the option that names the path."""
    try:
        yield
    except OSError as error:
        limit = explain(error.errno or 0, _BLOCK * _BLOCKS)
        hint = f": {limit}" if limit else f" ({remedy})"
        raise pytest.UsageError(f"{remedy.split()[0]}: {path}: {error.strerror}{hint}") from None
