# SPDX-License-Identifier: GPL-2.0-only
"""How long the phases of a run and KVM's calls take."""

import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Timings:
    """The times of each phase, in seconds; any thread may add one."""

    def __init__(self) -> None:
        self._seconds: dict[str, array[float]] = {}

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add how long the context takes, unless it raises."""
        begun = time.perf_counter()
        yield
        self._seconds.setdefault(phase, array("d")).append(time.perf_counter() - begun)

    def total(self, phase: str) -> float:
        """How long a phase took in all, in seconds."""
        return sum(self._seconds.get(phase, ()))

    def summary(self) -> dict[str, dict[str, float]]:
        """Of each phase its number, and in milliseconds the sum, percentiles 50, 90 and 99, and the longest time."""
        return {phase: _summary(sorted(seconds)) for phase, seconds in self._seconds.items()}


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    ranks = {f"p{percent}": -(-percent * len(seconds) // 100) for percent in (50, 90, 99)}
    times = {"total": sum(seconds), **{name: seconds[rank - 1] for name, rank in ranks.items()}, "max": seconds[-1]}
    return {"count": len(seconds), **{name: round(1000 * value, 4) for name, value in times.items()}}
