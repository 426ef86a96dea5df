# SPDX-License-Identifier: GPL-2.0-only
"""A log mode of one's own: KVM_CLEAR_DIRTY_LOG for one bitmap word at a time, as QEMU clears in chunks."""

from collections.abc import Callable

from dirty_tracking.bitmap import BITS_PER_WORD, new_bitmap, set_pages
from dirty_tracking.modes import LOG_MODES, ClearLog, Collected
from kvm_util.vm import Memslot, Vm


class ClearLogByWord(ClearLog):
    """As clear-log, with a CLEAR for each 64 pages."""

    name = "clear-log-by-word"

    def collect_dirty_pages(self, vm: Vm, memslot: Memslot, kick: Callable[[], None], stopped: bool) -> Collected:
        if not stopped:
            kick()
        bitmap = new_bitmap(memslot.npages)
        vm.get_dirty_log(memslot.slot, bitmap)
        for first in range(0, memslot.npages, BITS_PER_WORD):
            word = bitmap[first // 8 : first // 8 + 8]
            if any(word):
                vm.clear_dirty_log(memslot.slot, word, first, min(BITS_PER_WORD, memslot.npages - first))
        return Collected([set_pages(bitmap)])


LOG_MODES[ClearLogByWord.name] = ClearLogByWord
