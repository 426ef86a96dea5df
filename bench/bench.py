# SPDX-License-Identifier: GPL-2.0-only
"""Times the suite's inner loops beside the same loops in C, and its runs beside the kernel's own C test.

``make bench`` prints both figures and their ratio, the median of several rounds that alternate between the two, and how the
time of a run grows; with ``C_TEST=<path of a built dirty_log_test>`` it compares whole processes too. Nothing here judges.
"""

import argparse
import shutil
import sys

from bench.figures import Figures
from bench.inner_loops import bench_harvest, bench_oracle, bench_real_harvest, bench_verify, build_loops
from bench.runs import bench_growth, bench_processes
from kvm_util import guest_program
from kvm_util.kvm import Kvm, KvmUnavailable


def main() -> None:
    """Run the benchmarks that the command line asks for."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--c-test", metavar="PATH", help="a built dirty_log_test to compare whole processes with")
    parser.add_argument("--iterations", type=int, default=32, help="of the whole runs beside the C test")
    parser.add_argument("--keep", action="store_true", help="keep the figures in bench/figures.json")
    arguments = parser.parse_args()
    if reason := _why_not(arguments):
        sys.exit(f"bench: {reason}")
    loops = build_loops()
    figures = Figures()
    bench_verify(figures, loops, arguments.rounds)
    bench_harvest(figures, loops, arguments.rounds)
    bench_real_harvest(figures, loops, arguments.rounds)
    bench_oracle(figures)
    bench_growth(figures)
    if arguments.c_test:
        bench_processes(figures, arguments.c_test, arguments.iterations)
    if arguments.keep:
        figures.keep()


def _why_not(arguments: argparse.Namespace) -> str | None:
    """What a benchmark would miss after a minute of others."""
    if arguments.rounds < 1 or arguments.iterations < 1:
        return "--rounds and --iterations must be at least 1"
    if arguments.c_test and not shutil.which(arguments.c_test):
        return f"--c-test: {arguments.c_test} is no program that can be run (C_TEST=<path of a built dirty_log_test>)"
    if not shutil.which("gcc"):
        return "no gcc on this machine to compile bench/loops.c with: install it (apt install gcc)"
    try:
        Kvm().close()
        guest_program.assemble_all()
    except (KvmUnavailable, guest_program.GuestProgramError) as error:
        return str(error)
    return None


if __name__ == "__main__":
    main()
