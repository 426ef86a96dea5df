# SPDX-License-Identifier: GPL-2.0-only
"""Compares a slot's memory with what the vCPUs wrote to it: each vCPU has a word of its own in every page."""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence

from dirty_tracking.violations import Kind, Violation
from dirty_tracking.write_stream import WriteStream
from kvm_util.memory import HOST_PAGE_SIZE
from kvm_util.wording import counted

WORDS_PER_PAGE = HOST_PAGE_SIZE // 8


def writes_done(stream: WriteStream, published: int, value: Callable[[int], int]) -> int:
    """How many writes a vCPU that is out of its guest has done: *published*, and one more when its value is in memory.

    :param value: the vCPU's word in a page
    """
    next_page = stream.between(published, published + 1)[0]
    return published + (value(next_page) == published + 1)


class MemoryCheck:
    """Checks the words of the *npages* pages of a slot; vCPU *v* writes word *v* of a page, with the number of its write.

    :param streams: what each vCPU writes
    :param words: the slot's memory as 64-bit words
    """

    def __init__(self, npages: int, streams: Sequence[WriteStream], words: memoryview) -> None:
        self._npages = npages
        self._streams = streams
        self._words = words
        self._expected = [array("Q", bytes(8 * npages)) for _ in streams]
        self._checked_writes = [0 for _ in streams]
        self._iteration_ends: list[list[int]] = [[] for _ in streams]

    def check(self, iteration: int, done: Sequence[int]) -> list[Violation]:
        """Check every page's words after an iteration (R11), with all vCPUs stopped and *done* from :func:`writes_done`."""
        found = []
        for vcpu, stream in enumerate(self._streams):
            expected = self._expected[vcpu]
            first = self._checked_writes[vcpu]
            for value, page in enumerate(stream.between(first, done[vcpu]), first + 1):
                expected[page] = value
            self._checked_writes[vcpu] = done[vcpu]
            self._iteration_ends[vcpu].append(done[vcpu])
            # Comparing two views of 64-bit words is a loop in C without a copy: as fast as memory allows.
            actual = self._words[vcpu::WORDS_PER_PAGE]
            if actual != memoryview(expected):
                wrong = [page for page in range(self._npages) if actual[page] != expected[page]]
                detail = f"{counted(len(wrong), 'page')}; " + "; ".join(
                    f"page {page} expected {self._value_text(vcpu, expected[page])}"
                    f" found {self._value_text(vcpu, actual[page])}"
                    for page in wrong[:8]
                )
                found.append(Violation(Kind.VALUE, detail, None, tuple(wrong), vcpu, iteration, rule="R11"))
        return found

    def last_writes(self, page: int) -> str:
        """Which vCPU wrote *page* last, and in which iteration, up to the last check."""
        writes = [
            f"write {column[page]} of vCPU {vcpu} (iteration {self._iteration_of(vcpu, column[page])})"
            for vcpu, column in enumerate(self._expected)
            if column[page]
        ]
        return f"last written by {', '.join(writes) or 'nobody'}"

    def _value_text(self, vcpu: int, value: int) -> str:
        iteration = self._iteration_of(vcpu, value)
        return f"{value} (iteration {iteration})" if iteration else f"{value:#x}"

    def _iteration_of(self, vcpu: int, value: int) -> int:
        """The iteration in which *vcpu* wrote *value*; 0 if it has not yet."""
        ends = self._iteration_ends[vcpu]
        index = bisect_left(ends, value)
        return index + 1 if value and index < len(ends) else 0
