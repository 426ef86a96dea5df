# SPDX-License-Identifier: GPL-2.0-only
"""Tests that run in another kernel: finds the kernel, and prepares the session that boots it.

Imports that only this needs are local: the other kernel loads this file too, and there they would take a second or two of
emulated time.
"""

import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.command_line import SETTING_PARSERS, soak_of
from harness.early_collection import matching_tests, no_test_matches
from harness.failure_report import column, suite_line, this_pytest
from harness.journal_writer import begin
from harness.kernel_options import AUTO, LONGEST, kernel_options, machine_numbers, options_in_kernel, split_tests
from harness.planned_tests import PlannedTests
from harness.run_report import Facts, RunReport
from harness.run_state import INTERRUPTION, NO_LOCAL_KERNEL, REMOTE_TESTS, RESUMED, SETTINGS, TARGET
from harness.selection import DIMENSIONS
from kvm_util.host_limits import HostLimit
from kvm_util.ioctl import KvmError
from kvm_util.kvm import DEFAULT_DEVICE, Kvm, KvmUnavailable
from kvm_util.memory import size_text
from runner.errors import CANNOT_TEST, CannotTest
from runner.store import say

if TYPE_CHECKING:
    from runner.target import Target


def needs_kernel(option: Any) -> bool:
    """Whether the tests on KVM run in another kernel: a named one, or a local one if this host has no usable KVM."""
    if option.kernel is None:
        return False
    if option.kernel != AUTO:
        return True
    why = _why_not_here(option)
    if why is not None:
        say(f"KVM cannot be used on this host ({why}): the tests that need it run in a kernel of their own, in QEMU")
    return why is not None


def choose_kernel(config: pytest.Config) -> int | None:
    """Find the kernel, and remove the tests that run there from this session's arguments.

    :returns: the exit status if there is nothing to run; None to continue
    """
    option = config.option
    tests, here = split_tests(config)
    try:
        number, with_threads = matching_tests(option, [*DIMENSIONS, "vcpus"], tests) if tests else (0, 0)
        if not number and tests:
            if not here:
                raise pytest.UsageError(no_test_matches(option, tests))
            tests = []
        if not tests:
            config.args = here
            return None
        target = _find_target(option, number, with_threads)
    except (CannotTest, HostLimit, OSError, RuntimeError) as error:
        if option.kernel == AUTO:
            config.stash[NO_LOCAL_KERNEL] = f"to run under emulation instead: {error}"
            return None
        print(f"cannot be tested: {error}", file=sys.stderr)
        return CANNOT_TEST
    config.args = here
    if not here:
        # One process in the kernel: under emulation two would not be faster.
        if getattr(option, "numprocesses", None) and option.kernel != AUTO:
            say("-n is not used: one process runs the tests in the kernel")
        option.numprocesses, option.dist, option.tx = 0, "no", []
    config.stash[TARGET] = target
    config.stash[REMOTE_TESTS] = tests
    return None


def _find_target(option: Any, tests: int, with_threads: int) -> "Target":
    """Find the kernel and the machines to run in; under emulation, set the sizes that the user did not give.

    :param tests: how many there are at most
    :param with_threads: how many of them start threads
    :raises CannotTest: something is missing or does not fit
    """
    from runner.qemu import Machine
    from runner.target import EMULATION_SIZES, find_target, number_of_machines, with_one_cpu

    numbers = machine_numbers(option)
    debugfs = " debugfs=on" if option.gcov else ""  # the last one counts
    machine = Machine(numbers["vm_memory"], numbers["vm_cpus"], f"{option.append or ''}{debugfs}")
    limit = min(numbers["time_limit"] + (soak_of(option) or 0), LONGEST)
    parameters = option.kvm_params or ""
    kernel = None if option.kernel == AUTO else option.kernel
    target = find_target(kernel, parameters, option.accel, option.cpu_model, option.qemu, machine, limit)
    target = replace(target, machines=number_of_machines(target, numbers["machines"], tests))
    if target.qemu.emulated:
        if option.vm_cpus is None and not option.full:  # all cells start threads
            target = with_one_cpu(target, tests, with_threads)
        for name, size in EMULATION_SIZES.items():
            if getattr(option, name) is None:
                setattr(option, name, size)
    return target


def _why_not_here(option: Any) -> str | None:
    """Why this host's own KVM cannot be used."""
    try:
        with Kvm(option.kvm_device or DEFAULT_DEVICE) as kvm:
            kvm.create_vm().close()
    except (KvmUnavailable, KvmError) as error:
        return str(error)
    return None


def prepare_remote(config: pytest.Config) -> None:
    """Register the session that runs the tests in the kernel that was found."""
    from harness.remote import RemoteSession

    target = config.stash[TARGET]
    option = config.option
    results = Path(option.results)
    # What is known before the kernel boots; the session in it sends the rest.
    host = {"kernel": target.kernel.release, "backend": target.qemu.vendor, "parameters": target.parameters}
    facts = Facts(host, asdict(config.stash[SETTINGS]), [], str(target.qemu), machine=target.data)
    report = RunReport(results, facts)
    # With auto it is no error if all selected tests run on this host.
    report.requires_kvm_tests, report.nothing_ran_status = option.kernel != AUTO, CANNOT_TEST
    options = options_in_kernel(
        option,
        [*DIMENSIONS, "vcpus", "soak", *SETTING_PARSERS],
        ["full", "thorough", "require_kvm", "no_known_bugs", "emit_c"],
    )
    reproduce_command = f"{this_pytest()} {shlex.join(kernel_options(option, target.kernel.image))}"
    tests = config.stash[REMOTE_TESTS]
    config.pluginmanager.register(report, "run-report")
    begin(config, report)
    planned = PlannedTests({}, config.stash[INTERRUPTION])
    config.pluginmanager.register(planned, "planned-tests")
    session = RemoteSession(target, options, reproduce_command, tests, bool(config.args), results, report, planned)
    if RESUMED in config.stash:
        session.resume(config.stash[RESUMED].ended)
    config.pluginmanager.register(session, "remote-session")


def header(config: pytest.Config) -> list[str]:
    """The lines about the kernel, the machine and the tests."""
    target, settings = config.stash[TARGET], config.stash[SETTINGS]
    memory = (
        f"{size_text(settings.test_mem)} of test memory (--test-mem), {settings.iterations} iterations (--iterations)"
    )
    chosen = f"sizes    {memory}, rings of {settings.ring_count} entries (--ring-count)"
    remote_tests = config.stash[REMOTE_TESTS]
    tests = f"tests    {' '.join(remote_tests)}"
    here = [f"         and on this host {' '.join(config.args)}"] if config.args else []
    lines = (suite_line(), *target.lines, chosen, tests, *here, f"seed     {config.option.seed}")
    return [part for line in lines for part in column(line)]
