# SPDX-License-Identifier: GPL-2.0-only
"""From this test on the kernel's KVM flushes no remote translations, so that a vCPU in its guest keeps those that it has.

test_check_kernel.py names it before tests that have to see that. Nothing collects it unless it is named.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from runner.guest_init import ORDERS
from selftests.unit.boot.kernel_code import RETURN_0, function_names, load_module, replace_function, unload_module

FLUSH = "kvm_flush_remote_tlbs"
# What it may be compiled into; the last two are those of 6.1
CALLERS = (
    "kvm_flush_remote_tlbs_range",
    "kvm_flush_remote_tlbs_memslot",
    "kvm_flush_remote_tlbs_with_address",
    "kvm_arch_flush_remote_tlbs_memslot",
)


def test_kvm_flushes_nothing_from_here_on(pytestconfig: pytest.Config) -> None:
    """kvm_flush_remote_tlbs() (virt/kvm/kvm_main.c) returns at once: KVM's module is loaded anew with it."""
    if os.getppid() != 1 or not Path(ORDERS).exists():
        pytest.fail("this test breaks the kernel: it runs only in one that was booted for it")
    modules = {
        Path(path).name: (Path(path), arguments) for path, arguments in json.loads(Path(ORDERS).read_text())["modules"]
    }
    keys: Any = pytestconfig.pluginmanager.get_plugin("static-keys")
    keys.release()
    for name in ("kvm_amd", "kvm"):
        unload_module(name)
    for name in ("kvm.ko", "kvm_amd.ko"):
        path, arguments = modules[name]
        module = bytearray(path.read_bytes())
        if name == "kvm.ko":
            names = function_names(module)
            for function in [FLUSH, *(name for name in CALLERS if name in names)]:
                replace_function(module, function, RETURN_0)
        load_module(bytes(module), arguments)
    keys.hold()
