# SPDX-License-Identifier: GPL-2.0-only
"""Times the suite's inner loops beside the same loops in C, and its runs beside the kernel's own C test.

``make bench`` prints both figures and their ratio, each the median of several rounds that alternate between the two; with
``C_TEST=<path of a built dirty_log_test>`` it compares whole processes too. Nothing here judges.
"""

import argparse
import ctypes
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from dirty_tracking.judge import Judge
from dirty_tracking.ledger import Collection, Ledger, SlotPages, Toggle
from dirty_tracking.memory_check import WORDS_PER_PAGE, MemoryCheck
from dirty_tracking.modes import set_dirty_logging
from dirty_tracking.vm import PAGE
from dirty_tracking.write_stream import WriteStream
from kvm_util import guest_program, uapi
from kvm_util.arch import current as arch
from kvm_util.kvm import Kvm, KvmUnavailable
from kvm_util.memory import BACKINGS, GIB, GuestMemory

ROOT = Path(__file__).resolve().parent.parent
RING_ENTRIES = 65536
DIRTY_PAGES = 2000
MODES = ("dirty-log", "clear-log", "dirty-ring")


def main() -> None:
    """Run the benchmarks that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--c-test", metavar="PATH", help="a built dirty_log_test to compare whole processes with")
    parser.add_argument("--iterations", type=int, default=32)
    arguments = parser.parse_args()
    if reason := _why_not(arguments):
        sys.exit(f"bench: {reason}")
    loops = build_loops()
    print(f"{os.uname().release}, {arch.cpu_model()}")
    print(f"{'':44}{'suite':>12}{'C':>12}{'ratio':>8}")
    bench_verify(loops, arguments.rounds)
    bench_harvest(loops, arguments.rounds)
    if arguments.c_test:
        bench_processes(arguments.c_test, arguments.iterations)


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


def build_loops() -> ctypes.CDLL:
    """Compile ``loops.c`` with optimization and load it."""
    library = ROOT / "build" / "bench_loops.so"
    library.parent.mkdir(exist_ok=True)
    source = ROOT / "bench" / "loops.c"
    subprocess.run(["gcc", "-O2", "-Wall", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    loops = ctypes.CDLL(str(library))
    loops.verify.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_size_t, ctypes.c_void_p]
    loops.verify.restype = ctypes.c_size_t
    loops.harvest.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
    loops.harvest.restype = ctypes.c_size_t
    return loops


def show(what: str, suite: list[float], c: list[float]) -> None:
    """A line with both medians and the median of the ratios, round by round."""
    ratio = statistics.median(ours / theirs for ours, theirs in zip(suite, c, strict=True))
    print(f"{what:44}{statistics.median(suite) * 1e3:9.2f} ms{statistics.median(c) * 1e3:9.2f} ms{ratio:8.2f}")


def timed(call: Callable[[], object]) -> float:
    """How long *call* takes, in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bench_verify(loops: ctypes.CDLL, rounds: int) -> None:
    """Verify a 1 GiB slot in which 2000 pages are dirty: reports and values."""
    memory = GuestMemory(BACKINGS["anonymous"], GIB, 0)
    memory.populate()
    npages = GIB // PAGE
    draw = random.Random(1)
    pages = array("I", [draw.randrange(npages) for _ in range(DIRTY_PAGES * (rounds + 1))])
    streams = [WriteStream(pages, 0)]
    ledger = Ledger(streams, [SlotPages(1, 0, npages)], per_vcpu=False, initially_set=False)
    ledger.record(Toggle(0, 1, [0], [0], [True], slot=1, on=True))
    judge, check = Judge(ledger), MemoryCheck(npages, streams, memory.words)
    expected = array("Q", bytes(8 * npages))
    dirty = ctypes.c_size_t()
    suite, c = [], []
    for number in range(rounds):
        done = (number + 1) * DIRTY_PAGES
        written = pages[done - DIRTY_PAGES : done]
        bitmap = array("Q", bytes(npages // 8))
        for value, page in enumerate(written, done - DIRTY_PAGES + 1):
            memory.words[page * WORDS_PER_PAGE] = expected[page] = value
            bitmap[page // 64] |= 1 << page % 64
        reported = [sorted(set(written))]
        one = Collection(2 * number + 2, 2 * number + 3, [done], [done], [True], last=npages, reported=reported)

        def in_python(one: Collection = one, number: int = number, done: int = done) -> None:
            ledger.record(one)
            if judge.verify() or check.check(number, [done]):
                raise AssertionError

        def in_c(bitmap: "array[int]" = bitmap) -> None:
            addresses = (memory.hva, bitmap.buffer_info()[0], expected.buffer_info()[0])
            if loops.verify(*addresses, npages, ctypes.byref(dirty)):
                raise AssertionError

        # In turn, since whoever comes second finds the pages' first lines in the cache.
        turns: list[tuple[Callable[[], None], list[float]]] = [(in_python, suite), (in_c, c)]
        for call, times in turns if number % 2 else reversed(turns):
            times.append(timed(call))
    show(f"verify 1 GiB with {DIRTY_PAGES} dirty pages", suite, c)
    memory.close()


def bench_harvest(loops: ctypes.CDLL, rounds: int) -> None:
    """Harvest a full ring of the largest size, filled by a guest."""
    cell = Cell("dirty-ring", "48bit-4k", "anonymous", "cooperative", "sparse", 1)
    slots, offsets = array("I", bytes(4 * RING_ENTRIES)), array("Q", bytes(8 * RING_ENTRIES))
    suite, c = [], []
    with Kvm() as kvm, DirtyLogRun(kvm, cell, Settings(ring_count=RING_ENTRIES)) as run:
        (vcpu,) = run.vm.vcpus
        run.guest.run_until_ucall(vcpu)
        set_dirty_logging(run.vm, run.memslot.slot, on=True)
        (ring,) = run.mode.rings(run.vm)
        for number in range(2 * rounds):
            while vcpu.run.exit_reason != uapi.KVM_EXIT_DIRTY_RING_FULL:
                vcpu.kvm_run()
            if number % 2:
                addresses = (slots.buffer_info()[0], offsets.buffer_info()[0])
                start = time.perf_counter()
                count = loops.harvest(ring.address, RING_ENTRIES, ring.next, *addresses)
                c.append(time.perf_counter() - start)
                ring.next += count
            else:
                start = time.perf_counter()
                count = len(ring.harvest()[0])
                suite.append(time.perf_counter() - start)
            if run.vm.reset_dirty_rings() != count:
                raise AssertionError
            vcpu.kvm_run()
    show(f"harvest a full ring of {RING_ENTRIES} entries", suite, c)


def bench_processes(c_test: str, iterations: int, rounds: int = 5) -> None:
    """Whole processes, one mode at a time, and the three modes over two workers against three in a row."""
    python = [sys.executable, "-m", "pytest", "-q", "selftests/matrix/test_dirty_log.py", f"--iterations={iterations}"]
    pinned = ["--guest-mode=48bit-4k", "--backing=anonymous", "--stop=cooperative", "--density=sparse", "--vcpus=1"]
    command = [*python, *pinned]
    own = [c_test, "-i", str(iterations), "-M"]

    def process(argv: list[str]) -> float:
        return timed(lambda: subprocess.run(argv, cwd=ROOT, stdout=subprocess.DEVNULL, check=False))

    for mode in MODES:
        pairs = [(process([*command, f"--log-mode={mode}"]), process([*own, mode])) for _ in range(rounds)]
        show(f"process, {mode}", *map(list, zip(*pairs, strict=True)))
    together = [*command, f"--log-mode={','.join(MODES)}", "-n", "2"]
    pairs = [(process(together), sum(process([*own, mode]) for mode in MODES)) for _ in range(rounds)]
    show("process, the three modes, two workers", *map(list, zip(*pairs, strict=True)))


if __name__ == "__main__":
    main()
