# SPDX-License-Identifier: GPL-2.0-only
"""The guests of migrations and snapshots: most of their writes go to a few hot pages."""

import random
from array import array

from dirty_tracking.ring import ENTRY_SIZE
from dirty_tracking.vm import PAGE
from dirty_tracking.write_stream import WriteStream

WRITES = 4096
HOT = 16
RING = max(1024, PAGE // ENTRY_SIZE)


def streams(vcpus: int, npages: int, pattern: str, draw: random.Random) -> list[WriteStream]:
    """Writes of each vCPU: 9 in 10 to a few hot pages that all vCPUs share, the others to cold pages in *pattern* order."""
    hot = draw.sample(range(npages), HOT)
    result = []
    for vcpu in range(vcpus):
        cold = npages * vcpu // vcpus
        pages = array("I")
        for _ in range(WRITES):
            if draw.random() < 0.9:
                pages.append(draw.choice(hot))
            else:
                cold = (cold + 1) % npages if pattern == "sequential" else draw.randrange(npages)
                pages.append(cold)
        result.append(WriteStream(pages, 0))
    return result
