# SPDX-License-Identifier: GPL-2.0-only
"""The figures of a benchmark: a line of each as it is measured, and how it compares with the one that is kept.

``figures.json`` keeps a run's figures, by machine and kernel: ratios to C, and seconds of what has no counterpart in C.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

from harness.version import suite_version
from kvm_util.arch import current as arch

_KEPT = Path(__file__).with_name("figures.json")
_WIDTH = 50


class Figures:
    """Prints figures, and collects them by name."""

    def __init__(self) -> None:
        self._machine = f"{os.uname().release}, {arch.cpu_model()}, {os.cpu_count()} CPUs"
        self._all = json.loads(_KEPT.read_text()) if _KEPT.exists() else {}
        self._kept = self._all.get(self._machine, {"figures": {}})
        self._found: dict[str, float] = {}
        print(self._machine)
        since = f"of that kept on {self._kept['date']}" if "date" in self._kept else "(none is kept)"
        print(f"{'':{_WIDTH}}{'suite':>12}{'C':>12}{'ratio':>8}   {since}")

    def beside_c(self, name: str, suite: Sequence[float], c: Sequence[float]) -> None:
        """Add what took *suite* and *c* seconds in each round: the median of the ratios of the rounds."""
        ratio = statistics.median(ours / theirs for ours, theirs in zip(suite, c, strict=True))
        times = f"{_milliseconds(statistics.median(suite))}{_milliseconds(statistics.median(c))}"
        self._add(name, ratio, f"{times}{ratio:8.2f}")

    def per_unit(self, name: str, seconds: float, units: int) -> None:
        """Add what took *seconds* for *units*, in microseconds for each."""
        self._add(name, seconds, f"{_milliseconds(seconds)}{seconds / units * 1e6:9.3f} us each")

    def growth(self, title: str, unit: str, times: dict[int, float]) -> None:
        """Add what took so many seconds at each size, with its ratio to the first size."""
        for size, seconds in times.items():
            ratio = seconds / next(iter(times.values()))
            self._add(f"{title}, {size} {unit}", seconds, f"{_milliseconds(seconds)}{'':12}{ratio:8.2f}")

    def keep(self) -> None:
        """Keep these figures as those of this machine."""
        figures = {name: float(f"{value:.3g}") for name, value in self._found.items()}
        self._all[self._machine] = {
            "date": date.today().isoformat(),
            "suite": suite_version(),
            "figures": self._kept["figures"] | figures,
        }
        _KEPT.write_text(json.dumps(self._all, indent=1) + "\n")

    def _add(self, name: str, value: float, text: str) -> None:
        self._found[name] = value
        kept = self._kept["figures"].get(name)
        print(f"{name:{_WIDTH}}{text}" + ("" if kept is None else f"   {value / kept:.0%}"), flush=True)


def timed(call: Callable[[], object]) -> float:
    """How long *call* takes, in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:9.3f} ms"
