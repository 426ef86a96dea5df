# SPDX-License-Identifier: GPL-2.0-only
"""The suite's inner loops beside the same loops in C (``loops.c``)."""

import ctypes
import mmap
import random
import struct
import subprocess
from array import array
from collections.abc import Callable, Sequence

from bench.figures import Figures, timed
from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from dirty_tracking.judge import Judge
from dirty_tracking.ledger import Collection, Ledger, SlotPages, Toggle
from dirty_tracking.memory_check import WORDS_PER_PAGE, MemoryCheck
from dirty_tracking.modes import set_dirty_logging
from dirty_tracking.ring import ENTRY_SIZE, DirtyRing
from dirty_tracking.vm import PAGE
from dirty_tracking.write_stream import WriteStream, make_stream
from kvm_util import uapi
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS, GIB, GuestMemory
from runner import ROOT

_RING = 65536
_DIRTY_PAGES = 2000
_ORACLE_ROUNDS = 5


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


def bench_verify(figures: Figures, loops: ctypes.CDLL, rounds: int) -> None:
    """Verify a 1 GiB slot in which 2000 pages are dirty: reports and values."""
    memory = GuestMemory(BACKINGS["anonymous"], GIB, 0)
    memory.populate()
    npages = GIB // PAGE
    draw = random.Random(1)
    pages = array("I", [draw.randrange(npages) for _ in range(_DIRTY_PAGES * (rounds + 1))])
    streams = [WriteStream(pages, 0)]
    ledger = Ledger(streams, [SlotPages(1, 0, npages)], per_vcpu=False, initially_set=False)
    ledger.record(Toggle(0, 1, [0], [0], [True], slot=1, on=True))
    judge, check = Judge(ledger), MemoryCheck(npages, streams, memory.words)
    expected = array("Q", bytes(8 * npages))
    dirty = ctypes.c_size_t()
    suite: list[float] = []
    c: list[float] = []
    for number in range(rounds):
        done = (number + 1) * _DIRTY_PAGES
        written = pages[done - _DIRTY_PAGES : done]
        bitmap = array("Q", bytes(npages // 8))
        for value, page in enumerate(written, done - _DIRTY_PAGES + 1):
            memory.words[page * WORDS_PER_PAGE] = expected[page] = value
            bitmap[page // 64] |= 1 << page % 64
        reported: list[Sequence[int]] = [sorted(set(written))]
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
    figures.beside_c(f"verify 1 GiB with {_DIRTY_PAGES} dirty pages", suite, c)
    memory.close()


class _CRing:
    """A ring of :data:`_RING` entries that C harvests, and what it harvested."""

    def __init__(self, loops: ctypes.CDLL, ring: DirtyRing) -> None:
        self._loops = loops
        self._ring = ring
        self._slots, self._offsets = array("I", bytes(4 * _RING)), array("Q", bytes(8 * _RING))

    def harvest(self) -> int:
        """Harvest all dirty entries; returns how many there were."""
        addresses = (self._slots.buffer_info()[0], self._offsets.buffer_info()[0])
        count: int = self._loops.harvest(self._ring.address, _RING, self._ring.next, *addresses)
        self._ring.next += count
        return count


def bench_harvest(figures: Figures, loops: ctypes.CDLL, rounds: int) -> None:
    """Harvest a ring in plain memory with as many entries as a full one, a usual one, and one of an idle guest."""
    memory = mmap.mmap(-1, _RING * ENTRY_SIZE)
    ring = DirtyRing(memory)
    c_ring = _CRing(loops, ring)
    draw = random.Random(1)
    for entries in (_RING, _DIRTY_PAGES, 10):
        dirty = uapi.KVM_DIRTY_GFN_F_DIRTY
        filled = b"".join(struct.pack("=IIQ", dirty, 1, draw.randrange(1 << 18)) for _ in range(entries))
        suite: list[float] = []
        c: list[float] = []
        for number in range(2 * rounds):
            memory[: len(filled)] = filled
            ring.next = 0
            (c if number % 2 else suite).append(timed(c_ring.harvest if number % 2 else ring.harvest))
            if ring.next != entries:
                raise AssertionError
        figures.beside_c(f"harvest {entries} entries", suite, c)
    ring.close()


def bench_real_harvest(figures: Figures, loops: ctypes.CDLL, rounds: int) -> None:
    """Harvest a full ring of the largest size, filled by a guest."""
    cell = Cell("dirty-ring", "48bit-4k", "anonymous", "cooperative", "sparse", 1)
    suite: list[float] = []
    c: list[float] = []
    with Kvm() as kvm, DirtyLogRun(kvm, cell, Settings(ring_count=_RING)) as run:
        (vcpu,) = run.vm.vcpus
        run.guest.run_until_ucall(vcpu)
        set_dirty_logging(run.vm, run.memslot.slot, on=True)
        (ring,) = run.mode.rings(run.vm)
        c_ring = _CRing(loops, ring)
        for number in range(2 * rounds):
            while vcpu.run.exit_reason != uapi.KVM_EXIT_DIRTY_RING_FULL:
                vcpu.kvm_run()
            begin = ring.next
            (c if number % 2 else suite).append(timed(c_ring.harvest if number % 2 else ring.harvest))
            if run.vm.reset_dirty_rings() != ring.next - begin:
                raise AssertionError
            vcpu.kvm_run()
    figures.beside_c(f"harvest a full ring of KVM's, {_RING} entries", suite, c)


def bench_oracle(figures: Figures) -> None:
    """Judge collections of many random writes to 1 GiB, from a bitmap and from a ring."""
    npages = GIB // PAGE
    stream = make_stream("random", npages, 0, 1, 1, 1)
    for ring in (False, True):
        ledger = Ledger([stream], [SlotPages(1, 0, npages)], per_vcpu=ring, initially_set=False)
        ledger.record(Toggle(0, 1, [0], [0], [True], slot=1, on=True))
        judge, times = Judge(ledger), []
        before = 0
        for number in range(1, _ORACLE_ROUNDS + 2):
            done = before + (_RING if before else stream.loop)  # first the sweep, which is not random
            written = stream.between(before, done)
            before = done
            # KVM logs a page once until it is reset.
            reported = array("Q", dict.fromkeys(written)) if ring else sorted(set(written))
            one = Collection(2 * number, 2 * number + 1, [done], [done], [True], last=npages, reported=[reported])
            one.reset = len(reported)
            ledger.record(one)

            def verify(judge: Judge = judge) -> None:
                if judge.verify():
                    raise AssertionError

            times.append(timed(verify))
        figures.per_unit(f"judge {_RING} writes, {'ring' if ring else 'bitmap'}", min(times[1:]), _RING)
