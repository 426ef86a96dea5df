# SPDX-License-Identifier: GPL-2.0-only
"""Progress of long operations outside pytest: a line updated in place on a terminal, a line every half minute elsewhere."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.live_lines import is_terminal, terminal_size

_TICK = 0.5  # seconds between updates of the line on a terminal
_BAR = 24  # columns
SILENCE = 30.0  # seconds between lines elsewhere


# Returns the share that is done, from 0 to 1, or None if unknown; and the progress in words
Figure = Callable[[], tuple[float | None, str]]


@contextmanager
def waiting(what: str, figure: Figure | None = None, begin: str | None = None) -> Iterator[None]:
    """Show on standard error what the body does and for how long, until it ends.

    :param figure: its progress; called on another thread
    :param begin: a line to print first, unless standard error is a terminal
    """
    live = is_terminal(sys.stderr)
    if begin and not live:
        _print(f"{begin}\n")
    over = threading.Event()
    thread = threading.Thread(target=_show, args=[what, figure, live, over], daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _show(what: str, figure: Figure | None, live: bool, over: threading.Event) -> None:
    started = time.monotonic()
    before, after = ("\r", "\x1b[K") if live else ("", "\n")
    while not over.wait(_TICK if live else SILENCE):
        share, words = figure() if figure else (None, "")
        known = ([f"{bar(share)} "] if live and share is not None else []) + ([f"{words}, "] if words else [])
        rest = f": {''.join(known)}{duration(time.monotonic() - started)}"
        shown = clipped(what, terminal_size(sys.stderr.fileno())[0] - 1 - len(rest)) if live else what
        _print(f"{before}{shown}{rest}{after}")
    if live:
        _print("\r\x1b[K")


def _print(text: str) -> None:
    with suppress(OSError):  # a closed terminal is an error only for those that print results
        print(text, end="", file=sys.stderr, flush=True)


def bar(share: float) -> str:
    """A progress bar, full at a *share* of 1."""
    return f"[{'#' * int(min(share, 1) * _BAR):.<{_BAR}}]"


def clipped(text: str, columns: int) -> str:
    """*text*, cut off with ``..`` if it is longer than *columns*."""
    return text if len(text) <= columns else f"{text[: max(columns - 2, 0)]}.."


def duration(seconds: float) -> str:
    """A duration in at most two units, rounded down: ``35 s``, ``2 min 5 s``, ``1 h 3 min``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def bytes_in(folder: Path) -> int:
    """The total size of the files below *folder*, which may change meanwhile."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(parent, name)).st_size
    return size
