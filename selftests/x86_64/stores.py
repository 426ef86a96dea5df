# SPDX-License-Identifier: GPL-2.0-only
"""The stores and accesses that only x86 has, for the tests in memory/test_writes.py."""

from dirty_tracking.scripted_vm import Operation
from selftests.stores import Store

STORES = [
    Store("store_nontemporal", 8),
    Store("store_nontemporal_16", 16, aligned=True),
    Store("push", 8),
    Store("call", 8),
    Store("rep_stosb", 100, count=100, writes=100),
    Store("rep_stosq", 800, count=100, writes=100),
    Store("fxsave", 512),
    Store("add", 8),
    Store("lock_add", 8),
    Store("xchg", 8),
    Store("bts", 8, value=3),
    Store("cmpxchg", 8, exchanges=True),
    Store("lock_cmpxchg", 8, exchanges=True),
    Store("lock_cmpxchg16b", 16, aligned=True, exchanges=True),
    Store("sgdt", 10),
]
FAULTING = {
    "locked-add": Operation("lock_add", 0, 1),
    "compare-and-exchange": Operation("lock_cmpxchg", 0, 1, 77),
    "push": Operation("push", 0, 1),
    "string-store": Operation("rep_stosq", 0, 1, 4),
}
NON_WRITING = ["clflush", "test", "store_nothing"]
