# SPDX-License-Identifier: GPL-2.0-only
"""The journal of a run: a line of JSON for each start and end of a test, on disk before anything else happens.

A host that goes down loses nothing but the tests that were running. The lines, by their first key:

    run       the first line: options, seed, kernel, plan of the matrix
    boot      each time the run begins or is resumed: which boot of this host it is, with the taint flags (``taint``)
    start     a test begins, with the kernel's taint flags (``taint``)
    end       it ended, with its reports (``reports``; none if it has to run again), or died with the host (``died``)
    kernel    a report of the kernel
    finished  the run ended in order, with this exit status
"""

import errno
import fcntl
import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.kernel_log import Kind, Splat
from runner.store import shown

NAME = "journal.jsonl"
# What its first line has, besides the seed
_HEAD = {"label": str, "suite": str, "host": dict, "folder": str, "arguments": list, "addopts": str, "plan": list}
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class JournalError(Exception):
    """A journal cannot be read, or is in use."""


class Journal:
    """A journal that is written, by one process or several.

    :param new: whether it may have to be created
    :ivar kept: whether the file stays when the run ends in order
    :ivar synced: whether a line is on disk when it has been written, and not only in the page cache
    :raises OSError: it cannot be opened
    """

    def __init__(self, folder: Path, new: bool = False) -> None:
        self.path = folder / NAME
        self.kept = not new
        self.synced = True
        # With O_APPEND the lines of several processes do not overwrite each other.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | (os.O_CREAT if new else 0)
        self._file = os.open(self.path, flags, 0o666)
        self._failed = False

    def lock(self) -> None:
        """Have the journal for this run alone, as long as this process lives.

        :raises JournalError: another run has it
        :raises OSError: this file system has no locks
        """
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(f"{shown(self.path.parent)}: another run is writing there") from None

    def clear(self) -> None:
        """Begin a new journal, and have its name on disk, where folders can be read and synchronized.

        :raises OSError: it cannot be written
        """
        os.ftruncate(self._file, 0)
        for folder in (self.path.parent, self.path.parent.parent):
            with suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def write(self, **record: Any) -> None:
        """Write one line; see *synced*.

        If that fails, as on a full disk, the journal is removed: one that lacks an end would blame a test that ended.
        """
        self._append(json.dumps(record).encode() + b"\n")

    def end_torn_line(self) -> None:
        """End the last line if a crash cut it off, so that the next one is a line of its own."""
        if self.path.read_bytes()[-1:] not in (b"", b"\n"):
            self._append(b"\n")

    def _append(self, line: bytes) -> None:
        if self._failed:
            return
        try:
            if os.write(self._file, line) < len(line):  # the disk is full behind it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.synced:
                os.fsync(self._file)
        except OSError:
            self._failed = True
            self._remove()

    def _remove(self) -> None:
        # The folder may be gone, or read-only by now: the run has nothing to say about that.
        with suppress(OSError):
            self.path.unlink()

    def close(self) -> None:
        """Close the file, and remove it if it need not be kept."""
        if not self.kept:
            self._remove()
        os.close(self._file)


@dataclass
class PastRun:
    """A run as its journal has it.

    :ivar head: its first line
    :ivar boot: the boot of the host in which it was last seen
    :ivar taint: the kernel's taint flags when it began or was resumed there; None if they could not be read
    :ivar ended: the reports of each test that ended, or what to say of one that died with the host
    :ivar running: the taint flags at the start of each test that has not ended; None if they could not be read
    :ivar reports: the kernel's
    :ivar reports_of_boot: those in the boot in which it was last seen
    :ivar status: the exit status with which the run ended in order; None if it did not
    """

    folder: Path
    head: dict[str, Any]
    boot: str = ""
    taint: int | None = None
    ended: dict[str, list[dict[str, Any]] | str] = field(default_factory=dict)
    running: dict[str, int | None] = field(default_factory=dict)
    reports: list[Splat] = field(default_factory=list)
    reports_of_boot: list[Splat] = field(default_factory=list)
    status: int | None = None

    @property
    def finished(self) -> bool:
        """Whether the run ended in order."""
        return self.status is not None

    @property
    def host_died(self) -> bool:
        """Whether the host went down without ending the run."""
        return not self.finished and self.boot != boot_id()

    @property
    def death(self) -> str:
        """How it ended without being finished, in words."""
        who = "the host died" if self.host_died else "the run was killed"
        return f"{who} while {' and '.join(self.running) or 'no test'} ran"

    def add(self, record: dict[str, Any]) -> None:
        """Add a line of the journal."""
        if "boot" in record:
            if record["boot"] != self.boot:
                self.reports_of_boot.clear()
            self.boot, self.taint, self.status = record["boot"], record["taint"], None
        elif "start" in record:
            self.running[record["start"]] = record["taint"]
        elif "end" in record:
            self.running.pop(record["end"], None)
            if verdict := record.get("died") or record["reports"]:
                self.ended[record["end"]] = verdict
        elif "kernel" in record:
            splat = Splat(Kind(record["kernel"]), record["lines"])
            self.reports.append(splat)
            self.reports_of_boot.append(splat)
        elif "finished" in record:
            self.status = record["finished"]


def read(folder: Path) -> PastRun:
    """Read the journal in *folder*.

    :raises JournalError: there is none, or it is damaged
    """
    path = folder / NAME
    try:
        records = [record for line in path.read_bytes().split(b"\n") if (record := _parse(line))]
    except OSError as error:
        raise JournalError(f"{shown(path)}: {error.strerror}") from None
    if not records or not _is_head(records[0].get("run")):
        raise JournalError(f"{shown(path)} is no journal of a run that this version of the suite can read")
    run = PastRun(folder, records[0]["run"])
    for record in records[1:]:
        try:
            run.add(record)
        except (KeyError, TypeError, ValueError):
            raise JournalError(
                f"{shown(path)} is damaged (without it, a new run begins): {json.dumps(record)[:80]}"
            ) from None
    return run


def _is_head(head: object) -> bool:
    """Whether a journal's first line has what is needed to go on with the run."""
    return (
        isinstance(head, dict)
        and all(isinstance(head.get(name), kind) for name, kind in _HEAD.items())
        and isinstance(head["host"].get("parameters"), dict)
        and "seed" in head
    )


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line's record; None for one that is not complete, as the last may be after a crash."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def newest(results: Path, label: str) -> PastRun | None:
    """The newest run in *results* that has this label, if it was not finished and is not running."""
    journals = []
    for path in results.glob(f"*/{NAME}"):
        with suppress(FileNotFoundError):  # the run that has it is just ending
            if path.parent.name.startswith(label):
                journals.append((path.stat().st_mtime, path))
    for _, path in sorted(journals, reverse=True):
        # It died before its first line was written, was damaged, or is just being removed.
        with suppress(JournalError, OSError):
            run = read(path.parent)
            if run.head["label"] == label:
                return None if run.finished or is_locked(path) else run
    return None


def is_locked(path: Path) -> bool:
    """Whether the run that writes the journal *path* lives."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def boot_id() -> str:
    """Which boot of this host it is: a new random number in each."""
    return _BOOT_ID.read_text(encoding="ascii").strip()
