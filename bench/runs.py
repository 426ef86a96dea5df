# SPDX-License-Identifier: GPL-2.0-only
"""Whole runs of a cell: beside the kernel's own C test, and as memory, vCPUs and rings grow."""

import statistics
import subprocess
import sys

from bench.figures import Figures, timed
from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from kvm_util.host_limits import available_memory
from kvm_util.kvm import Kvm
from kvm_util.memory import GIB, MIB, size_text
from runner import ROOT

_MODES = ("dirty-log", "clear-log", "dirty-ring")
_MEMORY = (64, 256, 1024, 4096)  # MiB
_RINGS = (1024, 4096, 16384, 65536)  # entries
_VCPUS = (1, 2, 4, 8)
_ROUNDS, _ITERATIONS = 3, 8


def bench_processes(figures: Figures, c_test: str, iterations: int, rounds: int = 5) -> None:
    """Whole processes, one mode at a time, and the three modes over two workers against three in a row."""
    python = [sys.executable, "-m", "pytest", "-q", "selftests/matrix/test_dirty_log.py", f"--iterations={iterations}"]
    pinned = ["--guest-mode=48bit-4k", "--backing=anonymous", "--stop=cooperative", "--density=sparse", "--vcpus=1"]
    command = [*python, *pinned]
    own = [c_test, "-i", str(iterations), "-M"]

    def process(argv: list[str]) -> float:
        return timed(lambda: subprocess.run(argv, cwd=ROOT, stdout=subprocess.DEVNULL, check=False))

    for mode in _MODES:
        pairs = [(process([*command, f"--log-mode={mode}"]), process([*own, mode])) for _ in range(rounds)]
        figures.beside_c(f"process, {mode}", *map(list, zip(*pairs, strict=True)))
    together = [*command, f"--log-mode={','.join(_MODES)}", "-n", "2"]
    pairs = [(process(together), sum(process([*own, mode]) for mode in _MODES)) for _ in range(rounds)]
    figures.beside_c("process, the three modes, two workers", *map(list, zip(*pairs, strict=True)))


def bench_growth(figures: Figures) -> None:
    """Time a run as its memory, its vCPUs and its rings grow; how long a guest runs at least does not grow."""
    sizes = [size for size in _MEMORY if 2 * size * MIB <= available_memory()]
    for size in _MEMORY[len(sizes) :]:
        print(f"no room for {size_text(size * MIB)}: it is left out")
    for mode in ("dirty-log", "dirty-ring"):
        figures.growth(mode, "MiB", {size: _time(mode, memory=size * MIB) for size in sizes})
        figures.growth(mode, "vCPUs", {count: _time(mode, vcpus=count) for count in _VCPUS})
    figures.growth("dirty-ring", "entries", {count: _time("dirty-ring", ring=count) for count in _RINGS})


def _time(mode: str, memory: int = GIB // 4, vcpus: int = 1, ring: int = 65536) -> float:
    """How long a run takes, with its set-up, in seconds: the median of some rounds."""
    cell = Cell(mode, "48bit-4k", "anonymous", "cooperative", "sparse", vcpus)
    settings = Settings(iterations=_ITERATIONS, test_mem=memory, ring_count=ring)

    def run() -> None:
        with Kvm() as kvm, DirtyLogRun(kvm, cell, settings) as one:
            one.run()

    return statistics.median(timed(run) for _ in range(_ROUNDS))
