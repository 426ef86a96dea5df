# SPDX-License-Identifier: GPL-2.0-only
"""Guest programs: shared variables, calls, and reports of aborts, exceptions and shutdowns."""

from collections.abc import Iterator

import pytest

from kvm_util.arch import current as arch
from kvm_util.arch.x86_64 import paging
from kvm_util.guest import GuestError, GuestVm, Ucall
from kvm_util.guest_program import GuestProgram
from kvm_util.kvm import Kvm


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[GuestVm]:
    with GuestVm(kvm, GuestProgram.load("self_test")) as vm:
        yield vm


def test_guest_and_host_share_variables(guest: GuestVm) -> None:
    """Host and guest see each other's writes to the program's variables."""
    vcpu = guest.add_vcpu()
    for question in (41, 2**63):
        guest.write_symbol("question", question)
        assert guest.run_until_ucall(vcpu) is Ucall.SYNC
        assert guest.read_symbol("answer") == question + 1
    guest.write_symbol("question", 0)
    assert guest.run_until_ucall(vcpu) is Ucall.DONE


@pytest.mark.parametrize(
    ("entry", "report"),
    [
        ("aborts", r"self_test aborted: values differ \(0x11, 0x22\)"),
        ("page_fault", r"#PF page fault, error code 0x2, rip={entry:#x} rsp=0x\w+ .*write of 0x10 \(not mapped\)"),
        ("general_protection", r"#GP general protection, error code 0x0"),
        ("lost_stack", r"#UD invalid opcode, .*rsp=0x0 "),
        ("triple_fault", r"KVM_EXIT_SHUTDOWN \(triple fault\)[\s\S]*rip="),
        ("unknown_call", r"unknown call 99"),
    ],
)
def test_unexpected_guest_exit(guest: GuestVm, entry: str, report: str) -> None:
    """An abort, exception, shutdown or unknown call is an error with its cause and the guest's registers."""
    report = report.format(entry=guest.program.symbols[entry])
    with pytest.raises(GuestError, match=report):
        guest.run_until_ucall(guest.add_vcpu(entry=entry))


@pytest.mark.parametrize("name", arch.GUEST_MODES)
def test_guest_runs_in_each_mode(kvm: Kvm, name: str) -> None:
    """A guest runs in each guest mode that KVM supports."""
    mode = arch.GUEST_MODES[name]
    if reason := mode.missing(kvm):
        pytest.skip(reason)
    with GuestVm(kvm, GuestProgram.load("self_test"), name) as guest:
        guest.write_symbol("question", 1)
        assert guest.run_until_ucall(guest.add_vcpu()) is Ucall.SYNC


def test_refused_five_level_paging(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode with 5 levels is missing if KVM refuses them, also where its CPUID has LA57."""
    monkeypatch.setattr(type(kvm.supported_cpuid), "has_la57", lambda _cpuid: True)
    monkeypatch.setattr(paging, "accepts_la57", lambda _fd, _cpuid: False)
    assert arch.GUEST_MODES["57bit-4k"].missing(kvm) == (
        "57bit-4k: KVM refuses 5-level paging here (KVM_SET_SREGS with CR4.LA57)"
    )
    assert arch.GUEST_MODES["48bit-4k"].missing(kvm) is None
