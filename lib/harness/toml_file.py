# SPDX-License-Identifier: GPL-2.0-only
"""Settings in TOML files that people edit: whatever is wrong with one is said in one line, with the file's line."""

import re
import tomllib
from pathlib import Path
from typing import Any

from runner import ROOT


class TomlError(ValueError):
    """A file cannot be read, or says something that is not understood; the text is one line that says where."""


class TomlFile:
    """A file that was read.

    :ivar data: what it says
    :raises TomlError: it cannot be read, or is not TOML
    """

    def __init__(self, path: Path) -> None:
        self._shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise TomlError(f"{self._shown}: {error.strerror}") from None
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            raise TomlError(f"{self._shown}:{line}: not UTF-8") from None
        self._lines = text.split("\n")
        try:
            self.data: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            # Its text ends with the place: "(at line 3, column 7)" or "(at end of document)".
            what, _, place = str(error).rpartition(" (at ")
            number = re.match(r"line (\d+)", place)
            last = number[1] if number else len(self._lines)
            raise TomlError(f"{self._shown}:{last}: not TOML: {what}") from None

    def error(self, text: str, key: str = "", table: str = "", number: int = 0) -> TomlError:
        """What is wrong with *key*, at the top or in the *number*-th table ``[[table]]``."""
        return TomlError(f"{self._shown}:{self.line_of(key, table, number)}: {text}")

    def line_of(self, key: str, table: str = "", number: int = 0) -> int:
        """The line where *key* begins; that of the table's header where the table has no such key.

        The parser keeps no positions. Lines that begin as a header or key does are taken for one: only a string of several
        lines could mislead that.
        """
        header = re.compile(rf"\s*\[\[\s*{re.escape(table)}\s*\]\]")
        found = re.compile(rf"""\s*(\[\s*{re.escape(table)}\s*\.\s*)?["']?{re.escape(key)}["']?\s*[=.\]]""")
        current, first = -1, 1
        for position, line in enumerate(self._lines, 1):
            if table and header.match(line):
                current += 1
                first = position if current == number else first
            elif (not table or current == number) and key and found.match(line):
                return position
        return first
