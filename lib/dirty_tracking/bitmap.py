# SPDX-License-Identifier: GPL-2.0-only
"""Dirty bitmaps as KVM_GET_DIRTY_LOG fills them: little-endian 64-bit words, bit 0 of word 0 the slot's first page."""

from collections.abc import Iterable

BITS_PER_WORD = 64
_ALL_ONES = (1 << BITS_PER_WORD) - 1
_BITS_OF_BYTE = [tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256)]


def new_bitmap(npages: int) -> bytearray:
    """A zeroed bitmap for *npages* pages: KVM writes whole words, so the size is rounded up to them."""
    return bytearray(-(-npages // BITS_PER_WORD) * 8)


def bitmap_of(pages: Iterable[int], npages: int, first: int = 0) -> bytearray:
    """A bitmap for *npages* pages, the first of them page *first*, in which *pages* are set."""
    bitmap = new_bitmap(npages)
    for page in pages:
        bitmap[(page - first) // 8] |= 1 << (page - first) % 8
    return bitmap


def set_pages(bitmap: bytearray) -> list[int]:
    """The numbers of the pages whose bit is set, ascending."""
    pages: list[int] = []
    for index, word in enumerate(memoryview(bitmap).cast("Q")):
        if word == _ALL_ONES:
            pages.extend(range(index * BITS_PER_WORD, (index + 1) * BITS_PER_WORD))
        elif word:
            for position, byte in enumerate(word.to_bytes(8, "little")):
                if byte:
                    base = index * BITS_PER_WORD + position * 8
                    pages.extend([base + bit for bit in _BITS_OF_BYTE[byte]])
    return pages
