# SPDX-License-Identifier: GPL-2.0-only
"""Prints the summary on the terminal, wrapped to its width and in colour."""

from _pytest.terminal import TerminalReporter

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
    """Prints through pytest's terminal reporter; on a terminal, lines are wrapped between words only.

    In a pipe or a file each text is one line, for grep. Colours follow pytest's options and the environment.

    :ivar width: columns of the terminal, or ``WIDTH`` if the output is none
    """

    def __init__(self, reporter: TerminalReporter) -> None:
        self._reporter = reporter
        self._wraps = reporter.isatty
        self.width = reporter.config.get_terminal_writer().fullwidth if reporter.isatty else WIDTH

    def section(self, title: str) -> None:
        """Print a title in a line across the screen."""
        self._reporter.section(title)

    def line(self, text: str = "", indent: str = "  ", **colours: bool) -> None:
        """Print *text*, wrapped; lines after the first begin with *indent*."""
        begin = text[: len(text) - len(text.lstrip())]
        for line in wrapped(text.strip(), self.width, begin, begin + indent) if self._wraps and text else [text]:
            self._reporter.line(line, **colours)

    def verbatim(self, text: str) -> None:
        """Print a line of the kernel's or a program's output, not wrapped."""
        self._reporter.line(text)

    def row(self, line: Line) -> None:
        """Print a line of the table."""
        self._reporter.write(line.text)
        self._reporter.write(line.verdict, **_COLOURS.get(line.verdict, {}))
        self._reporter.line(line.reason)
