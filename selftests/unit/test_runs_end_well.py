# SPDX-License-Identifier: GPL-2.0-only
"""Whatever goes wrong, a run ends with a clear report and leaks no thread, VM, file or memory."""

import errno
import gc
import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from dirty_tracking import writers
from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from dirty_tracking.modes import LOG_MODES, BitmapMode, smallest_ring
from dirty_tracking.ring import DirtyRing
from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vcpu_thread import VcpuHang
from dirty_tracking.violations import ContractViolation, Kind
from kvm_util.arch import current as arch
from kvm_util.guest import GuestError
from kvm_util.ioctl import KvmError
from kvm_util.kept_memory import KeptMemory
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB, GuestMemory
from kvm_util.vm import Vm
from selftests.unit.mutants.faults import falsify_bitmaps

SETTINGS = Settings(iterations=3, interval=1.0, ring_count=1024, test_mem=2 * MIB, seed=1)
UD2 = b"\x0f\x0b"
SPIN = b"\xeb\xfe"
STORE_TO_0X10 = bytes.fromhex("48 89 04 25 10 00 00 00")


def cell(mode: str = "dirty-log", vcpus: int = 1, stop: str = "cooperative") -> Cell:
    return Cell(mode, "48bit-4k", "anonymous", stop, "sparse", vcpus)


def replace_code(run: DirtyLogRun, code: bytes, symbol: str = "sparse_writes") -> int:
    """Replace the guest's code at *symbol*; returns its address."""
    address = run.guest.program.symbols[symbol]
    run.guest.memory(address, len(code))[:] = code
    return address


def open_files() -> list[str]:
    return sorted(str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.exists())


def resident_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def _no_leaks() -> object:
    """Check after each test that it has left no thread and no open file."""
    files, threads = open_files(), threading.active_count()
    yield
    gc.collect()
    assert threading.active_count() == threads
    assert open_files() == files


@pytest.mark.slow
def test_no_leaks_after_120_runs(kvm: Kvm) -> None:
    """A hundred and twenty runs over all modes, some of them failing, leak neither files nor threads nor memory."""
    modes = [name for name, mode in LOG_MODES.items() if mode.supported(kvm) is None]

    def one_run(number: int) -> None:
        with DirtyLogRun(kvm, cell(modes[number % len(modes)], vcpus=1 + number % 2), SETTINGS) as run:
            if number % 10 == 9:
                replace_code(run, UD2)
                with pytest.raises(GuestError):
                    run.run()
            else:
                run.run()

    for number in range(20):
        one_run(number)
    gc.collect()
    before, files = resident_memory(), open_files()
    for number in range(100):
        one_run(number)
    gc.collect()
    assert open_files() == files
    # 100 leaked VMs of this size would be 200 MiB of test memory alone.
    assert resident_memory() - before < 20 * MIB


def test_runs_on_kept_memory(kvm: Kvm) -> None:
    """A run on the memory of another one, which passed or failed, in the same mode or another, passes."""
    modes = [name for name, mode in LOG_MODES.items() if mode.supported(kvm) is None]
    addresses = set()
    with KeptMemory() as memory:
        for number, mode in enumerate([*modes, *modes[:1]]):
            with DirtyLogRun(kvm, cell(mode), SETTINGS, memory) as run:
                addresses.add(run.memslot.memory.hva)
                run.run()
            with DirtyLogRun(kvm, cell(mode, vcpus=2), replace(SETTINGS, seed=number), memory) as run:
                addresses.add(run.memslot.memory.hva)
                replace_code(run, UD2)
                with pytest.raises(GuestError):
                    run.run()
    assert len(addresses) == 1


@pytest.mark.parametrize(
    ("code", "vcpus", "error", "report"),
    [
        (UD2, 1, GuestError, "dirty_writer took #UD invalid opcode"),
        (STORE_TO_0X10, 1, GuestError, r"#PF page fault.*write of 0x10 \(not mapped\)"),
        (SPIN, 1, VcpuHang, r"no progress in 0.5 s of writing; writes published[\s\S]*rip=0*{address:x}"),
        (SPIN, 2, VcpuHang, r"no progress in 0.5 s of writing; writes published[\s\S]*rip=0*{address:x}"),
    ],
)
def test_guest_that_stops_writing(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch, code: bytes, vcpus: int, error: type[Exception], report: str
) -> None:
    """A guest's exception in the middle of its writes, or its spinning, is reported with its cause and the registers."""
    monkeypatch.setattr(writers, "HANG_TIMEOUT", 0.5)
    with DirtyLogRun(kvm, cell(vcpus=vcpus), SETTINGS) as run:
        address = replace_code(run, code)
        with pytest.raises(error, match=report.format(address=address)):
            run.run()


def test_one_hung_vcpu_of_two(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hung vCPU is reported although the other one makes progress."""
    monkeypatch.setattr(writers, "HANG_TIMEOUT", 0.5)
    with DirtyLogRun(kvm, cell(vcpus=2), SETTINGS) as run:
        block = arch.get_regs(run.guest.vm.vcpus[1].fd).rdi
        run.guest.memory(block + run.guest.program.symbols["BLOCK_SPARSE"], 8).cast("Q")[0] = 0
        address = replace_code(run, SPIN, "dense_writes")
        with pytest.raises(VcpuHang, match=rf"vCPU 1: [\s\S]*rip=0*{address:x}"):
            run.run()


def test_vcpu_ignores_the_stop_flag(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that ignores the stop flag is reported as hung, and its thread still ends."""
    monkeypatch.setattr(writers, "HANG_TIMEOUT", 0.5)
    with DirtyLogRun(kvm, cell(), SETTINGS) as run:
        monkeypatch.setattr(run.writers, "set_stop_flags", lambda stop: replace_code(run, SPIN) if stop else None)
        with pytest.raises(VcpuHang, match=r"no progress in 0\.5 s of stopping"):
            run.run()


def test_finding_with_a_hung_thread(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a thread hangs after a finding, the finding is raised, with the hang as a note."""
    monkeypatch.setattr(writers, "_JOIN_TIMEOUT", 0.2)
    falsify_bitmaps(monkeypatch, lambda _vm, _slot, bitmap: bitmap.__setitem__(slice(None), bytes(len(bitmap))))
    over = threading.Event()
    run = DirtyLogRun(kvm, cell(), SETTINGS)
    helper = HangingHelper(target=over.wait, name="to hang")
    run.writers.helpers.append(helper)
    helper.start()
    try:
        with pytest.raises(ContractViolation, match="LOST") as caught:
            run.run()
    finally:
        over.set()
        helper.join()
        run.close()
    assert any("'to hang'" in note and "did not end within 0.2 s" in note for note in caught.value.__notes__)


class HangingHelper(threading.Thread):
    failure: BaseException | None = None

    def quit(self) -> None:
        """Ignore the request."""


@pytest.mark.log_modes("dirty-log", "dirty-ring")
def test_error_in_a_vcpu_thread(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """An exception in a vCPU thread reaches the caller with its own traceback."""

    def dies(*_: object) -> None:
        raise RuntimeError("the vCPU thread's own error")

    with DirtyLogRun(kvm, cell(log_mode, vcpus=2), SETTINGS) as run:
        monkeypatch.setattr(run.mode, "after_vcpu_run", dies)
        with pytest.raises(RuntimeError, match="own error") as error:
            run.run()
        assert any(entry.name == "_run_guest" for entry in error.traceback)
        assert re.search(r"last exit of vcpu\d: KVM_EXIT_IO", "\n".join(error.value.__notes__))


def test_error_in_the_collector(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ioctl that fails while collecting ends the run with its name and errno."""

    def fails(*_: object) -> None:
        raise KvmError(errno.EIO, "KVM_GET_DIRTY_LOG", "slot=1")

    monkeypatch.setattr(Vm, "get_dirty_log", fails)
    with DirtyLogRun(kvm, cell(), SETTINGS) as run, pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG\(slot=1\): EIO"):
        run.run()


@pytest.mark.parametrize("stop", ["cooperative", "forced"])
@pytest.mark.log_modes("dirty-ring")
def test_ctrl_c_while_vcpus_run(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
    """Ctrl-C while two vCPUs run ends the run and all its threads."""
    with DirtyLogRun(kvm, cell("dirty-ring", vcpus=2, stop=stop), SETTINGS) as run:
        waits = iter(range(40))

        def interrupted() -> list[int]:
            if next(waits, None) is None and threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return [0, 0]

        monkeypatch.setattr(run.writers, "published", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.run()


@pytest.mark.parametrize(
    ("owner", "step"),
    [(Vm, "set_user_memory_region"), (Vm, "create_vcpu"), (BitmapMode, "create_vm_done"), (GuestMemory, "populate")],
)
def test_failed_setup_leaks_nothing(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, owner: type, step: str) -> None:
    """If a step of setting up a VM fails, nothing is leaked."""

    def fails(*_: object) -> None:
        raise KvmError(errno.ENOMEM, "STEP")

    monkeypatch.setattr(owner, step, fails)
    with pytest.raises(KvmError):
        DirtyLogRun(kvm, cell(), SETTINGS)
    if step in ("create_vcpu", "create_vm_done"):
        with pytest.raises(KvmError):
            ScriptedVm(kvm, "dirty-log")


@pytest.mark.log_modes("dirty-ring")
def test_ring_that_stays_full(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """If KVM exits with a full ring although nothing can be harvested, the run ends at once with that finding."""
    harvest = DirtyRing.harvest
    long = replace(SETTINGS, iterations=100, interval=50.0, ring_count=smallest_ring(kvm))
    with DirtyLogRun(kvm, cell("dirty-ring"), long) as run:
        monkeypatch.setattr(DirtyRing, "harvest", lambda ring: ([], []) if run.figures.iterations else harvest(ring))
        with pytest.raises(ContractViolation) as error:
            run.run()
    assert error.value.violations[-1].kind is Kind.STUCK
    collections = [finding.collection for finding in error.value.violations]
    assert collections == sorted(collections)
    assert {finding.kind for finding in error.value.violations} == {Kind.STUCK, Kind.LOST, Kind.GAP}
