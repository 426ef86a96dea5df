# SPDX-License-Identifier: GPL-2.0-only
"""Lines on the terminal: as wide as it is, and in colour where it has some."""

import pytest

from harness.table import Line
from kvm_util.wording import WIDTH, wrapped

_COLOURS: dict[str, dict[str, bool]] = {
    "pass": {"green": True},
    "FAIL": {"red": True, "bold": True},
    "known bug": {"yellow": True},
    "bug not seen": {"yellow": True},
    "known bug, not seen": {"yellow": True},
}


class Screen:
    """pytest's terminal reporter, for lines that must not be broken anywhere but between words.

    In a pipe or a file every text stays in one line, for grep; colours are as pytest's options and the environment ask.

    :ivar width: columns of the terminal, or those that pytest takes in its place
    """

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self._reporter = reporter
        self._wraps = reporter.isatty
        self.width = reporter.config.get_terminal_writer().fullwidth if reporter.isatty else WIDTH

    def section(self, title: str) -> None:
        """A line across the screen with a title."""
        self._reporter.section(title)

    def line(self, text: str = "", indent: str = "  ", **colours: bool) -> None:
        """Text in as many lines as it needs, all but the first indented."""
        begin = text[: len(text) - len(text.lstrip())]
        for line in wrapped(text.strip(), self.width, begin, begin + indent) if self._wraps and text else [text]:
            self._reporter.line(line, **colours)

    def verbatim(self, text: str) -> None:
        """One line, however long it is: what the kernel or a program wrote."""
        self._reporter.line(text)

    def row(self, line: Line) -> None:
        """A line of the table."""
        self._reporter.write(line.text)
        self._reporter.write(line.verdict, **_COLOURS.get(line.verdict, {}))
        self._reporter.line(line.reason)
