# SPDX-License-Identifier: GPL-2.0-only
"""Plugin: the fixtures that all tests share."""

import errno
import fcntl
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.modes import LOG_MODES
from harness.collection import log_modes_of
from harness.command_line import soak_of
from harness.run_state import SETTINGS
from harness.selection import PlannedCell
from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.host import (
    EMULATING_BACKENDS,
    Host,
    missing_facts,
    opt_out_of_numa_balancing,
    this_host,
    unblock_kick_signals,
)
from kvm_util.kvm import Kvm, KvmUnavailable
from kvm_util.memory import BACKINGS
from runner.guest_session import guest_session


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    """The run's settings, from the command line."""
    return pytestconfig.stash[SETTINGS]


@pytest.fixture(scope="session")
def host() -> Host:
    """The facts of this host."""
    return this_host()


@pytest.fixture(scope="session")
def thorough(pytestconfig: pytest.Config) -> bool:
    """Whether tests that have a long form run it (--thorough)."""
    return bool(pytestconfig.option.thorough)


@pytest.fixture(scope="session")
def soak(pytestconfig: pytest.Config) -> int | None:
    """For how many seconds random operation sequences run (--soak); None for the usual number of rounds."""
    return soak_of(pytestconfig.option)


@pytest.fixture(scope="session")
def emulated_cpu(pytestconfig: pytest.Config) -> bool:
    """Whether QEMU's TCG emulates the CPU of this kernel, so that everything is slow."""
    session = guest_session(pytestconfig)
    return session is not None and session.emulated


@pytest.fixture(scope="session")
def emulates(host: Host) -> bool:
    """Whether this backend emulates each instruction of the guest."""
    return host.backend in EMULATING_BACKENDS


@pytest.fixture
def draw(request: pytest.FixtureRequest, settings: Settings) -> random.Random:
    """Random numbers that the run's seed and the test's name decide."""
    return random.Random(f"{settings.seed}/{request.node.name}")


@pytest.fixture(scope="session")
def kvm(settings: Settings, host: Host) -> Iterator[Kvm]:
    """The open KVM device; a test that uses it counts as a test on KVM."""
    try:
        device = Kvm(settings.kvm_device)
    except KvmUnavailable as error:
        pytest.skip(str(error))
    unblock_kick_signals()
    with device:
        if reason := missing_facts(host) or opt_out_of_numa_balancing():
            pytest.skip(reason)
        yield device


@pytest.fixture
def log_mode(request: pytest.FixtureRequest, kvm: Kvm) -> str:
    """The name of each log mode of the marker ``log_modes``, or of all; skips if KVM does not support it."""
    name = getattr(request, "param", None) or log_modes_of(request.node)[0]
    if reason := LOG_MODES[name].supported(kvm):
        pytest.skip(reason)
    return name


@pytest.fixture
def zap_all_quirk(kvm: Kvm) -> int:
    """The quirk with which KVM zaps the SPTEs of all memslots when one is deleted or moved, for KVM_CAP_DISABLE_QUIRKS2."""
    if not kvm.check_extension(uapi.KVM_CAP_DISABLE_QUIRKS2) & arch.SLOT_ZAP_ALL_QUIRK:
        pytest.skip("this KVM has no quirk that zaps all memslots (on x86 it came with Linux 6.12)")
    return arch.SLOT_ZAP_ALL_QUIRK


@pytest.fixture
def prefault(kvm: Kvm) -> None:
    """For tests that call KVM_PRE_FAULT_MEMORY."""
    if not kvm.check_extension(uapi.KVM_CAP_PRE_FAULT_MEMORY):
        pytest.skip(
            "no KVM_CAP_PRE_FAULT_MEMORY: it came with Linux 6.11, for CPUs that translate guest addresses (TDP)"
        )


@pytest.fixture
def cell(kvm: Kvm, planned_cell: PlannedCell) -> Iterator[Cell]:
    """The cell to test; skips if the host lacks something for it."""
    if planned_cell.missing:
        pytest.skip(planned_cell.missing)
    backing = BACKINGS[planned_cell.cell.backing]
    with _huge_page_pool() if backing.hugetlb else nullcontext():
        yield planned_cell.cell


# Called with a backing's name and a size
Provided = Callable[[str, int], AbstractContextManager[None]]


@pytest.fixture(scope="session")
def provided() -> Provided:
    """Call it for a context in which the host provides that memory, and no other test takes its huge pages; or skip."""

    @contextmanager
    def provided(name: str, size: int) -> Iterator[None]:
        backing = BACKINGS[name]
        if reason := backing.missing(0):
            pytest.skip(reason)
        with _huge_page_pool() if backing.hugetlb else nullcontext():
            if reason := backing.missing(size):
                pytest.skip(reason)
            yield

    return provided


@contextmanager
def _huge_page_pool() -> Iterator[None]:
    """One test at a time: the pool has enough pages for one, and xdist's workers share it."""
    lock = os.open("/sys/kernel/mm/hugepages", os.O_RDONLY)
    try:
        # Without a deadline: the holder ends in time, as each of its waits has a deadline, and a dead process holds no lock.
        # Polling instead would be unfair to those that wait.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            # CONFIG_FILE_LOCKING, which a small kernel that is booted for one session may lack
            if error.errno != errno.ENOSYS:
                raise
        yield
    finally:
        os.close(lock)
