# SPDX-License-Identifier: GPL-2.0-only
"""GCOV's counters of KVM in the kernel that runs: how often each branch of its code was executed (docs/coverage.md)."""

import base64
import ctypes
import os
from collections.abc import Iterator

_DEBUGFS = "/sys/kernel/debug"
_GCOV = f"{_DEBUGFS}/gcov"


class NoCounters(Exception):
    """This kernel has no counters of KVM; the text says why."""


def kvm_counters() -> Iterator[tuple[str, str]]:
    """The counters of each object file of KVM that is loaded: the path that GCC gave its .gcda file, and its base64 text.

    :raises NoCounters: there are none
    """
    if not os.path.ismount(_DEBUGFS):
        ctypes.CDLL(None).mount(b"debugfs", _DEBUGFS.encode(), b"debugfs", 0, None)
    if not os.path.isdir(_GCOV):
        raise NoCounters(f"this kernel has no {_GCOV} (CONFIG_GCOV_KERNEL, CONFIG_DEBUG_FS, debugfs=on)")
    found = False
    for folder, _, names in os.walk(_GCOV):
        for name in names:
            # The kernel writes ~ for each .. of a path (get_link(), link_target(), kernel/gcov/fs.c).
            path = os.path.normpath(os.path.join(folder, name)[len(_GCOV) :].replace("/~", "/.."))
            if name.endswith(".gcda") and "/kvm/" in path:
                found = True
                with open(os.path.join(folder, name), "rb") as file:
                    yield path, base64.b64encode(file.read()).decode()
    if not found:
        raise NoCounters("KVM was built without counters (GCOV_PROFILE := y in arch/x86/kvm/Makefile)")
