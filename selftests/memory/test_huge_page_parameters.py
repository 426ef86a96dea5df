# SPDX-License-Identifier: GPL-2.0-only
"""Parameters of KVM that concern huge pages are changed while a VM exists: its reports stay exact."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dirty_tracking.mapping_sizes import huge_pages
from dirty_tracking.scripted_vm import Operation
from kvm_util.arch import current as arch
from kvm_util.binary_stats import BinaryStats
from kvm_util.host import Host
from selftests.memory.huge_memory import (
    SLOT,
    MakeHugeVm,
    OpenStats,
    check_sizes,
    edges,
    few_huge_pages,
    inside,
    touched,
)

pytestmark = pytest.mark.disposable_kernel

LAYOUT = few_huge_pages("anonymous_thp", 3)
DEADLINE = 30.0


@contextmanager
def kvm_parameters(**values: str) -> Iterator[None]:
    """Parameters of the module kvm have other values in the context; skips where KVM lacks one."""
    files = {Path("/sys/module/kvm/parameters") / name: value for name, value in values.items()}
    if missing := [file.name for file in files if not file.exists()]:
        pytest.skip(f"this KVM has no parameter {missing[0]}")
    before: dict[Path, str] = {}
    try:
        try:
            for file, value in files.items():
                old = file.read_text()
                file.write_text(value)
                before[file] = old
        except PermissionError:
            pytest.skip("KVM does not let its parameters be changed (kvm.nx_huge_pages=never is for good)")
        yield
    finally:
        for file, value in before.items():
            file.write_text(value)


@pytest.mark.parametrize("eager", ["Y", "N"])
def test_eager_page_split_changed(make_huge_vm: MakeHugeVm, open_stats: OpenStats, host: Host, eager: str) -> None:
    """Huge pages are split as kvm.eager_page_split says when logging is enabled, and reports are exact if it changes then."""
    with make_huge_vm(LAYOUT) as vm, open_stats(vm) as stats:
        with kvm_parameters(eager_page_split=eager):
            check_sizes(vm, stats, replace(host, parameters=host.parameters | {"kvm.eager_page_split": eager}), LAYOUT)
            vm.write(SLOT, *touched(vm, LAYOUT))
            vm.enable_dirty_logging(SLOT, assert_initial=False)
        with kvm_parameters(eager_page_split="N" if eager == "Y" else "Y"):
            if vm.mode.initially_set:
                vm.assert_dirty("enabling dirty logging", {SLOT: range(LAYOUT.npages)})
            for pages in (edges(vm, LAYOUT), touched(vm, LAYOUT)):
                vm.write(SLOT, *pages)
                vm.assert_dirty("writes after the parameter changed", {SLOT: pages})


@pytest.mark.threads  # KVM's: on a CPU of its own the recovery zaps while the vCPU is in the guest
def test_nx_huge_page_recovery(make_huge_vm: MakeHugeVm, open_stats: OpenStats) -> None:
    """Writes are logged exactly when KVM splits huge pages that are executed, and its recovery thread zaps these mappings."""
    # The recovery is off with the ratio 0; with 1 each period zaps all.
    off = {"nx_huge_pages": "force", "nx_huge_pages_recovery_period_ms": "1", "nx_huge_pages_recovery_ratio": "0"}
    with kvm_parameters(**off), make_huge_vm(LAYOUT) as vm, open_stats(vm) as stats:
        code = [inside(page) for page in huge_pages(vm.vm.memslots[SLOT], LAYOUT.size)]
        pages, ret = sorted({*code, *edges(vm, LAYOUT)}), int.from_bytes(arch.RETURN_INSTRUCTION, "little")
        execute = [Operation("execute", vm.address(SLOT, page)) for page in code]
        vm.write(SLOT, *code, value=ret)
        vm.run(*execute)
        assert stats.value("nx_lpage_splits"), "no huge page was split, although pages in it were executed"
        with kvm_parameters(nx_huge_pages_recovery_ratio="1"):
            for _ in range(3):
                wait_for_recovery(stats)
                vm.run(*execute)
                vm.enable_dirty_logging(SLOT)
                for _ in range(2):
                    vm.write(SLOT, *pages, value=ret)
                    # A page that is zapped before its store is repeated is pushed to a ring again.
                    vm.assert_dirty("writes beside the recovery", {SLOT: pages}, len(pages))
                vm.disable_dirty_logging(SLOT)


def wait_for_recovery(stats: BinaryStats) -> None:
    """Wait until KVM has zapped all mappings that it split because they were executed."""
    until = time.monotonic() + DEADLINE
    while left := stats.value("nx_lpage_splits"):
        assert time.monotonic() < until, f"KVM did not recover {left} huge pages within {DEADLINE:g} s"
