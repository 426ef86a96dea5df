# SPDX-License-Identifier: GPL-2.0-only
"""A log mode of one's own: KVM_CLEAR_DIRTY_LOG for one bitmap word at a time, as QEMU clears in chunks."""

from dirty_tracking.bitmap import BITS_PER_WORD
from dirty_tracking.modes import LOG_MODES, ClearLogMode
from kvm_util import Vm


class ClearLogByWord(ClearLogMode):
    """As clear-log, with a CLEAR for each 64 pages."""

    name = "clear-log-by-word"

    def _clear(self, vm: Vm, slot: int, bitmap: bytearray) -> None:
        npages = vm.memslots[slot].npages
        for first in range(0, npages, BITS_PER_WORD):
            word = bitmap[first // 8 : first // 8 + 8]
            if any(word):
                vm.clear_dirty_log(slot, word, first, min(BITS_PER_WORD, npages - first))


LOG_MODES[ClearLogByWord.name] = ClearLogByWord
