# SPDX-License-Identifier: GPL-2.0-only
"""Checks before a run that its output files and folders can be written, so that no result is lost at its end."""

import errno
import os
import stat
from pathlib import Path

from kvm_util.host_limits import explain

# A probe writes as much as the results of a small run, to find out whether the file system is full
_BLOCK, _BLOCKS = 4096, 64
_ATTEMPTS = 3


class OutputError(ValueError):
    """A file or folder cannot be written; the message is one line for the user."""


def check_folder(option: str, folder: Path) -> None:
    """Check that *folder* can be created and written to; leaves nothing behind.

    :param option: the option that names the folder
    :raises OutputError: it cannot
    """
    try:
        folder = folder.resolve()  # the target of a symbolic link may not exist yet
        made = _make(folder)
        try:
            _write(folder / f".probe-{os.getpid()}")
        finally:
            remove_if_empty(made)
    except OSError as error:
        raise _refusal(option, folder, error, f"{option} DIR puts the files elsewhere") from None


def check_file(option: str, path: Path) -> None:
    """Check that file *path* can be written, and its folder created; keeps an existing file and leaves nothing behind.

    :param option: the option that names the file
    :raises OutputError: it cannot
    """
    try:
        path = path.resolve()
        if not path.exists():
            made = _make(path.parent)
            try:
                _write(path)
            finally:
                remove_if_empty(made)
        elif stat.S_ISFIFO(path.stat().st_mode):
            pass  # opening it would block until there is a reader
        else:
            path.open("ab").close()
    except OSError as error:
        raise _refusal(option, path, error, f"{option} FILE puts it elsewhere") from None


def make_folder(option: str, folder: Path) -> list[Path]:
    """Create *folder* for the run, and its parents.

    :returns: the folders that were missing, outermost first, for :func:`remove_if_empty`
    :raises OutputError: it cannot be created
    """
    try:
        return _make(folder)
    except OSError as error:
        raise _refusal(option, folder, error, f"{option} DIR puts the files elsewhere") from None


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


def _write(path: Path) -> None:
    """Write a new file to disk, and remove it."""
    with path.open("xb", buffering=0) as file:
        try:
            for _ in range(_BLOCKS):
                file.write(bytes(_BLOCK))
            os.fsync(file.fileno())
        finally:
            path.unlink()


def _refusal(option: str, path: Path, error: OSError, remedy: str) -> OutputError:
    limit = explain(error.errno or 0, _BLOCK * _BLOCKS)
    return OutputError(f"{option}: {path}: {error.strerror}" + (f": {limit}" if limit else f" ({remedy})"))
