# SPDX-License-Identifier: GPL-2.0-only
"""What KVM answers to arguments that it does not take: every documented error of every call, by name."""

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from dirty_tracking.modes import LOG_MODES, disable_dirty_logging, enable_dirty_logging
from dirty_tracking.ring import ENTRY_SIZE
from dirty_tracking.tracked_vm import FIRST_GPA, PAGE, TrackedVm
from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.ioctl import errno_name, ioctl, raw_ioctl
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS, GuestMemory
from kvm_util.vm import Vm

SLOT, UNTRACKED, ABSENT = 1, 2, 3
NPAGES = 3 * 64 + 5
TOO_HIGH = 0xFFFF
NO_ADDRESS_SPACE = 9 << 16
MANUAL, INITIALLY_SET = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, uapi.KVM_DIRTY_LOG_INITIALLY_SET
RINGS = {"ring": uapi.KVM_CAP_DIRTY_LOG_RING, "acq_rel": uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL}
MOST = 65536 * ENTRY_SIZE


def answer(fd: int, request: int, argument: Any = None) -> str:
    """What an ioctl answers: the name of an errno, or ``0``."""
    result, code = raw_ioctl(
        fd, request, ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument
    )
    return errno_name(code) if result < 0 else "0"


def enable(vm: Vm, cap: int, *arguments: int, flags: int = 0) -> str:
    request = uapi.kvm_enable_cap(cap=cap, flags=flags, args=(ctypes.c_uint64 * 4)(*arguments))
    return answer(vm.fd, uapi.KVM_ENABLE_CAP, request)


@pytest.fixture
def plain(kvm: Kvm) -> Iterator[Vm]:
    """A VM with nothing in it."""
    with kvm.create_vm() as vm:
        yield vm


def make_vm(kvm: Kvm, mode: str) -> TrackedVm:
    vm = TrackedVm(kvm, mode)
    vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    vm.add_slot(UNTRACKED, FIRST_GPA + NPAGES * PAGE, 64, tracked=False)
    return vm


@pytest.fixture
def manual(kvm: Kvm) -> Iterator[TrackedVm]:
    if reason := LOG_MODES["clear-log-unset"].supported(kvm):
        pytest.skip(reason)
    with make_vm(kvm, "clear-log-unset") as vm:
        yield vm


@pytest.fixture
def ringed(kvm: Kvm) -> Iterator[TrackedVm]:
    if reason := LOG_MODES["dirty-ring"].supported(kvm):
        pytest.skip(reason)
    with TrackedVm(kvm, "dirty-ring") as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        yield vm


@dataclass(frozen=True)
class Clear:
    """A KVM_CLEAR_DIRTY_LOG and its answer."""

    why: str
    expected: str
    slot: int = SLOT
    first: int = 0
    count: int = NPAGES
    bitmap: bool = True


CLEARS = [
    Clear("all of it", "0"),
    Clear("nothing", "0", count=0),
    Clear("nothing at the last word", "0", first=192, count=0),
    Clear("whole words", "0", first=64, count=128),
    Clear("the partial word", "0", first=192, count=5),
    Clear("a start inside a word", "EINVAL", first=1, count=NPAGES - 1),
    Clear("a start inside a word of no slot", "EINVAL", slot=ABSENT, first=1, count=64),
    Clear("an end inside a word", "EINVAL", count=63),
    Clear("an end inside the partial word", "EINVAL", first=192, count=4),
    Clear("a page too many", "EINVAL", count=NPAGES + 1),
    Clear("a word too many", "EINVAL", count=256),
    Clear("a start beyond the end", "EINVAL", first=256, count=0),
    Clear("a start that wraps around", "EINVAL", first=(1 << 64) - 64, count=64),
    Clear("no such slot", "ENOENT", slot=ABSENT, count=64),
    Clear("a slot that is not tracked", "ENOENT", slot=UNTRACKED, count=64),
    Clear("a slot number too high", "EINVAL", slot=TOO_HIGH, count=64),
    Clear("no such address space", "EINVAL", slot=NO_ADDRESS_SPACE | SLOT, count=64),
    Clear("no bitmap", "EFAULT", bitmap=False),
]


@pytest.mark.parametrize("clear", CLEARS, ids=lambda clear: clear.why.replace(" ", "-"))
def test_clear_dirty_log(manual: TrackedVm, clear: Clear) -> None:
    """The answer, and a call that fails clears nothing."""
    manual.write(SLOT, *range(NPAGES))
    mask = (ctypes.c_char * 64).from_buffer(bytearray(b"\xff" * 64))
    request = uapi.kvm_clear_dirty_log(
        slot=clear.slot,
        num_pages=clear.count,
        first_page=clear.first,
        dirty_bitmap=ctypes.addressof(mask) if clear.bitmap else 0,
    )
    assert answer(manual.vm.fd, uapi.KVM_CLEAR_DIRTY_LOG, request) == clear.expected
    cleared = range(clear.first, clear.first + clear.count) if clear.expected == "0" else ()
    assert manual.read_bitmap(SLOT) == [page for page in range(NPAGES) if page not in cleared]


@pytest.mark.parametrize(
    ("slot", "expected"),
    [
        (SLOT, "0"),
        (ABSENT, "ENOENT"),
        (UNTRACKED, "ENOENT"),
        (TOO_HIGH, "EINVAL"),
        (NO_ADDRESS_SPACE | SLOT, "EINVAL"),
    ],
)
@pytest.mark.log_modes("dirty-log", "clear-log-unset")
def test_get_dirty_log(kvm: Kvm, log_mode: str, slot: int, expected: str) -> None:
    """The answer; and a call that fails clears no slot's bits, and leaves the buffer alone."""
    with make_vm(kvm, log_mode) as vm:
        vm.write(SLOT, 7)
        before = b"\xc3" * 64
        bitmap = (ctypes.c_char * 64).from_buffer_copy(before)
        request = uapi.kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(bitmap))
        assert answer(vm.vm.fd, uapi.KVM_GET_DIRTY_LOG, request) == expected
        assert (bitmap.raw == before) == (expected != "0")
        assert vm.read_bitmap(SLOT) == ([] if expected == "0" and log_mode == "dirty-log" else [7])


@pytest.mark.parametrize("request_name", ["KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG"])
def test_bitmaps_are_not_there_in_ring_mode(ringed: TrackedVm, request_name: str) -> None:
    """ENXIO, before anything else is looked at: for slots that exist, for such that do not, and without a buffer."""
    structs = {"KVM_GET_DIRTY_LOG": uapi.kvm_dirty_log, "KVM_CLEAR_DIRTY_LOG": uapi.kvm_clear_dirty_log}
    ringed.write(SLOT, 7)
    for slot in (SLOT, ABSENT, TOO_HIGH):
        argument = structs[request_name](slot=slot)
        assert answer(ringed.vm.fd, getattr(uapi, request_name), argument) == "ENXIO"
    ringed.assert_dirty("a write before it", {SLOT: [7]})


@pytest.mark.parametrize(
    "name", ["KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG", "KVM_ENABLE_CAP", "KVM_SET_USER_MEMORY_REGION"]
)
def test_no_struct(plain: Vm, name: str) -> None:
    assert answer(plain.fd, getattr(uapi, name)) == "EFAULT"


def test_reset_without_rings(plain: Vm) -> None:
    assert answer(plain.fd, uapi.KVM_RESET_DIRTY_RINGS) == "EINVAL"


def test_reset_with_nothing_to_take(ringed: TrackedVm) -> None:
    assert ringed.vm.reset_dirty_rings() == 0


@pytest.mark.log_modes("dirty-ring")
def test_reset_without_vcpus(plain: Vm) -> None:
    """There are rings as soon as they are enabled, none so far."""
    assert enable(plain, RINGS["acq_rel"], MOST) == "0"
    assert plain.reset_dirty_rings() == 0


@pytest.mark.parametrize(
    ("flags", "value", "expected"),
    [
        (0, 0, "0"),
        (0, MANUAL, "0"),
        (0, MANUAL | INITIALLY_SET, "0"),
        (0, INITIALLY_SET, "EINVAL"),
        (0, 4, "EINVAL"),
        (0, MANUAL | 1 << 63, "EINVAL"),
        (1, MANUAL, "EINVAL"),
    ],
)
@pytest.mark.log_modes("clear-log")
def test_enable_manual_protect(plain: Vm, flags: int, value: int, expected: str) -> None:
    assert enable(plain, uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, value, flags=flags) == expected


@pytest.mark.parametrize("cap", RINGS.values(), ids=list(RINGS))
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (MOST, "0"),
        (0, "EINVAL"),
        (MOST - 1, "EINVAL"),
        (3 << 16, "EINVAL"),
        (16, "EINVAL"),
        (2048, "EINVAL"),
        (MOST * 2, "E2BIG"),
        (1 << 31, "E2BIG"),
        (MOST * 3, "EINVAL"),
        # KVM takes the size as 32 bits, and does not look at the others (kvm_vm_ioctl_enable_dirty_log_ring()).
        (1 << 32, "EINVAL"),
        (1 << 32 | MOST, "0"),
    ],
)
def test_enable_a_ring(kvm: Kvm, plain: Vm, cap: int, size: int, expected: str) -> None:
    """Its size in bytes: a power of two, no smaller than a page and the reserved entries, and no larger than the most."""
    if not kvm.check_extension(cap):
        pytest.skip(f"no capability {cap}")
    assert kvm.check_extension(cap) == MOST
    assert enable(plain, cap, size) == expected


def test_what_is_refused_changes_nothing(kvm: Kvm, log_mode: str) -> None:
    """A VM goes on in its mode: with its ring or bitmaps, the meaning of GET, and what is set at first."""
    with TrackedVm(kvm, log_mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.write(SLOT, 3)
        cap = uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
        refused = [enable(vm.vm, cap, value, flags=1) for value in (0, MANUAL, MANUAL | INITIALLY_SET)]
        refused += [enable(vm.vm, cap, value) for value in (INITIALLY_SET, 4, MANUAL | 4)]
        # There is a vCPU, so that no size is right.
        refused += [enable(vm.vm, cap, size) for cap in RINGS.values() for size in (0, MOST // 2, MOST, MOST * 2)]
        assert "0" not in refused
        if not vm.mode.uses_ring:
            read = [vm.read_bitmap(SLOT) for _ in range(2)]
            assert read == [[3], [3] if vm.mode.manual else []]
            vm.collect()
        else:
            vm.assert_dirty("a write before it", {SLOT: [3]})
        vm.write(SLOT, 4)
        vm.assert_dirty("a write after it", {SLOT: [4]})
        vm.disable_dirty_logging(SLOT)
        vm.enable_dirty_logging(SLOT)
        vm.assert_dirty("nothing since tracking began again", {})


@pytest.mark.log_modes("dirty-ring")
def test_a_ring_is_enabled_once_and_before_any_vcpu(plain: Vm, kvm: Kvm) -> None:
    assert enable(plain, RINGS["acq_rel"], MOST) == "0"
    assert [enable(plain, cap, MOST) for cap in RINGS.values()] == ["EINVAL"] * 2
    with kvm.create_vm() as other:
        other.create_vcpu(0)
        assert enable(other, RINGS["acq_rel"], MOST) == "EINVAL"


@pytest.mark.log_modes("dirty-ring")
def test_a_ring_can_be_enabled_when_slots_exist(plain: Vm) -> None:
    memory = GuestMemory(BACKINGS["anonymous"], PAGE, FIRST_GPA)
    plain.set_user_memory_region(SLOT, FIRST_GPA, memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    assert enable(plain, RINGS["acq_rel"], MOST) == "0"


@pytest.mark.parametrize("cap", RINGS.values(), ids=list(RINGS))
def test_the_flags_of_a_ring_are_not_looked_at(plain: Vm, kvm: Kvm, cap: int) -> None:
    """Unlike those of the other capabilities."""
    if not kvm.check_extension(cap):
        pytest.skip(f"no capability {cap}")
    assert enable(plain, cap, MOST, flags=1) == "0"


def test_a_ring_with_a_bitmap_is_not_offered(plain: Vm, kvm: Kvm) -> None:
    """Where no device of KVM's writes without a vCPU (CONFIG_NEED_KVM_DIRTY_RING_WITH_BITMAP)."""
    assert kvm.check_extension(uapi.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) == int(arch.RING_WITH_BITMAP)
    assert enable(plain, uapi.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) == "EINVAL"
    if kvm.check_extension(RINGS["acq_rel"]):
        assert enable(plain, RINGS["acq_rel"], MOST) == "0"
        assert enable(plain, uapi.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) == ("0" if arch.RING_WITH_BITMAP else "EINVAL")


def test_a_slot_of_a_ring_mode_vm_is_tracked_or_not_as_its_flags_say(ringed: TrackedVm) -> None:
    """Switching it on again with the same flags, and off, is no error, and takes effect."""
    for page, on in enumerate((True, False, False, True)):
        (enable_dirty_logging if on else disable_dirty_logging)(ringed.vm, SLOT)
        ringed.write(SLOT, page)
        ringed.assert_dirty(f"a write with tracking {'on' if on else 'off'}", {SLOT: [page] if on else []})


@dataclass(frozen=True)
class Region:
    """A KVM_SET_USER_MEMORY_REGION and its answer, beside the tracked slot of NPAGES pages at FIRST_GPA."""

    why: str
    expected: str
    slot: int = ABSENT
    gpa: int = FIRST_GPA + (64 << 20)
    size: int = PAGE
    hva_offset: int = 0
    own_memory: bool = False
    flags: int = uapi.KVM_MEM_LOG_DIRTY_PAGES


REGIONS = [
    Region("a new slot", "0"),
    Region("an unknown flag", "EINVAL", flags=1 << 31),
    Region("a size that is not whole pages", "EINVAL", size=PAGE + 1),
    Region("an address inside a page", "EINVAL", gpa=FIRST_GPA + (64 << 20) + 1),
    Region("a host address inside a page", "EINVAL", hva_offset=1),
    Region("a slot number too high", "EINVAL", slot=TOO_HIGH),
    Region("no such address space", "EINVAL", slot=NO_ADDRESS_SPACE),
    Region("an end beyond all addresses", "EINVAL", gpa=(1 << 64) - PAGE, size=2 * PAGE),
    Region("deleting what is not there", "EINVAL", size=0),
    Region("the first page of another slot", "EEXIST", gpa=FIRST_GPA),
    Region("the last page of another slot", "EEXIST", gpa=FIRST_GPA + (NPAGES - 1) * PAGE),
    Region("all of another slot and more", "EEXIST", gpa=FIRST_GPA - PAGE, size=(NPAGES + 2) * PAGE),
    Region("right before another slot", "0", gpa=FIRST_GPA - PAGE),
    Region("another size of a slot that is there", "EINVAL", slot=SLOT, gpa=FIRST_GPA),
    Region("another host address of a slot that is there", "EINVAL", slot=SLOT, gpa=FIRST_GPA, size=NPAGES * PAGE),
    Region(
        "another READONLY of a slot that is there",
        "EINVAL",
        slot=UNTRACKED,
        gpa=FIRST_GPA + NPAGES * PAGE,
        size=64 * PAGE,
        flags=uapi.KVM_MEM_READONLY,
        own_memory=True,
    ),
    Region("a move onto another slot", "EEXIST", slot=UNTRACKED, gpa=FIRST_GPA, size=64 * PAGE, own_memory=True),
    Region("a host address that no process can have", "EINVAL", hva_offset=1 << 63),
]


@pytest.mark.parametrize("region", REGIONS, ids=lambda region: region.why.replace(" ", "-"))
def test_set_user_memory_region(manual: TrackedVm, region: Region) -> None:
    """The answer; and the dirty pages of the slot that is there stay."""
    own = manual.vm.memslots[UNTRACKED].memory
    manual.vm.set_user_memory_region(UNTRACKED, FIRST_GPA + NPAGES * PAGE, own)
    manual.write(SLOT, 7)
    memory = GuestMemory(BACKINGS["anonymous"], (NPAGES + 2) * PAGE, 0)
    argument = uapi.kvm_userspace_memory_region(
        slot=region.slot,
        flags=region.flags,
        guest_phys_addr=region.gpa,
        memory_size=region.size,
        userspace_addr=(own.hva if region.own_memory else memory.hva) + region.hva_offset,
    )
    try:
        assert answer(manual.vm.fd, uapi.KVM_SET_USER_MEMORY_REGION, argument) == region.expected
        assert manual.read_bitmap(SLOT) == [7]
    finally:
        argument.memory_size = 0
        if region.expected == "0":
            assert answer(manual.vm.fd, uapi.KVM_SET_USER_MEMORY_REGION, argument) == "0"
        memory.close()


def test_a_vcpu_that_cannot_be(ringed: TrackedVm, kvm: Kvm) -> None:
    """Its ring changes nothing about which ids KVM takes."""
    assert answer(ringed.vm.fd, uapi.KVM_CREATE_VCPU, 0) == "EEXIST"
    assert answer(ringed.vm.fd, uapi.KVM_CREATE_VCPU, kvm.check_extension(uapi.KVM_CAP_MAX_VCPU_ID)) == "EINVAL"


def test_private_memory_cannot_be_tracked(plain: Vm, kvm: Kvm) -> None:
    """A slot with a guest_memfd may not have KVM_MEM_LOG_DIRTY_PAGES, at first or later (api.rst 4.140)."""
    if not ioctl(plain.fd, uapi.KVM_CHECK_EXTENSION, "KVM_CHECK_EXTENSION", uapi.KVM_CAP_GUEST_MEMFD):
        pytest.skip("no KVM_CAP_GUEST_MEMFD for ordinary VMs")
    size = 4 * PAGE
    # All flags that there are: one of them has ordinary VMs map the file, which others may not have as memory.
    flags = ioctl(plain.fd, uapi.KVM_CHECK_EXTENSION, "KVM_CHECK_EXTENSION", uapi.KVM_CAP_GUEST_MEMFD_FLAGS)
    create = uapi._kvm_create_guest_memfd(size=size, flags=flags)
    request = uapi.KVM_CREATE_GUEST_MEMFD
    file = ioctl(plain.fd, request, "KVM_CREATE_GUEST_MEMFD", ctypes.byref(create), f"size={size:#x}")
    memory = GuestMemory(BACKINGS["anonymous"], size, FIRST_GPA)
    try:
        region = uapi._kvm_userspace_memory_region2(
            slot=SLOT, guest_phys_addr=FIRST_GPA, memory_size=size, userspace_addr=memory.hva, guest_memfd=file
        )
        region.flags = uapi.KVM_MEM_GUEST_MEMFD
        # The capability is there for the VM's type, so a slot with it must be possible.
        assert answer(plain.fd, uapi.KVM_SET_USER_MEMORY_REGION2, region) == "0"
        region.flags |= uapi.KVM_MEM_LOG_DIRTY_PAGES
        assert answer(plain.fd, uapi.KVM_SET_USER_MEMORY_REGION2, region) == "EINVAL"
        region.memory_size, region.flags = 0, 0
        assert answer(plain.fd, uapi.KVM_SET_USER_MEMORY_REGION2, region) == "0"
        region.memory_size, region.flags = size, uapi.KVM_MEM_GUEST_MEMFD | uapi.KVM_MEM_LOG_DIRTY_PAGES
        assert answer(plain.fd, uapi.KVM_SET_USER_MEMORY_REGION2, region) == "EINVAL"
    finally:
        os.close(file)
        memory.close()
