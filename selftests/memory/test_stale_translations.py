# SPDX-License-Identifier: GPL-2.0-only
"""TLBs are flushed before an ioctl returns: the next store of a vCPU that stays in its guest is logged.

The other tests of write protection enter the guest again after the ioctl, which may flush its TLB anyway; and where vCPUs
run beside a collector (test_concurrency.py), nobody knows when a translation was used last. Here the vCPU stores to a page,
announces that in memory, waits for the host without leaving its guest, and stores again. A stale translation lets that store
pass unlogged. With PML the vCPU leaves its guest before it announces a store, for KVM learns of the store only then.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from dirty_tracking.platform import uses_tdp
from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.memory import HUGE_PAGE_SIZE
from selftests.pause import PAUSE, paused

pytestmark = pytest.mark.threads

SLOT = 1
# On both sides of the boundary of a huge page, and of a word of the bitmap
HUGE = HUGE_PAGE_SIZE // PAGE
PAGES = [0, 1, 63, 64, HUGE - 1, HUGE, HUGE + 1, HUGE + 63]
NPAGES = 2 * HUGE + 9
_TIMEOUT = 30.0
_NO_MORE_STEPS = 1 << 62


class Rendezvous:
    """Points where the vCPU and the host wait for each other, by two words of slot 0: how many each of them has reached."""

    def __init__(self, vm: ScriptedVm) -> None:
        self._address = vm.guest.allocate(16)
        self._words = vm.guest.memory(self._address, 16).cast("Q")
        self._last = 0

    def store(self, address: int) -> Operation:
        """An operation for the vCPU: wait for the host's next step, and store to *address* as soon as it is done."""
        self._last += 1
        return Operation("rendezvous_store", address, self._last, self._address)

    def serve(self, steps: Iterator[None]) -> None:
        """Do the next of *steps* whenever the vCPU waits for it; for another thread than the vCPU's."""
        try:
            for number, _ in enumerate(self._each(), 1):
                next(steps)
                self._words[1] = number
            assert next(steps, "the end") == "the end", "there are more steps than stores"
        finally:
            self._words[1] = _NO_MORE_STEPS  # a vCPU that waits for a step that does not come would hang
            self._words.release()

    def _each(self) -> Iterator[None]:
        for number in range(1, self._last + 1):
            until = time.monotonic() + _TIMEOUT
            while self._words[0] < number:
                assert time.monotonic() < until, f"the vCPU did not come to its store {number}"
            yield


@pytest.fixture(params=["anonymous", "anonymous_thp"])
def vm(request: pytest.FixtureRequest, kvm: Kvm, host: Host, emulates: bool, log_mode: str) -> Iterator[ScriptedVm]:
    """A VM with a memslot without dirty logging, mapped by small pages or by huge ones."""
    if emulates:
        pytest.skip(f"{host.backend} emulates each instruction of this guest, and keeps no translation")
    huge = request.param == "anonymous_thp"
    with ScriptedVm(kvm, log_mode, guest_mode="48bit-2m" if huge and not uses_tdp(host) else "48bit-4k") as vm:
        memslot = vm.add_slot(SLOT, FIRST_GPA, NPAGES, request.param, logged=False)
        memslot.memory.populate()
        yield vm


@pytest.fixture
def rounds(thorough: bool) -> int:
    """How often to store to all of PAGES."""
    return 100 if thorough else 5


def store_between(vm: ScriptedVm, steps_per_page: int, steps: Iterator[None]) -> None:
    """Have the vCPU store to each of PAGES, and again right after each of *steps_per_page* of the host's *steps*."""
    rendezvous = Rendezvous(vm)
    leave = [PAUSE] if vm.mode.has_cpu_logs else []
    operations = []
    for page in PAGES:
        store = Operation("store_8", vm.address(SLOT, page))
        operations += [store, *leave, store]  # leaving may take away the translation, which the second one brings back
        for _ in range(steps_per_page):
            operations += [rendezvous.store(store.address), *leave]
    with ThreadPoolExecutor(1) as pool:
        host = pool.submit(rendezvous.serve, steps)
        vm.run(*operations, on_exit=paused)
        host.result()


def test_store_right_after_enabling_logging(vm: ScriptedVm, rounds: int) -> None:
    """The first store to a writable page is logged after dirty logging was enabled (INITIALLY_SET: after the first CLEAR)."""

    def steps() -> Iterator[None]:
        for page in PAGES:
            vm.enable_dirty_logging(SLOT, assert_initial=False)
            first = vm.collect() if vm.mode.initially_set else None
            yield  # before the slow assertion: the vCPU must wait for nothing but the ioctl
            if first is not None:
                vm.assert_report("dirty logging was enabled", {SLOT: range(NPAGES)}, first)
            report = vm.collect()
            vm.disable_dirty_logging(SLOT)
            yield
            vm.assert_report("a store right after dirty logging was enabled", {SLOT: [page]}, report)

    for _ in range(rounds):
        store_between(vm, 2, steps())


def test_store_right_after_collection(vm: ScriptedVm, rounds: int) -> None:
    """The first store to a dirty page after GET, CLEAR or RESET is logged again."""
    vm.enable_dirty_logging(SLOT)

    def steps() -> Iterator[None]:
        before: list[int] = []
        for page in PAGES:
            report = vm.collect()
            yield
            vm.assert_report(
                "a store right after a collection, and one to another page", {SLOT: [*before, page]}, report
            )
            before = [page]

    for _ in range(rounds):
        store_between(vm, 1, steps())
        vm.assert_dirty("a store right after a collection", {SLOT: PAGES[-1:]})
