# SPDX-License-Identifier: GPL-2.0-only
"""KVM_PRE_FAULT_MEMORY in one thread, while its memslot is deleted, moved and toggled in another, loses no write."""

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dirty_tracking.cell import HANG_TIMEOUT
from dirty_tracking.report import DirtyReport
from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vcpu_thread import KICK_SIGNAL, VcpuHang
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util import uapi
from kvm_util.ioctl import KvmError
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB

pytestmark = pytest.mark.threads

SLOT = 1
NPAGES = 64 + 9
MOVED = FIRST_GPA + 4 * MIB
PAGES = [0, 5, 63, 70]
# The slot is moved, or gone; or a signal came
ALLOWED = (errno.EAGAIN, errno.ENOENT, errno.EINTR)
# A page is logged when it is pre-faulted, when it is written, and again after each change of its slot
MANY = 1000
# How often the pre-faulting thread gets a signal, in seconds
INTERRUPTED = 0.01


@contextmanager
def pre_faulting(vm: ScriptedVm, vcpu: int) -> Iterator[None]:
    """While the context lasts, one thread pre-faults both places of the slot again and again, and one sends it signals.

    KVM_PRE_FAULT_MEMORY retries until a signal comes when a change of memslots makes its root obsolete (before Linux 6.18 also
    when it deletes or moves the slot): kvm_tdp_map_page(), arch/x86/kvm/mmu/mmu.c. The change waits for that (SRCU).
    """
    ended, given_up, running, lock = threading.Event(), threading.Event(), True, threading.Lock()
    errors: list[BaseException] = []

    def pre_fault() -> None:
        nonlocal running
        try:
            while not ended.is_set():
                for gpa in (FIRST_GPA, MOVED):
                    try:
                        vm.vm.vcpus[vcpu].pre_fault_memory(gpa, NPAGES * PAGE)
                    except KvmError as error:
                        if error.errno not in ALLOWED:
                            raise
        except BaseException as error:  # noqa: BLE001 (the main thread raises it)
            errors.append(error)
        finally:
            with lock:
                running = False

    def interrupt() -> None:
        while not given_up.wait(INTERRUPTED):
            with lock:
                if not running:
                    return
                signal.pthread_kill(pre_faulter.ident or 0, KICK_SIGNAL)

    pre_faulter, interrupter = (threading.Thread(target=target, daemon=True) for target in (pre_fault, interrupt))
    before = signal.signal(KICK_SIGNAL, lambda _number, _frame: None)
    pre_faulter.start()
    try:
        interrupter.start()
        yield
    finally:
        ended.set()
        pre_faulter.join(HANG_TIMEOUT)
        given_up.set()
        if interrupter.ident is not None:
            interrupter.join()
        # The last signal may still be under way to a thread that hangs: its default action would end the process.
        if not pre_faulter.is_alive():
            signal.signal(KICK_SIGNAL, before)
    if errors:
        raise errors[0]
    if pre_faulter.is_alive():
        raise VcpuHang(f"KVM_PRE_FAULT_MEMORY does not return within {HANG_TIMEOUT:g} s, not even after signals")


@pytest.mark.log_modes("dirty-log", "dirty-ring")
@pytest.mark.usefixtures("prefault")
def test_prefault_beside_slot_changes(kvm: Kvm, log_mode: str, thorough: bool) -> None:
    """Writes to a memslot that is moved, recreated and toggled while it is pre-faulted are logged."""
    with ScriptedVm(kvm, log_mode, vcpus=2) as vm:
        memory = vm.add_slot(SLOT, FIRST_GPA, NPAGES).memory
        memory.populate()
        vm.map(MOVED, NPAGES)

        def collect() -> DirtyReport:
            # As while vCPUs run, where entries may follow the last one that was harvested: so may what is pre-faulted.
            report = vm.mode.collect(vm.vm, kick=lambda: None)
            report.check()
            return report

        def check(what: str) -> None:
            vm.write(SLOT, *PAGES, vcpu=1)
            report = collect()
            # KVM logs what it pre-faults, too: see test_prefaulted_pages_are_logged().
            vm.assert_report(what, {SLOT: report.dirty(SLOT) | set(PAGES)}, report, MANY)

        with pre_faulting(vm, vcpu=0):
            for _ in range(100 if thorough else 5):
                check("writes beside pre-faults")
                vm.vm.set_user_memory_region(SLOT, MOVED, memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
                check("writes after a move")
                vm.vm.delete_memory_region(SLOT)
                collect()
                vm.vm.set_user_memory_region(SLOT, FIRST_GPA, memory)
                vm.enable_dirty_logging(SLOT, assert_initial=False)
                check("writes after the slot was recreated and logged")
                vm.disable_dirty_logging(SLOT)
                collect()
                vm.enable_dirty_logging(SLOT, assert_initial=False)
                check("writes after dirty logging was toggled")
                vm.vm.delete_memory_region(SLOT)
                collect()
                vm.vm.set_user_memory_region(SLOT, FIRST_GPA, memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
        check("writes after the pre-faults")
