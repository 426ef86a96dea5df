# SPDX-License-Identifier: GPL-2.0-only
"""A limit on how long KVM_RUN lasts: a guest that hangs must not hang the test."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupting_after(seconds: float) -> Iterator[None]:
    """In the context a signal ends KVM_RUN after *seconds*, and each second from then on. Main thread only."""
    previous = signal.signal(signal.SIGALRM, _nothing)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """A signal's handler; the signal does its work by coming."""
