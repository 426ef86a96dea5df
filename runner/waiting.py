# SPDX-License-Identifier: GPL-2.0-only
"""Progress of what takes time outside pytest: a line that changes on a terminal, elsewhere a line every half minute."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.live_lines import is_terminal, terminal_size

_TICK = 0.5  # seconds between two changes of the line on a terminal
_BAR = 24
SILENCE = 30.0  # seconds between two lines elsewhere


# Progress: the share that is done, or None if unknown, and the same in words
Figure = Callable[[], tuple[float | None, str]]


@contextmanager
def waiting(what: str, figure: Figure | None = None, begin: str | None = None) -> Iterator[None]:
    """Show on standard error what the body does, how far it is, and for how long it runs.

    :param figure: gives the progress; it is called on another thread
    :param begin: the first line where there is no terminal
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
    with suppress(OSError):  # the terminal is gone: whoever prints results will report it
        print(text, end="", file=sys.stderr, flush=True)


def bar(share: float) -> str:
    """A bar of which *share* is filled."""
    return f"[{'#' * int(min(share, 1) * _BAR):.<{_BAR}}]"


def clipped(text: str, columns: int) -> str:
    """*text*, cut to fit into *columns*."""
    return text if len(text) <= columns else f"{text[: max(columns - 2, 0)]}.."


def duration(seconds: float) -> str:
    """A time in words: ``35 s``, ``2 min 5 s``, ``1 h 3 min``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def bytes_in(folder: Path) -> int:
    """The size of all files below *folder*, which may be written and renamed meanwhile."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(parent, name)).st_size
    return size
