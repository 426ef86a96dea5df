# SPDX-License-Identifier: GPL-2.0-only
"""The order in which a vCPU writes the pages of the test memory, which the host knows completely.

A stream is an endless sequence of page numbers: a head, then a loop. The guest reads it as a table of addresses; the host
finds the page of any write by the write's index.
"""

import random
from array import array
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass

# Random writes before the stream repeats: as many as there are pages, within these bounds.
_MIN_RANDOM_WRITES, _MAX_RANDOM_WRITES = 1 << 14, 1 << 18


@dataclass(frozen=True)
class WriteStream:
    """Write *i* goes to page ``pages[i]``; from the end of *pages* the stream goes on at index *loop*."""

    pages: "array[int]"
    loop: int

    def between(self, first: int, end: int) -> "array[int]":
        """The pages of writes *first* to *end* - 1, in order."""
        length = len(self.pages)
        if end <= length:
            return self.pages[first:end]
        period = length - self.loop
        result = self.pages[first:length]
        index = max(first, length)
        while index < end:
            start = self.loop + (index - length) % period
            part = self.pages[start : start + end - index]
            result += part
            index += len(part)
        return result

    def written(self, first: int, end: int) -> "array[int]":
        """The pages of writes *first* to *end* - 1, each at least once (of several rounds, the last)."""
        pages = array("I")
        for start, stop in self._without_rounds(first, end):
            pages += self.between(start, stop)
        return pages

    def last_writes(self, pages: Set[int], first: int, end: int) -> dict[int, int]:
        """Those of *pages* to which writes *first* to *end* - 1 go, each with the index of the last of its writes."""
        last: dict[int, int] = {}
        for start, stop in self._without_rounds(first, end):
            last |= {page: write for write, page in enumerate(self.between(start, stop), start) if page in pages}
        return last

    def counts(self, pages: Set[int], first: int, end: int) -> Counter[int]:
        """How many of the writes *first* to *end* - 1 go to each of *pages*."""
        loop = len(self.pages) - self.loop
        rounds = max(0, end - max(first, self.loop)) // loop
        counts = Counter(filter(pages.__contains__, self.between(first, end - rounds * loop)))
        if rounds:
            for page, count in Counter(filter(pages.__contains__, self.pages[self.loop :])).items():
                counts[page] += rounds * count
        return counts

    def _without_rounds(self, first: int, end: int) -> list[tuple[int, int]]:
        """The writes *first* to *end* - 1 as ranges, without the loop's rounds but the last one."""
        tail = max(first, end - (len(self.pages) - self.loop))
        ranges = [(first, min(self.loop, tail)), (tail, end)]
        return [(start, stop) for start, stop in ranges if start < stop]

    def addresses(self, base: int, page_size: int) -> "array[int]":
        """The stream as the guest's table: the address of each write, page 0 being at *base*."""
        return array("Q", [base + page * page_size for page in self.pages])


def make_stream(pattern: str, npages: int, vcpu: int, vcpus: int, seed: int, multiple: int) -> WriteStream:
    """The stream of one vCPU over *npages* pages.

    Both patterns begin with the vCPU's share of one sweep over all pages, so that every page is written once.

    :param pattern: ``random``, or ``sequential`` for sweeps without end
    :param seed: with *vcpu*, decides the random pages
    :param multiple: head and loop are made a multiple of this many writes
    """
    start, end = npages * vcpu // vcpus, npages * (vcpu + 1) // vcpus
    if pattern == "sequential":
        pages = array("I", range(start, npages))
        pages.extend(range(start))
        while len(pages) % multiple or len(pages) < multiple:
            pages.extend(pages[: multiple - len(pages) % multiple])
        return WriteStream(pages, 0)
    draw = random.Random(f"{seed}/{vcpu}")
    sweep = array("I", range(start, end))
    sweep.extend(_random_pages(draw, npages, -len(sweep) % multiple))
    count = min(max(npages, _MIN_RANDOM_WRITES), _MAX_RANDOM_WRITES)
    return WriteStream(sweep + _random_pages(draw, npages, count + -count % multiple), len(sweep))


def sweep_length(npages: int, vcpus: int) -> int:
    """How many writes of each vCPU complete the first sweep."""
    return -(-npages // vcpus)


def _random_pages(draw: random.Random, npages: int, count: int) -> "array[int]":
    # Scaling 32 random bits is fast; for less than 2^32 pages it is uniform to one part in 2^32 / npages.
    bits = memoryview(draw.randbytes(4 * count)).cast("I")
    return array("I", [value * npages >> 32 for value in bits])
