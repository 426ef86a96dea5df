# SPDX-License-Identifier: GPL-2.0-only
"""TOML files that people edit. Every error is a single line that names the file and the line in it."""

import re
import tomllib
from pathlib import Path
from typing import Any

from runner import ROOT


class TomlError(ValueError):
    """A file cannot be read, or has invalid contents; the message is one line that says where."""


class TomlFile:
    """A parsed TOML file."""

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
            # The message ends with the position: "(at line 3, column 7)" or "(at end of document)".
            what, _, place = str(error).rpartition(" (at ")
            number = re.match(r"line (\d+)", place)
            last = number[1] if number else len(self._lines)
            raise TomlError(f"{self._shown}:{last}: not TOML: {what}") from None

    def error(self, text: str, key: str = "", table: str = "", number: int = 0) -> TomlError:
        """An error about *key*, at the top level or in the *number*-th ``[[table]]``, counted from 0."""
        return TomlError(f"{self._shown}:{self.line_of(key, table, number)}: {text}")

    def line_of(self, key: str, table: str = "", number: int = 0) -> int:
        """The line of *key*, or of the table's header if the table lacks the key; 1 if there is neither.

        The parser keeps no positions, so this searches for lines that look like a header or key. Only a multi-line string
        could be mistaken for one.
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
