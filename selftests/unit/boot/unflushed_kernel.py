# SPDX-License-Identifier: GPL-2.0-only
"""A planted fault for a booted kernel: KVM flushes no remote TLBs, so that a vCPU in its guest keeps stale translations.

test_check_kernel.py names it before the tests that must notice. It is collected only if it is named.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from runner.guest_init import JOB
from selftests.unit.boot.kernel_code import RETURN_0, function_names, load_module, replace_function, unload_module

FLUSH = "kvm_flush_remote_tlbs"
# Functions that it may be inlined into; the last two are those of 6.1
CALLERS = (
    "kvm_flush_remote_tlbs_range",
    "kvm_flush_remote_tlbs_memslot",
    "kvm_flush_remote_tlbs_with_address",
    "kvm_arch_flush_remote_tlbs_memslot",
)


def test_disable_tlb_flushes(pytestconfig: pytest.Config) -> None:
    """Reload KVM's modules with a kvm_flush_remote_tlbs() (virt/kvm/kvm_main.c) that returns at once."""
    if os.getppid() != 1 or not Path(JOB).exists():
        pytest.fail("this test breaks the kernel: it runs only in one that was booted for it")
    modules = {
        Path(path).name: (Path(path), arguments) for path, arguments, _ in json.loads(Path(JOB).read_text())["modules"]
    }
    keys: Any = pytestconfig.pluginmanager.get_plugin("static-keys")
    keys.release()
    (vendor,) = {"kvm_amd.ko", "kvm_intel.ko"} & modules.keys()
    for name in (vendor, "kvm.ko"):
        unload_module(name.removesuffix(".ko"))
    for name in ("kvm.ko", vendor):
        path, arguments = modules[name]
        module = bytearray(path.read_bytes())
        if name == "kvm.ko":
            names = function_names(module)
            for function in [FLUSH, *(name for name in CALLERS if name in names)]:
                replace_function(module, function, RETURN_0)
        load_module(bytes(module), arguments)
    keys.hold()
