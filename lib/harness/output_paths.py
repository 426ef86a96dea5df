# SPDX-License-Identifier: GPL-2.0-only
"""The files and folders that a run will write: tried before it begins, so that no result is lost at its end."""

import errno
import os
import stat
from pathlib import Path

from kvm_util.host_limits import explain

# As much as the results of a small run take; a file system that is full has no room for it.
_BLOCK, _BLOCKS = 4096, 64
_ATTEMPTS = 3


class OutputError(ValueError):
    """A file or folder cannot be written; the text is one line for the user."""


def check_folder(option: str, folder: Path) -> None:
    """Check that files can be put into *folder*. What is made for that is removed again.

    :param option: the option that names the folder
    :raises OutputError: they cannot
    """
    try:
        folder = folder.resolve()  # of a symbolic link too the target may have to be made
        made = _make(folder)
        try:
            _write(folder / f".probe-{os.getpid()}")
        finally:
            remove_if_empty(made)
    except OSError as error:
        raise _refusal(option, folder, error, f"{option} DIR puts the files elsewhere") from None


def check_file(option: str, path: Path) -> None:
    """Check that *path* can be written, in a folder that will be made if it is not there. A file that is there is kept.

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
            pass  # to open it would wait for its reader
        else:
            path.open("ab").close()
    except OSError as error:
        raise _refusal(option, path, error, f"{option} FILE puts it elsewhere") from None


def make_folder(option: str, folder: Path) -> list[Path]:
    """Make *folder* for the run.

    :returns: the folders that were made, for :func:`remove_if_empty`
    :raises OutputError: it cannot be made
    """
    try:
        return _make(folder)
    except OSError as error:
        raise _refusal(option, folder, error, f"{option} DIR puts the files elsewhere") from None


def remove_if_empty(made: list[Path]) -> None:
    """Remove those of the folders that *made* lists, outermost first, which nothing was put into."""
    for folder in reversed(made):
        try:
            folder.rmdir()
        except OSError:
            return  # something is in it, or it is gone


def _make(folder: Path) -> list[Path]:
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)][::-1]
    try:
        for attempt in range(_ATTEMPTS):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                break
            except FileNotFoundError:  # another run has just removed a parent, as it had nothing to put there
                if attempt == _ATTEMPTS - 1:
                    raise
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    except OSError:
        remove_if_empty([path for path in missing if path.exists()])
        raise
    return missing


def _write(path: Path) -> None:
    """Write a new file to the disk, and remove it."""
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
