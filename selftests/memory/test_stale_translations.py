# SPDX-License-Identifier: GPL-2.0-only
"""A vCPU that stays in its guest loses its translations: its very next store after an ioctl returned is tracked.

The other tests of arming let a vCPU go only after the ioctl, and entering a guest may drop translations by itself; of
collectors beside running vCPUs (test_concurrency.py) nobody knows when a translation was used last. Here the vCPU stores to
pages, tells so through memory, waits for the host without leaving its guest, and stores again. What KVM forgets to flush
lets that store pass.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from dirty_tracking.platform import uses_pml, uses_tdp
from dirty_tracking.tracked_vm import FIRST_GPA, PAGE, Operation, TrackedVm
from kvm_util.host import Host
from kvm_util.kvm import Kvm

SLOT = 1
# On both sides of the edge of a huge page, and of a word of the bitmap
PAGES = [0, 1, 63, 64, 511, 512, 513, 575]
NPAGES = 2 * 512 + 9
_PATIENCE = 30.0
_NO_MORE = 1 << 62


class Meetings:
    """Where the vCPU and the host wait for each other: two words of slot 0, the one's number and the other's."""

    def __init__(self, vm: TrackedVm) -> None:
        self._address = vm.guest.allocate(PAGE)
        self._words = vm.guest.memory(self._address, 16).cast("Q")
        self._last = 0

    def store(self, address: int) -> Operation:
        """What the vCPU does at the next meeting: it stores to *address* as soon as the host has done its part."""
        self._last += 1
        return Operation("meet_and_store", address, self._last, self._address)

    def hold(self, doings: Iterator[None]) -> None:
        """On a thread of the host's: do the next of *doings* at each meeting."""
        try:
            for number, _ in enumerate(self._each(), 1):
                next(doings)
                self._words[1] = number
            assert next(doings, "the end") == "the end"
        finally:
            self._words[1] = _NO_MORE  # a vCPU that waits for what does not come any more would hang
            self._words.release()

    def _each(self) -> Iterator[None]:
        for number in range(1, self._last + 1):
            until = time.monotonic() + _PATIENCE
            while self._words[0] < number:
                assert time.monotonic() < until, f"the vCPU did not come to meeting {number}"
            yield


@pytest.fixture(params=["anonymous", "anonymous_thp"])
def slot(
    request: pytest.FixtureRequest,
    kvm: Kvm,
    host: Host,
    emulates: bool,
    log_mode: str,
) -> Iterator[TrackedVm]:
    """A VM with an untracked slot, in small pages or in huge ones."""
    if emulates:
        pytest.skip(f"{host.backend} emulates each instruction of this guest, and keeps no translation")
    if uses_pml(host):
        pytest.skip("with PML a store reaches KVM when the vCPU leaves its guest (kvm_intel.pml=0 has none)")
    huge = request.param == "anonymous_thp"
    with TrackedVm(kvm, log_mode, guest_mode="48bit-2m" if huge and not uses_tdp(host) else "48bit-4k") as vm:
        memslot = vm.add_slot(SLOT, FIRST_GPA, NPAGES, request.param, tracked=False)
        memslot.memory.populate()
        yield vm


@pytest.fixture
def turns(thorough: bool) -> int:
    return 100 if thorough else 5


def store_beside(vm: TrackedVm, meetings: int, doings: Iterator[None]) -> None:
    """Have the vCPU store to each of PAGES, and again right after each of so many *meetings* with the host's *doings*."""
    meet = Meetings(vm)
    operations = []
    for page in PAGES:
        address = vm.address(SLOT, page)
        operations += [Operation("store_8", address), *(meet.store(address) for _ in range(meetings))]
    with ThreadPoolExecutor(1) as pool:
        host = pool.submit(meet.hold, doings)
        vm.run(*operations)
        host.result()


def test_a_store_right_after_tracking_was_switched_on(slot: TrackedVm, turns: int) -> None:
    """To a page that was writable until then; where all pages are dirty at first, until these were cleared."""

    def doings() -> Iterator[None]:
        for page in PAGES:
            slot.enable_dirty_logging(SLOT, assert_initial=False)
            first = slot.collect() if slot.mode.initially_set else None
            yield  # before all that takes time: the vCPU shall not wait for more than the ioctl
            if first is not None:
                slot.assert_report("tracking was switched on", {SLOT: range(NPAGES)}, first)
            report = slot.collect()
            slot.disable_dirty_logging(SLOT)
            yield
            slot.assert_report("a store right after tracking was switched on", {SLOT: [page]}, report)

    for _ in range(turns):
        store_beside(slot, 2, doings())


def test_a_store_right_after_a_collection(slot: TrackedVm, turns: int) -> None:
    """GET, GET and CLEAR, or a harvest and its reset, of a page that was stored to just before."""
    slot.enable_dirty_logging(SLOT)

    def doings() -> Iterator[None]:
        before: list[int] = []
        for page in PAGES:
            report = slot.collect()
            yield
            slot.assert_report(
                "a store right after a collection, and one to another page", {SLOT: [*before, page]}, report
            )
            before = [page]

    for _ in range(turns):
        store_beside(slot, 1, doings())
        slot.assert_dirty("a store right after a collection", {SLOT: PAGES[-1:]})
