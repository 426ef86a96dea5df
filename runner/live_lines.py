# SPDX-License-Identifier: GPL-2.0-only
"""Lines that stay below what is printed on a terminal, and change there.

No library's progress bar (tqdm, rich) serves: each wants the cursor for itself. Here it stays where pytest's writer left it.
"""

import os
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

_SAVE, _RESTORE = "\x1b7", "\x1b8"
_ONE_DOWN = "\x1bD"  # in the same column, and the screen scrolls at its end
_CLEAR_LINE, _CLEAR_BELOW = "\x1b[K", "\x1b[J"
_LAST_COLUMN = "\x1b[999G"
_PART = re.compile(r"\x1b\[[0-9;]*m|.", re.DOTALL)


def is_terminal(file: TextIO) -> bool:
    """Whether *file* is a terminal that can move its cursor."""
    return file.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def terminal_size(descriptor: int) -> tuple[int, int]:
    """Columns and rows of a terminal."""
    try:
        columns, rows = os.get_terminal_size(descriptor)
    except OSError:  # it was closed
        columns = rows = 0
    return columns or 80, rows or 24  # it may not know


class WatchedOutput:
    """Stands in for the text file *file*, to know what is printed and to print between it from another thread.

    What is printed from there goes past *file*, whose descriptor leads elsewhere while pytest captures a test's output.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self._output = os.dup(file.fileno())
        self._lock = threading.RLock()
        self.writes = 0
        self._in_line = False

    def write(self, text: str) -> int:
        """Print *text*, at once."""
        with self._lock:
            self.writes += 1
            self._in_line = not text.endswith("\n") if text else self._in_line
            written = self.file.write(text)
            self.file.flush()
            return written

    def print_line(self, line: str) -> None:
        """Print *line* on a line of its own."""
        with self._lock:
            self._print("\n" * self._in_line + line + "\n")
            self._in_line = False

    def close(self) -> None:
        """Have no part in what is printed any more."""
        with self._lock:
            os.close(self._output)

    def _print(self, text: str) -> None:
        left = text.encode(self.file.encoding or "utf-8", "replace")
        with suppress(OSError):  # the terminal, or who reads the pipe, has gone: what pytest itself prints will say so
            while left:
                left = left[os.write(self._output, left) :]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class LiveLines(WatchedOutput):
    """The same for a terminal, with lines below what is printed."""

    def __init__(self, file: TextIO) -> None:
        super().__init__(file)
        self._lines: list[str] = []
        self._column = 0
        # The character in the terminal's last column, with its colour, behind which the cursor is; and how wide it was then
        self._edge, self._edge_at = "", 0

    @property
    def columns(self) -> int:
        """How long a line can be; in the last column a terminal may wrap."""
        return terminal_size(self._output)[0] - 1

    def show(self, lines: Sequence[str]) -> None:
        """Replace the lines that are shown by *lines*, none of which is longer than a line of the terminal."""
        with self._lock:
            if not (lines or self._lines) or not self._in_foreground():
                return
            self._lines = list(lines)[: terminal_size(self._output)[1] - 1]
            self._draw()

    def write(self, text: str) -> int:
        """Print *text* above the lines."""
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
        """Remove the lines, and have no part in what is printed any more."""
        with self._lock:
            if self._lines:
                self._lines = []
                self._draw()
            super().close()

    def _follow(self, text: str) -> None:
        """Note in which column the cursor is when *text* is printed."""
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
        # The screen is made to scroll first: a saved position does not scroll with it.
        count = len(self._lines)
        room = f"{_ONE_DOWN * count}\x1b[{count}A" if count else ""
        lines = "".join(f"\r\n{line}{_CLEAR_LINE}" for line in self._lines) or "\r\n"
        # Behind the last column a terminal has yet to wrap, and forgets it when the cursor moves: what is printed next
        # would overwrite the character there. That one is printed again.
        edge = self._edge if self._edge_at == terminal_size(self._output)[0] else ""
        self._print(f"{room}{_LAST_COLUMN if edge else ''}{_SAVE}{lines}{_CLEAR_BELOW}{_RESTORE}{edge}")

    def _in_foreground(self) -> bool:
        """Whether the terminal is not with another job of a shell."""
        try:
            return os.tcgetpgrp(self._output) == os.getpgrp()
        except OSError:  # it is not this session's
            return True
