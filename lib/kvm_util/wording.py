# SPDX-License-Identifier: GPL-2.0-only
"""Text for reports: counted nouns, short numbers, and line wrapping."""

import re
import textwrap
from collections.abc import Sequence

WIDTH = 80
_SHOWN = 8
_UNITS = (("k", 1e3), ("M", 1e6), ("G", 1e9))
_SHORT_COMMAND = 30
# Lines are not broken here
NO_BREAK = "\N{NO-BREAK SPACE}"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: ``1 page``, ``2 pages``."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def short_number(number: int) -> str:
    """A count in at most four characters, below 10^13: ``9856``, ``273k``, ``1.2M``, ``1500G``."""
    if number < 10_000:
        return str(number)
    unit, size = next((pair for pair in _UNITS if number < 999.5 * pair[1]), _UNITS[-1])
    scaled = number / size
    return f"{scaled:.1f}{unit}" if scaled < 9.95 else f"{scaled:.0f}{unit}"


def listed(noun: str, numbers: Sequence[int]) -> str:
    """A list of numbers, cut short after eight: ``page 3``, ``pages 3, 64, 69``, ``pages 1, ... and 12 more``."""
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"{noun if len(numbers) == 1 else noun + 's'} {shown}{more}"


def wrapped(text: str, width: int = WIDTH, first: str = "", later: str = "  ") -> list[str]:
    """Wrap *text* at *width* columns, between words only, so that paths stay whole.

    A command in parentheses that is short or names a path is kept on one line if it fits, so that it can be copied.

    :param first: prefix of the first line
    :param later: prefix of the other lines
    """

    def kept(match: re.Match[str]) -> str:
        command = "/" in match[0] or len(match[0]) <= _SHORT_COMMAND
        return match[0].replace(" ", NO_BREAK) if command and len(later + match[0]) <= width else match[0]

    lines = textwrap.wrap(
        re.sub(r"\([^()]*\)\S?", kept, text),
        width,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(NO_BREAK, " ") for line in lines]
