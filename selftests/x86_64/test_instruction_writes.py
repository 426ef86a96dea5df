# SPDX-License-Identifier: GPL-2.0-only
"""Writes of x86 instructions, done by the CPU or by KVM's emulator, dirty the gfns that they change.

memory/test_writes.py has what all stores have in common, also for those in stores.py.
"""

import ctypes
from dataclasses import replace

import pytest

from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import PAGE
from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.guest import GuestError
from kvm_util.host import Host
from kvm_util.vcpu import Vcpu
from selftests.stores import (
    NEIGHBOUR,
    NPAGES,
    SLOT,
    SLOT_GPA,
    SPARE_GVA,
    WRITTEN,
    MaxEntries,
    SkipUnemulated,
    Store,
    check_store_twice,
)

PORT = 0xE0

# Instructions with the force emulation prefix: KVM's emulator does them, whatever the backend
EMULATED_STORES = [
    *(Store(f"emulated_store_{size}", size) for size in (1, 2, 4, 8, 16)),
    Store("emulated_push", 8),
    Store("emulated_add", 8),
    Store("emulated_lock_add", 8),
    Store("emulated_xchg", 8),
    Store("emulated_cmpxchg", 8, exchanges=True),
    Store("emulated_lock_cmpxchg", 8, exchanges=True),
    *(Store(f"emulated_lock_cmpxchg_{size}", size, exchanges=True) for size in (1, 2, 4)),
    # Not written as data are: segmented_write_std(), arch/x86/kvm/emulate.c. It refuses fxsave in 64-bit mode.
    Store("emulated_sgdt", 10),
]
EMULATED_FAULTING = {
    "store": Operation("emulated_store_8", 0, 0xA5),
    "add": Operation("emulated_add", 0, 1),
    "locked-add": Operation("emulated_lock_add", 0, 1),
    "compare-and-exchange": Operation("emulated_lock_cmpxchg", 0, 1),
    "push": Operation("emulated_push", 0, 1),
}


@pytest.fixture
def forced_emulation_vm(logged_vm: ScriptedVm, host: Host) -> ScriptedVm:
    """A VM with two logged memslots whose guest may have KVM emulate an instruction."""
    if host.parameters.get("kvm.force_emulation_prefix", "0") in ("0", "N"):
        pytest.skip("KVM's module parameter force_emulation_prefix is off (load kvm with force_emulation_prefix=1)")
    return logged_vm


@pytest.mark.parametrize("store", EMULATED_STORES, ids=str)
def test_emulated_store_is_logged(forced_emulation_vm: ScriptedVm, store: Store) -> None:
    """A store that KVM emulates dirties its gfn, or both where it straddles two pages, and again after each collection."""
    places = [(0, [WRITTEN]), (PAGE - store.size, [WRITTEN])]
    if store.straddles:
        places.append((PAGE - store.size // 2, [WRITTEN, WRITTEN + 1]))
    for offset, pages in places:
        # KVM writes what straddles two pages in two pieces, and pushes each (emulator_write_emulated()).
        check_store_twice(forced_emulation_vm, store, offset, pages, 2)


@pytest.mark.parametrize("name", ["emulated_cmpxchg", "emulated_lock_cmpxchg"])
def test_emulated_failing_cmpxchg_is_logged(forced_emulation_vm: ScriptedVm, name: str) -> None:
    """An emulated compare-and-exchange that fails dirties its gfn, as the CPU's does.

    Commit 910c57dfa4d1, "KVM: x86: Mark target gfn of emulated atomic instruction as dirty".
    """
    forced_emulation_vm.run(Operation(name, forced_emulation_vm.address(SLOT, WRITTEN), 1, count=77))
    forced_emulation_vm.assert_dirty(f"{name} that fails", {SLOT: [WRITTEN]}, 2)
    assert not any(forced_emulation_vm.vm.memslots[SLOT].memory.view)


def test_emulated_load_is_not_logged(forced_emulation_vm: ScriptedVm) -> None:
    """A load that KVM emulates dirties no gfn."""
    vm = forced_emulation_vm
    vm.run(*(Operation("emulated_load", vm.address(SLOT, page)) for page in range(NPAGES)))
    vm.assert_dirty("emulated loads", {})


@pytest.mark.parametrize(("size", "feature"), [(32, "AVX"), (64, "AVX-512")], ids=["32", "64"])
def test_vector_store_is_logged(
    logged_vm: ScriptedVm, skip_unemulated: SkipUnemulated, max_entries: MaxEntries, size: int, feature: str
) -> None:
    """A vector store dirties its gfn, and both gfns where it straddles two pages."""
    components = dict(arch.vector_stores(logged_vm.guest.cpuid)).get(size, 0)
    if not components:
        pytest.skip(f"KVM offers no {feature} here (CPUID)")
    with skip_unemulated("enable_xsave"):
        logged_vm.run(Operation("enable_xsave", 0, components))
    for offset, pages in ((64, [WRITTEN]), (PAGE - size, [WRITTEN]), (PAGE - 5, [WRITTEN, WRITTEN + 1])):
        with skip_unemulated(f"store_{size}"):
            logged_vm.run(Operation(f"store_{size}", logged_vm.address(SLOT, WRITTEN, offset)))
        logged_vm.assert_dirty(f"store of {size} bytes at offset {offset}", {SLOT: pages}, max_entries(size))


def test_xsave_area_is_logged(logged_vm: ScriptedVm, skip_unemulated: SkipUnemulated) -> None:
    """XSAVE dirties all gfns of its area, in one page or in two."""
    if not arch.has_xsave(logged_vm.guest.cpuid):
        pytest.skip("KVM offers no XSAVE here (CPUID)")
    with skip_unemulated("xsave"):
        logged_vm.run(Operation("enable_xsave", 0, 3), Operation("xsave", logged_vm.address(SLOT, WRITTEN)))
    logged_vm.assert_dirty("xsave", {SLOT: [WRITTEN]})
    logged_vm.run(Operation("xsave", logged_vm.address(SLOT, WRITTEN, PAGE - 512)))
    logged_vm.assert_dirty("xsave, with its header in the next page", {SLOT: [WRITTEN, WRITTEN + 1]})


def test_interrupt_frame_is_logged(
    logged_vm: ScriptedVm, skip_unemulated: SkipUnemulated, max_entries: MaxEntries
) -> None:
    """The frame that the CPU pushes to deliver an interrupt dirties its gfn, and both gfns where it straddles two pages."""
    frame = 40
    for below, pages in ((PAGE - 16, [WRITTEN]), (PAGE + 16, [WRITTEN, WRITTEN + 1])):
        for _ in range(2):
            with skip_unemulated("interrupt"):
                logged_vm.run(Operation("interrupt", logged_vm.address(SLOT, WRITTEN, below)))
            logged_vm.assert_dirty(
                f"an interrupt's frame of {frame} bytes below offset {below}", {SLOT: pages}, max_entries(frame)
            )


@pytest.fixture
def loading_vm(request: pytest.FixtureRequest, log_mode: str, name: str) -> ScriptedVm:
    """A VM for the operation *name*, which the CPU or KVM's emulator executes."""
    vm: ScriptedVm = request.getfixturevalue("logged_vm" if name == "load_segment" else "forced_emulation_vm")
    return vm


@pytest.mark.parametrize("name", ["load_segment", "emulated_load_segment"])
def test_segment_accessed_bit_is_logged(loading_vm: ScriptedVm, skip_unemulated: SkipUnemulated, name: str) -> None:
    """Loading a segment dirties the gfn of its descriptor if the accessed bit is to be set, and not if it is set."""
    selector = 0x18
    table = loading_vm.address(SLOT, WRITTEN, 64)
    descriptors = [0, *arch.SEGMENT_DESCRIPTORS, arch.SEGMENT_NOT_ACCESSED]
    slot = loading_vm.vm.memslots[SLOT].memory
    first = WRITTEN * PAGE // 8
    slot.words[first] = (table << 16 | len(descriptors) * 8 - 1) & (1 << 64) - 1
    slot.words[first + 1] = table >> 48
    for index, descriptor in enumerate(descriptors):
        slot.words[first + 8 + index] = descriptor
    # The host's writes unmapped the page: test_execution_is_not_logged() has what that means.
    loading_vm.run(Operation("load", loading_vm.address(SLOT, WRITTEN)))
    loading_vm.collect()
    load = Operation(name, loading_vm.address(SLOT, WRITTEN), selector)
    with skip_unemulated(name):
        loading_vm.run(load)
    assert slot.words[first + 8 + selector // 8] != arch.SEGMENT_NOT_ACCESSED
    loading_vm.assert_dirty("loading a segment that was not accessed", {SLOT: [WRITTEN]})
    loading_vm.run(load)
    loading_vm.assert_dirty("loading it again", {})


@pytest.mark.parametrize("operation", EMULATED_FAULTING.values(), ids=list(EMULATED_FAULTING))
def test_emulated_store_faulting_midway(
    forced_emulation_vm: ScriptedVm, boundary_gva: int, operation: Operation
) -> None:
    """An emulated store that faults in the second of two pages dirties the first one if, and only if, it changed that."""
    before = bytes(forced_emulation_vm.vm.memslots[SLOT].memory.view)
    with pytest.raises(GuestError, match="#PF"):
        forced_emulation_vm.run(replace(operation, address=boundary_gva - 4))
    changed = forced_emulation_vm.changed_pages(SLOT, before)
    assert changed in ([], [WRITTEN])
    forced_emulation_vm.assert_dirty(f"{operation.name} across the end of writable memory", {SLOT: changed})


def test_string_store_faulting_midway(
    logged_vm: ScriptedVm, skip_unemulated: SkipUnemulated, max_entries: MaxEntries
) -> None:
    """A string store that runs into an unmapped page dirties the gfns before it."""
    logged_vm.map_at(SPARE_GVA - 2 * PAGE, SLOT_GPA + WRITTEN * PAGE, 2)
    with skip_unemulated("rep_stosq"), pytest.raises(GuestError, match="#PF"):
        logged_vm.run(Operation("rep_stosq", SPARE_GVA - PAGE - 16, 1, PAGE))
    logged_vm.assert_dirty(
        "rep stosq into a page that is not mapped", {SLOT: [WRITTEN, WRITTEN + 1]}, max_entries(PAGE // 8)
    )


@pytest.mark.parametrize("name", ["cmpxchg", "lock_cmpxchg", "lock_cmpxchg16b"])
def test_failing_cmpxchg_is_logged(logged_vm: ScriptedVm, skip_unemulated: SkipUnemulated, name: str) -> None:
    """A compare-and-exchange that fails dirties its gfn, for the CPU writes the old value back (Intel SDM, CMPXCHG).

    KVM's emulator has to as well (commit 910c57dfa4d1).
    """
    with skip_unemulated(name):
        logged_vm.run(Operation(name, logged_vm.address(SLOT, WRITTEN), 1, count=77))
    logged_vm.assert_dirty(f"{name} that fails", {SLOT: [WRITTEN]})
    assert not any(logged_vm.vm.memslots[SLOT].memory.view)


def test_string_store_over_many_pages(logged_vm: ScriptedVm, max_entries: MaxEntries) -> None:
    """String stores dirty each gfn that they pass, upwards, downwards and across memslots; a copy dirties its target only."""
    words = PAGE // 8
    most = max_entries(words)
    logged_vm.run(Operation("rep_stosq", logged_vm.address(SLOT, NPAGES - 2, 16), 1, 3 * words))
    logged_vm.assert_dirty("rep stosq", {SLOT: [NPAGES - 2, NPAGES - 1], NEIGHBOUR: [0, 1]}, most)
    logged_vm.run(Operation("rep_stosq_down", logged_vm.address(SLOT, 4, 16), 1, 3 * words))
    logged_vm.assert_dirty("rep stosq downwards", {SLOT: [1, 2, 3, 4]}, most)
    logged_vm.run(Operation("rep_movsq", logged_vm.address(SLOT, 8), logged_vm.address(NEIGHBOUR, 8), 2 * words))
    logged_vm.assert_dirty("rep movsq", {SLOT: [8, 9]}, most)


@pytest.mark.parametrize("length", [16, 200], ids=["one-page", "two-pages"])
def test_string_input_from_port_is_logged(logged_vm: ScriptedVm, length: int) -> None:
    """User space's answer to a string input (KVM_EXIT_IO), which KVM writes to guest memory, dirties its gfns."""

    def answer(vcpu: Vcpu) -> bool:
        run = vcpu.run
        if run.exit_reason != uapi.KVM_EXIT_IO or run.io.direction != uapi.KVM_EXIT_IO_IN or run.io.port != PORT:
            return False
        ctypes.memset(ctypes.addressof(run) + run.io.data_offset, 0x5A, run.io.size * run.io.count)
        return True

    start = logged_vm.address(SLOT, WRITTEN, PAGE - 100)
    logged_vm.run(Operation("rep_insb", start, PORT, length), on_exit=answer)
    pages = [WRITTEN] if length <= 100 else [WRITTEN, WRITTEN + 1]
    logged_vm.assert_dirty(f"rep insb of {length} bytes", {SLOT: pages}, length)
    memory = logged_vm.vm.memslots[SLOT].memory.view
    first = WRITTEN * PAGE + PAGE - 100
    assert bytes(memory[first : first + length]) == b"\x5a" * length


def test_string_load_is_not_logged(logged_vm: ScriptedVm) -> None:
    """A string load dirties no gfn."""
    logged_vm.run(Operation("rep_lodsb", logged_vm.address(SLOT, 0), count=4 * PAGE))
    logged_vm.assert_dirty("rep lodsb", {})
