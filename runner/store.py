# SPDX-License-Identifier: GPL-2.0-only
"""Folders below build/ that are filled once: locked against two runs at once, and stamped when they are complete."""

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runner import ROOT
from runner.waiting import waiting

BUILD = ROOT / "build"
_COMPLETE = ".complete"  # written last: a folder without it is left over from a run that broke off


def is_complete(folder: Path) -> bool:
    """Whether *folder* was filled to its end."""
    return (folder / _COMPLETE).exists()


def fill(folder: Path, write: Callable[[Path], None]) -> Path:
    """Have *write* fill *folder*, unless it is complete. It appears in one step, so no other run sees a part of it."""
    if is_complete(folder):
        return folder
    with locked(folder.parent):
        if not is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
            with scratch(folder.parent) as temporary:
                partial = temporary / "root"
                partial.mkdir()
                write(partial)
                (partial / _COMPLETE).touch()
                partial.rename(folder)
    return folder


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder in *folder*, which is locked. Those that killed runs left there are removed."""
    for stray in folder.glob(".*"):
        if stray.is_dir():
            shutil.rmtree(stray, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        yield Path(temporary)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one run at a time work in *folder*; a run that has to wait says so."""
    folder.mkdir(parents=True, exist_ok=True)
    # To read is enough for flock(2), and another user's file can be no more than read.
    descriptor = os.open(folder / ".lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"waiting for another run that is at work in {shown(folder)}"
            with waiting(what, begin=what):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def shown(path: Path) -> Path:
    """*path* as messages show it: from the suite's folder if it is in there."""
    return path.relative_to(BUILD.parent) if path.is_relative_to(BUILD.parent) else path


def say(text: str) -> None:
    """Print what takes time, and why it is done."""
    print(text, file=sys.stderr, flush=True)
