# SPDX-License-Identifier: GPL-2.0-only
"""Argument checks of the ioctls for dirty logging: each documented error, by the name of its errno."""

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from dirty_tracking.modes import LOG_MODES, set_dirty_logging
from dirty_tracking.ring import ENTRY_SIZE
from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.host import Host
from kvm_util.ioctl import errno_name, ioctl, raw_ioctl
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS, GuestMemory
from kvm_util.vm import Vm
from selftests.interface.slots import ABSENT, NPAGES, SLOT, UNLOGGED, bitmap_vm

TOO_HIGH = 0xFFFF
NO_ADDRESS_SPACE = 9 << 16
MANUAL, INITIALLY_SET = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, uapi.KVM_DIRTY_LOG_INITIALLY_SET
RING_CAPS = {"ring": uapi.KVM_CAP_DIRTY_LOG_RING, "acq_rel": uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL}
MAX_SIZE = 65536 * ENTRY_SIZE


def ioctl_result(fd: int, request: int, argument: Any = None) -> str:
    """Call an ioctl; returns the name of its errno, or ``0`` for success."""
    result, code = raw_ioctl(
        fd, request, ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument
    )
    return errno_name(code) if result < 0 else "0"


def enable_cap(vm: Vm, cap: int, *arguments: int, flags: int = 0) -> str:
    """Call KVM_ENABLE_CAP; returns the name of its errno, or ``0`` for success."""
    request = uapi.kvm_enable_cap(cap=cap, flags=flags, args=(ctypes.c_uint64 * 4)(*arguments))
    return ioctl_result(vm.fd, uapi.KVM_ENABLE_CAP, request)


@pytest.fixture
def bare_vm(kvm: Kvm) -> Iterator[Vm]:
    """A VM without vCPUs and memslots."""
    with kvm.create_vm() as vm:
        yield vm


@pytest.fixture
def ring_vm(kvm: Kvm) -> Iterator[ScriptedVm]:
    """A VM with a vCPU, its dirty ring, and a slot with dirty logging."""
    if reason := LOG_MODES["dirty-ring"].supported(kvm):
        pytest.skip(reason)
    with ScriptedVm(kvm, "dirty-ring") as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        yield vm


@dataclass(frozen=True)
class Clear:
    """A call of KVM_CLEAR_DIRTY_LOG and its expected result."""

    name: str
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
    Clear("a slot without dirty logging", "ENOENT", slot=UNLOGGED, count=64),
    Clear("a slot number too high", "EINVAL", slot=TOO_HIGH, count=64),
    Clear("no such address space", "EINVAL", slot=NO_ADDRESS_SPACE | SLOT, count=64),
    Clear("no bitmap", "EFAULT", bitmap=False),
]


@pytest.mark.parametrize("clear", CLEARS, ids=lambda clear: clear.name.replace(" ", "-"))
def test_clear_dirty_log_argument_checks(manual_vm: ScriptedVm, clear: Clear) -> None:
    """KVM_CLEAR_DIRTY_LOG checks its slot, range and bitmap, and a call that fails clears no bit."""
    manual_vm.write(SLOT, *range(NPAGES))
    mask = (ctypes.c_char * 64).from_buffer(bytearray(b"\xff" * 64))
    request = uapi.kvm_clear_dirty_log(
        slot=clear.slot,
        num_pages=clear.count,
        first_page=clear.first,
        dirty_bitmap=ctypes.addressof(mask) if clear.bitmap else 0,
    )
    assert ioctl_result(manual_vm.vm.fd, uapi.KVM_CLEAR_DIRTY_LOG, request) == clear.expected
    cleared = range(clear.first, clear.first + clear.count) if clear.expected == "0" else ()
    assert manual_vm.read_bitmap(SLOT) == [page for page in range(NPAGES) if page not in cleared]


@pytest.mark.parametrize(
    ("slot", "expected"),
    [
        (SLOT, "0"),
        (ABSENT, "ENOENT"),
        (UNLOGGED, "ENOENT"),
        (TOO_HIGH, "EINVAL"),
        (NO_ADDRESS_SPACE | SLOT, "EINVAL"),
    ],
)
@pytest.mark.log_modes("dirty-log", "clear-log-unset")
def test_get_dirty_log_argument_checks(kvm: Kvm, log_mode: str, slot: int, expected: str) -> None:
    """KVM_GET_DIRTY_LOG checks its slot, and a call that fails neither clears bits nor writes to the buffer."""
    with bitmap_vm(kvm, log_mode) as vm:
        vm.write(SLOT, 7)
        before = b"\xc3" * 64
        bitmap = (ctypes.c_char * 64).from_buffer_copy(before)
        request = uapi.kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(bitmap))
        assert ioctl_result(vm.vm.fd, uapi.KVM_GET_DIRTY_LOG, request) == expected
        assert (bitmap.raw == before) == (expected != "0")
        assert vm.read_bitmap(SLOT) == ([] if expected == "0" and log_mode == "dirty-log" else [7])


@pytest.mark.parametrize("request_name", ["KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG"])
def test_get_and_clear_fail_in_ring_mode(ring_vm: ScriptedVm, request_name: str) -> None:
    """With dirty rings, GET and CLEAR fail with ENXIO before any other check, and the rings keep their entries."""
    structs = {"KVM_GET_DIRTY_LOG": uapi.kvm_dirty_log, "KVM_CLEAR_DIRTY_LOG": uapi.kvm_clear_dirty_log}
    ring_vm.write(SLOT, 7)
    for slot in (SLOT, ABSENT, TOO_HIGH):
        argument = structs[request_name](slot=slot)
        assert ioctl_result(ring_vm.vm.fd, getattr(uapi, request_name), argument) == "ENXIO"
    ring_vm.assert_dirty("a write before the failed calls", {SLOT: [7]})


@pytest.mark.parametrize(
    "name", ["KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG", "KVM_ENABLE_CAP", "KVM_SET_USER_MEMORY_REGION"]
)
def test_null_argument_is_efault(bare_vm: Vm, name: str) -> None:
    """An ioctl that reads a struct fails with EFAULT when its argument is NULL."""
    assert ioctl_result(bare_vm.fd, getattr(uapi, name)) == "EFAULT"


def test_reset_without_rings_is_einval(bare_vm: Vm) -> None:
    """KVM_RESET_DIRTY_RINGS fails with EINVAL on a VM without dirty rings."""
    assert ioctl_result(bare_vm.fd, uapi.KVM_RESET_DIRTY_RINGS) == "EINVAL"


def test_reset_of_empty_rings_returns_0(ring_vm: ScriptedVm) -> None:
    """KVM_RESET_DIRTY_RINGS returns 0 when the rings are empty."""
    assert ring_vm.vm.reset_dirty_rings() == 0


@pytest.mark.log_modes("dirty-ring")
def test_reset_without_vcpus_returns_0(bare_vm: Vm) -> None:
    """KVM_RESET_DIRTY_RINGS returns 0 on a VM that has dirty rings enabled and no vCPU yet."""
    assert enable_cap(bare_vm, RING_CAPS["acq_rel"], MAX_SIZE) == "0"
    assert bare_vm.reset_dirty_rings() == 0


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
def test_manual_protect_argument_checks(bare_vm: Vm, flags: int, value: int, expected: str) -> None:
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 takes its two documented bits, INITIALLY_SET only with the other, and no flags."""
    assert enable_cap(bare_vm, uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, value, flags=flags) == expected


@pytest.mark.parametrize("cap", RING_CAPS.values(), ids=list(RING_CAPS))
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (MAX_SIZE, "0"),
        (0, "EINVAL"),
        (MAX_SIZE - 1, "EINVAL"),
        (3 << 16, "EINVAL"),
        (ENTRY_SIZE, "EINVAL"),
        (PAGE // 2, "EINVAL"),
        (MAX_SIZE * 2, "E2BIG"),
        (1 << 31, "E2BIG"),
        (MAX_SIZE * 3, "EINVAL"),
        # KVM truncates the size to 32 bits (kvm_vm_ioctl_enable_dirty_log_ring()).
        (1 << 32, "EINVAL"),
        (1 << 32 | MAX_SIZE, "0"),
    ],
)
def test_ring_size_checks(kvm: Kvm, bare_vm: Vm, cap: int, size: int, expected: str) -> None:
    """A ring's size in bytes is a power of two, at least a page and the reserved entries, at most what KVM offers."""
    if not kvm.check_extension(cap):
        pytest.skip(f"no capability {cap}")
    assert kvm.check_extension(cap) == MAX_SIZE
    assert enable_cap(bare_vm, cap, size) == expected


def test_failed_enable_cap_has_no_effect(kvm: Kvm, log_mode: str) -> None:
    """A KVM_ENABLE_CAP that fails keeps the VM's rings or bitmaps, its manual protection and what is initially set."""
    with ScriptedVm(kvm, log_mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.write(SLOT, 3)
        cap = uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
        refused = [enable_cap(vm.vm, cap, value, flags=1) for value in (0, MANUAL, MANUAL | INITIALLY_SET)]
        refused += [enable_cap(vm.vm, cap, value) for value in (INITIALLY_SET, 4, MANUAL | 4)]
        # The VM has a vCPU, so each size is refused.
        refused += [
            enable_cap(vm.vm, cap, size)
            for cap in RING_CAPS.values()
            for size in (0, MAX_SIZE // 2, MAX_SIZE, MAX_SIZE * 2)
        ]
        assert "0" not in refused
        if not vm.mode.uses_ring:
            read = [vm.read_bitmap(SLOT) for _ in range(2)]
            assert read == [[3], [3] if vm.mode.manual else []]
            vm.collect()
        else:
            vm.assert_dirty("a write before the refused capabilities", {SLOT: [3]})
        vm.write(SLOT, 4)
        vm.assert_dirty("a write after the refused capabilities", {SLOT: [4]})
        vm.disable_dirty_logging(SLOT)
        vm.enable_dirty_logging(SLOT)
        vm.assert_dirty("no write since logging was enabled again", {})


@pytest.mark.log_modes("dirty-ring")
def test_rings_enabled_once_and_before_vcpus(bare_vm: Vm, kvm: Kvm) -> None:
    """Dirty rings can be enabled once per VM, and only before its first vCPU is created."""
    assert enable_cap(bare_vm, RING_CAPS["acq_rel"], MAX_SIZE) == "0"
    assert [enable_cap(bare_vm, cap, MAX_SIZE) for cap in RING_CAPS.values()] == ["EINVAL"] * 2
    with kvm.create_vm() as other:
        other.create_vcpu(0)
        assert enable_cap(other, RING_CAPS["acq_rel"], MAX_SIZE) == "EINVAL"


@pytest.mark.log_modes("dirty-ring")
def test_rings_enabled_with_existing_slots(bare_vm: Vm) -> None:
    """Dirty rings can be enabled on a VM that already has a memslot with dirty logging."""
    memory = GuestMemory(BACKINGS["anonymous"], PAGE, FIRST_GPA)
    bare_vm.set_user_memory_region(SLOT, FIRST_GPA, memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    assert enable_cap(bare_vm, RING_CAPS["acq_rel"], MAX_SIZE) == "0"


@pytest.mark.parametrize("cap", RING_CAPS.values(), ids=list(RING_CAPS))
def test_ring_capability_ignores_flags(bare_vm: Vm, kvm: Kvm, cap: int) -> None:
    """KVM_ENABLE_CAP ignores the flags for the dirty ring capabilities, unlike for manual protection."""
    if not kvm.check_extension(cap):
        pytest.skip(f"no capability {cap}")
    assert enable_cap(bare_vm, cap, MAX_SIZE, flags=1) == "0"


def test_ring_with_bitmap_availability(bare_vm: Vm, kvm: Kvm) -> None:
    """KVM offers a bitmap beside the rings exactly where its devices write without a vCPU.

    The kernel's symbol for that is CONFIG_NEED_KVM_DIRTY_RING_WITH_BITMAP.
    """
    assert kvm.check_extension(uapi.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) == int(arch.RING_WITH_BITMAP)
    assert enable_cap(bare_vm, uapi.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) == "EINVAL"
    if kvm.check_extension(RING_CAPS["acq_rel"]):
        assert enable_cap(bare_vm, RING_CAPS["acq_rel"], MAX_SIZE) == "0"
        assert enable_cap(bare_vm, uapi.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) == (
            "0" if arch.RING_WITH_BITMAP else "EINVAL"
        )


def test_logging_toggles_in_ring_mode(ring_vm: ScriptedVm) -> None:
    """With dirty rings, a memslot logs as its latest flags say, also when these are the flags that it already had."""
    for page, on in enumerate((True, False, False, True)):
        set_dirty_logging(ring_vm.vm, SLOT, on)
        ring_vm.write(SLOT, page)
        ring_vm.assert_dirty(
            f"a write with dirty logging {'enabled' if on else 'disabled'}", {SLOT: [page] if on else []}
        )


@dataclass(frozen=True)
class Region:
    """A call of KVM_SET_USER_MEMORY_REGION and its expected result, beside the logged slot of NPAGES pages at FIRST_GPA."""

    name: str
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
    Region("an end that wraps around", "EINVAL", gpa=(1 << 64) - PAGE, size=2 * PAGE),
    Region("deleting an absent slot", "EINVAL", size=0),
    Region("the first page of another slot", "EEXIST", gpa=FIRST_GPA),
    Region("the last page of another slot", "EEXIST", gpa=FIRST_GPA + (NPAGES - 1) * PAGE),
    Region("all of another slot and more", "EEXIST", gpa=FIRST_GPA - PAGE, size=(NPAGES + 2) * PAGE),
    Region("right before another slot", "0", gpa=FIRST_GPA - PAGE),
    Region("another size of an existing slot", "EINVAL", slot=SLOT, gpa=FIRST_GPA),
    Region("another host address of an existing slot", "EINVAL", slot=SLOT, gpa=FIRST_GPA, size=NPAGES * PAGE),
    Region(
        "another READONLY of an existing slot",
        "EINVAL",
        slot=UNLOGGED,
        gpa=FIRST_GPA + NPAGES * PAGE,
        size=64 * PAGE,
        flags=uapi.KVM_MEM_READONLY,
        own_memory=True,
    ),
    Region("a move onto another slot", "EEXIST", slot=UNLOGGED, gpa=FIRST_GPA, size=64 * PAGE, own_memory=True),
    Region("a host address outside of user space", "EINVAL", hva_offset=1 << 63),
]


@pytest.mark.parametrize("region", REGIONS, ids=lambda region: region.name.replace(" ", "-"))
def test_memory_region_argument_checks(manual_vm: ScriptedVm, region: Region) -> None:
    """KVM_SET_USER_MEMORY_REGION checks its arguments, and neither success nor failure changes an existing slot's bitmap."""
    own = manual_vm.vm.memslots[UNLOGGED].memory
    manual_vm.vm.set_user_memory_region(UNLOGGED, FIRST_GPA + NPAGES * PAGE, own)
    manual_vm.write(SLOT, 7)
    memory = GuestMemory(BACKINGS["anonymous"], (NPAGES + 2) * PAGE, 0)
    argument = uapi.kvm_userspace_memory_region(
        slot=region.slot,
        flags=region.flags,
        guest_phys_addr=region.gpa,
        memory_size=region.size,
        userspace_addr=(own.hva if region.own_memory else memory.hva) + region.hva_offset,
    )
    try:
        assert ioctl_result(manual_vm.vm.fd, uapi.KVM_SET_USER_MEMORY_REGION, argument) == region.expected
        assert manual_vm.read_bitmap(SLOT) == [7]
    finally:
        argument.memory_size = 0
        if region.expected == "0":
            assert ioctl_result(manual_vm.vm.fd, uapi.KVM_SET_USER_MEMORY_REGION, argument) == "0"
        memory.close()


def test_create_vcpu_rejects_bad_ids_in_ring_mode(ring_vm: ScriptedVm, kvm: Kvm) -> None:
    """With dirty rings, KVM_CREATE_VCPU fails with EEXIST for an id in use and with EINVAL for one that is too high."""
    assert ioctl_result(ring_vm.vm.fd, uapi.KVM_CREATE_VCPU, 0) == "EEXIST"
    assert ioctl_result(ring_vm.vm.fd, uapi.KVM_CREATE_VCPU, kvm.check_extension(uapi.KVM_CAP_MAX_VCPU_ID)) == "EINVAL"


def create_guest_memfd(vm: Vm, size: int) -> int:
    """KVM_CREATE_GUEST_MEMFD; skips where ordinary VMs have none."""
    if not ioctl(vm.fd, uapi.KVM_CHECK_EXTENSION, "KVM_CHECK_EXTENSION", uapi.KVM_CAP_GUEST_MEMFD):
        pytest.skip("no KVM_CAP_GUEST_MEMFD for ordinary VMs")
    # All supported flags: an ordinary VM can use only a file that user space can map, which one of them asks for.
    flags = ioctl(vm.fd, uapi.KVM_CHECK_EXTENSION, "KVM_CHECK_EXTENSION", uapi.KVM_CAP_GUEST_MEMFD_FLAGS)
    create = uapi._kvm_create_guest_memfd(size=size, flags=flags)
    request = uapi.KVM_CREATE_GUEST_MEMFD
    return ioctl(vm.fd, request, "KVM_CREATE_GUEST_MEMFD", ctypes.byref(create), f"size={size:#x}")


def test_no_dirty_logging_of_guest_memfd(bare_vm: Vm) -> None:
    """A memslot with a guest_memfd cannot have KVM_MEM_LOG_DIRTY_PAGES, neither when created nor later (api.rst 4.140)."""
    size = 4 * PAGE
    file = create_guest_memfd(bare_vm, size)
    memory = GuestMemory(BACKINGS["anonymous"], size, FIRST_GPA)
    try:
        region = uapi._kvm_userspace_memory_region2(
            slot=SLOT, guest_phys_addr=FIRST_GPA, memory_size=size, userspace_addr=memory.hva, guest_memfd=file
        )
        region.flags = uapi.KVM_MEM_GUEST_MEMFD
        # KVM offers the capability for this type of VM, so it must accept such a slot.
        assert ioctl_result(bare_vm.fd, uapi.KVM_SET_USER_MEMORY_REGION2, region) == "0"
        region.flags |= uapi.KVM_MEM_LOG_DIRTY_PAGES
        assert ioctl_result(bare_vm.fd, uapi.KVM_SET_USER_MEMORY_REGION2, region) == "EINVAL"
        region.memory_size, region.flags = 0, 0
        assert ioctl_result(bare_vm.fd, uapi.KVM_SET_USER_MEMORY_REGION2, region) == "0"
        region.memory_size, region.flags = size, uapi.KVM_MEM_GUEST_MEMFD | uapi.KVM_MEM_LOG_DIRTY_PAGES
        assert ioctl_result(bare_vm.fd, uapi.KVM_SET_USER_MEMORY_REGION2, region) == "EINVAL"
    finally:
        os.close(file)
        memory.close()


@pytest.fixture
def guest_memfd_checked(host: Host, kvm: Kvm) -> None:
    """Skips where a memslot could get a guest_memfd late, or KVM has none at all."""
    if host.kernel_version < (6, 19):
        pytest.skip("KVM_MEM_GUEST_MEMFD can be set on a memslot before Linux 6.19, and KVM uses freed memory then")
    if not kvm.check_extension(uapi.KVM_CAP_GUEST_MEMFD):
        pytest.skip("no KVM_CAP_GUEST_MEMFD (CONFIG_KVM_GUEST_MEMFD)")


@pytest.mark.usefixtures("guest_memfd_checked")
def test_no_guest_memfd_for_a_logged_slot(manual_vm: ScriptedVm) -> None:
    """KVM_MEM_GUEST_MEMFD cannot be set on a logged memslot, and the attempt changes neither memory nor dirty log."""
    memslot = manual_vm.vm.memslots[SLOT]
    file = create_guest_memfd(manual_vm.vm, memslot.memory.size)
    try:
        manual_vm.write(SLOT, 7, value=7)
        region = uapi._kvm_userspace_memory_region2(
            slot=SLOT, guest_phys_addr=memslot.gpa, memory_size=memslot.memory.size, userspace_addr=memslot.memory.hva,
            guest_memfd=file,
        )  # fmt: skip
        for flags in (uapi.KVM_MEM_GUEST_MEMFD, uapi.KVM_MEM_GUEST_MEMFD | uapi.KVM_MEM_LOG_DIRTY_PAGES):
            region.flags = flags
            assert ioctl_result(manual_vm.vm.fd, uapi.KVM_SET_USER_MEMORY_REGION2, region) == "EINVAL"
        manual_vm.write(SLOT, 9, value=9)
        assert [memslot.memory.words[page * PAGE // 8] for page in (7, 9)] == [7, 9]
        manual_vm.assert_dirty("writes before and after KVM_MEM_GUEST_MEMFD was refused", {SLOT: [7, 9]})
    finally:
        os.close(file)
