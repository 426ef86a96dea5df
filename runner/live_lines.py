# SPDX-License-Identifier: GPL-2.0-only
"""Status lines at the bottom of a terminal, below the regular output, updated in place.

Progress bar libraries (tqdm, rich) do not fit: they own the cursor. Here it stays where pytest's writer has left it.
"""

import errno
import os
import re
import termios
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

_SAVE, _RESTORE = "\x1b7", "\x1b8"
_ONE_DOWN = "\x1bD"  # same column; scrolls at the bottom of the screen
_CLEAR_LINE, _CLEAR_BELOW = "\x1b[K", "\x1b[J"
_LAST_COLUMN = "\x1b[999G"
_PART = re.compile(r"\x1b\[[0-9;]*m|.", re.DOTALL)


def is_terminal(file: TextIO) -> bool:
    """Whether *file* is a terminal with cursor control ($TERM is set, and not ``dumb``)."""
    return file.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def terminal_size(descriptor: int) -> tuple[int, int]:
    """Columns and rows of a terminal; 80 and 24 if unknown."""
    try:
        columns, rows = os.get_terminal_size(descriptor)
    except OSError:  # the terminal was closed
        columns = rows = 0
    return columns or 80, rows or 24


def detach_closed_terminals() -> None:
    """Redirect descriptors of a closed terminal to /dev/null: a write error would end the run before it writes its files."""
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for name in os.listdir("/proc/self/fd"):
        try:
            termios.tcgetattr(int(name))
        except termios.error as error:
            if error.args[0] == errno.EIO:
                os.dup2(nowhere, int(name))
    os.close(nowhere)


class WatchedOutput:
    """A proxy for the text file *file* that counts writes, and lets other threads print lines in between.

    Those lines are written to a duplicate of the file's descriptor: pytest redirects the original while it captures output.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self._output = os.dup(file.fileno())
        self._lock = threading.RLock()
        self.writes = 0
        self._in_line = False

    def write(self, text: str) -> int:
        """Print *text* and flush."""
        with self._lock:
            self.writes += 1
            self._in_line = not text.endswith("\n") if text else self._in_line
            try:
                written = self.file.write(text)
                self.file.flush()
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                detach_closed_terminals()  # SIGHUP follows
                return len(text)
            return written

    def print_line(self, line: str) -> None:
        """Print *line* on a line of its own."""
        with self._lock:
            self._print("\n" * self._in_line + line + "\n")
            self._in_line = False

    def close(self) -> None:
        """Close the duplicate descriptor; *file* stays open."""
        with self._lock:
            os.close(self._output)

    def _print(self, text: str) -> None:
        left = text.encode(self.file.encoding or "utf-8", "replace")
        with suppress(OSError):  # the terminal or pipe is closed: pytest's own output will fail on that
            while left:
                left = left[os.write(self._output, left) :]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class LiveLines(WatchedOutput):
    """A WatchedOutput for a terminal, with status lines below the output."""

    def __init__(self, file: TextIO) -> None:
        super().__init__(file)
        self._lines: list[str] = []
        self._column = 0
        # If the cursor is after the last column: the character there with its colour, and the terminal's width at the time
        self._edge, self._edge_at = "", 0

    @property
    def columns(self) -> int:
        """The longest line to show: one less than the terminal's width, since a terminal may wrap in the last column."""
        return terminal_size(self._output)[0] - 1

    def show(self, lines: Sequence[str]) -> None:
        """Replace the status lines; none may be longer than :attr:`columns`."""
        with self._lock:
            if not (lines or self._lines) or not self._in_foreground():
                return
            self._lines = list(lines)[: terminal_size(self._output)[1] - 1]
            self._draw()

    def write(self, text: str) -> int:
        """Print *text* above the status lines."""
        with self._lock:
            lines, self._lines = self._lines, []
            if lines:
                self._draw()
            written = super().write(text)
            self._follow(text)
            self._lines = lines
            if lines:
                self._draw()
            return written

    def close(self) -> None:
        """Remove the status lines and close the duplicate descriptor."""
        with self._lock:
            if self._lines:
                self._lines = []
                self._draw()
            super().close()

    def _follow(self, text: str) -> None:
        """Track the cursor's column past *text*."""
        if not text:
            return
        colours, last, self._edge = "", self._edge, ""
        for part in _PART.findall(text):
            if len(part) > 1:
                colours += part
            else:
                self._column = 0 if part in "\r\n" else self._column + 1
                last, colours = colours + part, ""
        self._edge_at = terminal_size(self._output)[0]
        if self._column and self._column % self._edge_at == 0:
            self._edge = last + colours

    def _draw(self) -> None:
        # Scroll first: a saved cursor position does not scroll with the screen.
        count = len(self._lines)
        room = f"{_ONE_DOWN * count}\x1b[{count}A" if count else ""
        lines = "".join(f"\r\n{line}{_CLEAR_LINE}" for line in self._lines) or "\r\n"
        # After a character in the last column, the terminal has a wrap pending, which it forgets when the cursor moves: the
        # next character would overwrite the last one. Printing the last one again restores the pending wrap.
        edge = self._edge if self._edge_at == terminal_size(self._output)[0] else ""
        self._print(f"{room}{_LAST_COLUMN if edge else ''}{_SAVE}{lines}{_CLEAR_BELOW}{_RESTORE}{edge}")

    def _in_foreground(self) -> bool:
        """Whether this process group is in the terminal's foreground."""
        try:
            return os.tcgetpgrp(self._output) == os.getpgrp()
        except OSError:  # not this session's controlling terminal
            return True
