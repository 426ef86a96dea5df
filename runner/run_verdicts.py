# SPDX-License-Identifier: GPL-2.0-only
"""The verdicts of runs on kernels, by their exit statuses, and how a terminal shows them."""

import re
from contextlib import suppress

from _pytest._io import TerminalWriter

from runner.errors import CANNOT_TEST

NOT_RUN, USAGE_ERROR, INTERRUPTED = -1, 128, 130
_VERDICTS = {
    0: "good",
    1: "BAD",
    CANNOT_TEST: "cannot be tested",
    USAGE_ERROR: "cannot be run like this",
    INTERRUPTED: "interrupted",
    NOT_RUN: "not run",
}
_GREEN, _RED, _YELLOW = {"green": True}, {"red": True, "bold": True}, {"yellow": True}
# The words of verdicts and of the tables; F and k follow the number of a test's cases.
_COLOURS = {
    "good": _GREEN,
    "pass": _GREEN,
    "BAD": _RED,
    "FAIL": _RED,
    "F": _RED,
    "cannot be tested": _RED,
    "bug": _YELLOW,
    "bug?": _YELLOW,
    "k": _YELLOW,
}
_COLOURED = re.compile(r"(?<!\S)(?:good|BAD|cannot be tested|pass|FAIL|bug\??|[0-9]+[Fk])(?=[ :,;]|$)")


def print_line(text: str) -> None:
    """Print *text* with verdicts in colour, if the terminal is still there."""
    with suppress(OSError):
        print(colourize(text), flush=True)


def colourize(text: str) -> str:
    """*text* with the verdicts in colour, if the terminal has some; the lines that explain the words have none."""
    writer = TerminalWriter()

    def coloured(found: re.Match[str]) -> str:
        return writer.markup(found[0], **_COLOURS[found[0].lstrip("0123456789")])

    return "\n".join(line if line.startswith("(") else _COLOURED.sub(coloured, line) for line in text.split("\n"))


def verdict_of(status: int) -> str:
    """A run's exit status in words."""
    return _VERDICTS.get(status, f"ended with status {status}")
