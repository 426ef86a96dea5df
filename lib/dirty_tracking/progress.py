# SPDX-License-Identifier: GPL-2.0-only
"""The progress of the cell that runs in this process, for a listener that shows it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_EVERY = 0.25  # seconds between two steps


@dataclass(frozen=True)
class Step:
    """A point in the run of a cell.

    :ivar iteration: the current one, counted from 1
    :ivar iterations: how many there will be
    :ivar writes: those of all vCPUs so far
    :ivar left: the remaining seconds, by the pace so far; None at first
    """

    iteration: int
    iterations: int
    writes: int
    left: float | None


# Called with each step, on the main thread; set by what shows the progress
listener: Callable[[Step], None] | None = None


class Meter:
    """Follows the run of a cell, and calls the listener with its steps.

    :param interval: how long an iteration lasts at least, in seconds
    """

    def __init__(self, iterations: int, interval: float) -> None:
        self._iterations = iterations
        self._iteration = 0
        self._each = interval  # seconds per iteration, without the first one, which writes every page
        self._second = self._began = 0.0
        self._last_step = time.monotonic()
        self._from: Sequence[int] = ()
        self._goals: Sequence[int] = ()

    def begin(self, writes: Sequence[int], goals: Sequence[int]) -> None:
        """Begin the next iteration, which ends when each vCPU's number of writes has reached its goal."""
        self._iteration += 1
        self._from, self._goals = writes, goals
        self._began = time.monotonic()
        if self._iteration == 2:
            self._second = self._began
        elif self._iteration > 2:
            self._each = (self._began - self._second) / (self._iteration - 2)

    def read(self, writes: Callable[[], Sequence[int]]) -> None:
        """Make a step, unless one was made a moment ago."""
        now = time.monotonic()
        if listener is not None and now - self._last_step >= _EVERY:
            self._last_step = now
            done = writes()
            listener(Step(self._iteration, self._iterations, sum(done), self._left(now, done)))

    def _left(self, now: float, writes: Sequence[int]) -> float | None:
        later = (self._iterations - self._iteration) * self._each
        elapsed = now - self._began
        if self._iteration > 1:
            return max(self._each - elapsed, 0) + later
        share = min(
            (count - first) / (goal - first) for count, first, goal in zip(writes, self._from, self._goals, strict=True)
        )
        return elapsed * max(1 / share - 1, 0) + later if share > 0 else None
