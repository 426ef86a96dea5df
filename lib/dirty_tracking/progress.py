# SPDX-License-Identifier: GPL-2.0-only
"""How far the cell is that runs in this process, for whoever wants to show it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_EVERY = 0.25  # seconds between two steps


@dataclass(frozen=True)
class Step:
    """A point in the run of a cell.

    :ivar iteration: the one that is under way, from 1 on
    :ivar iterations: how many there will be
    :ivar writes: those of all vCPUs so far
    :ivar left: the seconds that the run will take yet, by its pace so far; None at first
    """

    iteration: int
    iterations: int
    writes: int
    left: float | None


# Called with each step, on the main thread; whoever shows a run sets it.
listener: Callable[[Step], None] | None = None


class Meter:
    """Follows the run of a cell, and hands its steps to the listener.

    :param interval: how long an iteration lasts at least, in seconds
    """

    def __init__(self, iterations: int, interval: float) -> None:
        self._iterations = iterations
        self._iteration = 0
        self._each = interval  # how long an iteration takes; the first one, which writes every page, does not count
        self._second = self._began = 0.0
        self._told = time.monotonic()
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
        if listener is not None and now - self._told >= _EVERY:
            self._told = now
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
