# SPDX-License-Identifier: GPL-2.0-only
"""Folders below build/ that are filled once, under a lock, and marked when they are complete."""

import fcntl
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runner import ROOT
from runner.waiting import waiting

BUILD = ROOT / "build"
_COMPLETE = ".complete"  # written last: a folder without it is from a run that was interrupted


def is_complete(folder: Path) -> bool:
    """Whether *folder* was filled completely."""
    return (folder / _COMPLETE).exists()


def newest(cache: Path, name: re.Pattern[str]) -> Path | None:
    """The complete folder in *cache* with the highest version, among those whose names match."""
    complete = [path for path in cache.glob("*") if name.fullmatch(path.name) and is_complete(path)]
    return max(complete, key=lambda path: version_key(path.name), default=None)


def version_key(text: str) -> list[tuple[int, str]]:
    """A sort key by which numbers within names are compared by their values."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", text)]


def fill(folder: Path, write: Callable[[Path], None]) -> Path:
    """Have *write* fill *folder*, unless it is complete; it appears at once, so that no other run sees a part of it."""
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
    """A temporary folder in *folder*, which must be locked; those of killed runs are removed."""
    for stray in folder.glob(".*"):
        if stray.is_dir():
            shutil.rmtree(stray, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        yield Path(temporary)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one run at a time write to *folder*; a run that has to wait says so."""
    folder.mkdir(parents=True, exist_ok=True)
    # flock(2) needs no write access, and another user's file may not give it.
    descriptor = os.open(folder / ".lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"waiting for another run that writes to {shown(folder)}"
            with waiting(what, begin=what):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def shown(path: Path) -> Path:
    """*path* as messages show it: relative to the checkout, if it is inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def say(text: str) -> None:
    """Print a line about what takes time to standard error."""
    print(text, file=sys.stderr, flush=True)
