# SPDX-License-Identifier: GPL-2.0-only
"""Tests shared by several machines: who runs which, what a machine that dies costs, and the verdict of all."""

import base64
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness.assigned_tests import NO_MORE, STOP, AssignedTests
from harness.boot import Boot, unseen_reports
from harness.interruption import Interruption
from harness.planned_tests import PlannedTests
from harness.remote import RemoteSession
from harness.run_report import Facts, KernelReport, RunReport
from runner import target as targets
from runner.boot_outcome import BootOutcome, Diagnosis
from runner.emulator import Emulator
from runner.errors import CannotTest
from runner.guest_init import INIT_MARKER
from runner.qemu import Machine, Qemu
from runner.target import Target, number_of_machines, with_one_cpu

TESTS = ["a", "b", "c", "d", "e", "f"]
FAULT = Diagnosis(BootOutcome.EMULATOR_FAULT, "Oops: int3")
PANIC = Diagnosis(BootOutcome.PANIC, "Kernel panic")
FINISHED = Diagnosis(BootOutcome.FINISHED, "")


class FakeBoot(Boot):
    """A boot without a machine; it keeps the orders that the session in it would get."""

    def __init__(self, number: int, from_end: bool) -> None:
        self.log, self.from_end = f"kernel-{number}.log", from_end
        self.tests, self.given, self.running, self.ending = None, [], None, False
        self.status, self.output, self.reports = 0, "", []
        self.orders: list[str] = []
        self._machine = cast(Any, SimpleNamespace(order=self.orders.append, close=lambda: None, console=lambda: ""))

    def close(self) -> None:
        """There is nothing to end."""


class Run:
    """A RemoteSession with machines that do what a test says.

    :param threads: the tests that start threads; if there are any, every second machine has fewer CPUs
    :ivar reports: test, when, outcome of each report that it passed on
    """

    def __init__(self, results: Path, machines: int, maxfail: int = 0, threads: str = "") -> None:
        qemu = Qemu(Emulator(("qemu",), "10.0", "here"), "tcg", "max", "kvm_amd")
        kernel: Any = SimpleNamespace(release="6.12", image=results)
        few_cpus = Machine(1, 1, "") if threads else None
        target = Target(kernel, [], {}, {}, qemu, Machine(1, 2, ""), 60, machines, few_cpus)
        self.threads = list(threads)
        self.report = RunReport(results, Facts({}, {}, []))
        planned = PlannedTests({}, Interruption())
        self.session = cast(Any, RemoteSession(target, [], "", [], False, results, self.report, planned))
        self.reports: list[tuple[str, str, str]] = []
        nothing: Any = SimpleNamespace(**dict.fromkeys(("forget", "announce", "update"), lambda *_: None))
        self.session._progress = nothing
        self.session._terminal = SimpleNamespace(
            pytest_runtest_logstart=lambda **_: None, ensure_newline=lambda: None, write_line=lambda _: None
        )
        self.session._session = SimpleNamespace(testscollected=0, testsfailed=0)
        hook = SimpleNamespace(
            pytest_runtest_logreport=self._log,
            pytest_runtest_logfinish=lambda **_: None,
            pytest_report_from_serializable=lambda config, data: pytest.TestReport(**data),  # noqa: ARG005
        )
        manager = SimpleNamespace(subset_hook_caller=lambda *_: lambda **_: None)
        self.session._config = SimpleNamespace(
            hook=hook, option=SimpleNamespace(maxfail=maxfail), pluginmanager=manager
        )
        self.session._boot = self.boot
        for number in range(machines):
            self.boot(None, number % 2 == 1)

    def boot(self, _archive: object, from_end: bool) -> None:
        """Boot a machine; it has not collected its tests."""
        self.session._booted += 1
        self.session._boots.append(FakeBoot(self.session._booted, from_end))

    @property
    def boots(self) -> list[FakeBoot]:
        """The machines that run."""
        return list(self.session._boots)

    def collect(self, boot: FakeBoot, tests: list[str] = TESTS) -> None:
        """The session in a machine has collected its tests."""
        items = {test: [["file.py", 0, test], []] for test in tests}
        self.session.handle_message(boot, {"items": items, "threads": self.threads})

    def begin(self, boot: FakeBoot) -> None:
        """A machine begins with its next test."""
        self.session.handle_message(boot, {"start": boot.given[0]})

    def run(self, boot: FakeBoot, outcome: str = "passed") -> None:
        """A machine runs its next test."""
        self.begin(boot)
        for when in ("call", "teardown"):
            report: dict[str, Any] = {
                "nodeid": boot.running, "location": ("file.py", 0, boot.running), "keywords": {}, "longrepr": None,
                "outcome": outcome if when == "call" else "passed", "when": when,
            }  # fmt: skip
            self.session.handle_message(boot, {"report": report})

    def end(self, boot: FakeBoot, how: Diagnosis) -> None:
        """A machine ends."""
        self.session._end(boot, how, None)

    def _log(self, report: pytest.TestReport) -> None:
        self.session._session.testsfailed += report.failed
        self.reports.append((report.nodeid, str(report.when), report.outcome))

    @property
    def outcomes(self) -> dict[str, str]:
        """The outcome of each test that ran."""
        return {test: outcome for test, when, outcome in self.reports if when == "call"}


class Items:
    """A pytest session with items a, b and c, which only notes what it runs.

    :ivar ran: name of each item, and of the one that it was told follows
    """

    testsfailed = 0
    shouldfail = shouldstop = False

    def __init__(self) -> None:
        self.ran: list[tuple[str, str | None]] = []
        config = SimpleNamespace(hook=SimpleNamespace(pytest_runtest_protocol=self._run))
        self.items = [SimpleNamespace(name=name, config=config) for name in "abc"]

    def _run(self, item: Any, nextitem: Any) -> None:
        self.ran.append((item.name, nextitem and nextitem.name))


@pytest.fixture
def two(tmp_path: Path) -> Run:
    """A run with two machines that have both collected the tests: a and b are in the first, f and e in the second."""
    run = Run(tmp_path, 2)
    for boot in run.boots:
        run.collect(boot)
    return run


@pytest.fixture
def unlike(tmp_path: Path) -> Run:
    """A run with two machines that have both collected the tests; the second has few CPUs, and b, d and f start threads."""
    run = Run(tmp_path, 2, threads="bdf")
    for boot in run.boots:
        run.collect(boot)
    return run


@pytest.mark.parametrize(
    ("orders", "ran"),
    [
        (["2", "0", NO_MORE], [("c", "a"), ("a", None)]),
        ([NO_MORE], []),
        (["1", NO_MORE], [("b", None)]),
        (["0", "1", STOP, "2", NO_MORE], [("a", "b")]),
        (["0", STOP], []),
    ],
)
def test_orders_to_a_kernel(tmp_path: Path, orders: list[str], ran: list[tuple[str, str | None]]) -> None:
    """A session in a kernel runs what it was given, in that order, and each test knows the next; STOP drops what waits."""
    (tmp_path / "port").write_text("".join(f"{order}\n" for order in orders))
    plugin, session = AssignedTests(str(tmp_path / "port")), Items()
    assert plugin.pytest_runtestloop(cast(pytest.Session, session)) is True
    plugin.pytest_unconfigure()
    assert session.ran == ran


def test_each_test_runs_in_one_machine(two: Run) -> None:
    """A machine has one test running and one waiting; the faster machine gets more; at the end both are told so."""
    first, second = two.boots
    assert (first.given, second.given) == (["a", "b"], ["f", "e"])
    for _ in range(3):
        two.run(second)
    assert second.given == ["c"]
    two.run(second)
    two.run(first)
    two.run(first)
    assert first.orders == ["0", "1", NO_MORE]
    assert second.orders == ["5", "4", "3", "2", NO_MORE]
    assert two.outcomes == dict.fromkeys(TESTS, "passed")
    for boot in two.boots:
        two.end(boot, FINISHED)
    assert two.session._worst_end() == FINISHED


def test_tests_with_threads_have_their_machine(unlike: Run) -> None:
    """A machine with few CPUs runs no test that starts threads; the other one runs those first, and then any."""
    first, second = unlike.boots
    assert (first.given, second.given) == (["b", "d"], ["e", "c"])
    unlike.run(second)
    unlike.run(second)
    assert (second.given, second.ending) == (["a"], True)
    while first.given:
        unlike.run(first)
    assert first.orders == ["1", "3", "5", NO_MORE]
    unlike.run(second)
    assert unlike.outcomes == dict.fromkeys(TESTS, "passed")


def test_one_machine_keeps_the_order(tmp_path: Path) -> None:
    """A single machine, or several of the same kind, run the tests in the order in which they were collected."""
    run = Run(tmp_path, 1)
    run.threads = ["c"]
    (boot,) = run.boots
    run.collect(boot)
    while boot.given:
        run.run(boot)
    assert list(run.outcomes) == TESTS


def test_all_tests_help_a_slow_machine(tmp_path: Path) -> None:
    """A machine with several CPUs takes tests without threads too, once the others run."""
    run = Run(tmp_path, 2, threads="b")
    for boot in run.boots:
        run.collect(boot)
    assert [boot.given for boot in run.boots] == [["b", "a"], ["f", "e"]]


def test_dead_machine_with_threads(unlike: Run) -> None:
    """If no machine that runs can take the tests that a dead one leaves, another one is booted for them."""
    first, second = unlike.boots
    while second.given:
        unlike.run(second)
    unlike.begin(first)
    unlike.end(first, PANIC)
    again = unlike.boots[-1]
    unlike.collect(again)
    unlike.run(again)
    unlike.begin(again)
    unlike.end(again, PANIC)  # nothing is left
    unlike.end(second, FINISHED)
    assert unlike.boots == []
    assert unlike.outcomes == dict.fromkeys("ace", "passed") | {"b": "failed", "d": "passed", "f": "failed"}
    assert unlike.session._worst_end() == PANIC


def test_death_beside_a_machine_with_few_cpus(unlike: Run) -> None:
    """After the death of the only machine with several CPUs one like it is booted, whatever the others can still run."""
    first, second = unlike.boots
    unlike.begin(first)
    unlike.end(first, PANIC)
    assert [boot.from_end for boot in unlike.boots] == [True, False]
    again = unlike.boots[-1]
    unlike.collect(again)
    for boot in (second, again):
        while boot.given:
            unlike.run(boot)
        unlike.end(boot, FINISHED)
    assert (unlike.boots, unlike.session._booted) == ([], 3)
    assert unlike.outcomes == dict.fromkeys(TESTS, "passed") | {"b": "failed"}


def test_dead_machine_loses_one_test(two: Run) -> None:
    """The test that ran in a kernel that panics fails, the one that waited there runs elsewhere, and the kernel is bad."""
    first, second = two.boots
    two.begin(first)
    two.end(first, PANIC)
    while second.given:
        two.run(second)
    two.end(second, FINISHED)
    assert two.outcomes == dict.fromkeys(TESTS, "passed") | {"a": "failed"}
    worst = two.session._worst_end()
    two.session._finish_report(worst)
    assert worst == PANIC
    assert "KERNEL 6.12 (kernel-1.log): the kernel panicked: Kernel panic" in two.report.notes


def test_machine_dead_between_tests(two: Run) -> None:
    """No test fails that had not begun when its machine ended."""
    first, second = two.boots
    two.end(first, PANIC)
    while second.given:
        two.run(second)
    assert two.outcomes == dict.fromkeys(TESTS, "passed")


def test_killed_machine_fails_no_test(two: Run) -> None:
    """A QEMU that was killed says nothing about its test, which does not run again; the kernel cannot be tested."""
    first, second = two.boots
    two.begin(first)
    two.end(first, Diagnosis(BootOutcome.NOT_TESTED, "QEMU ended"))
    while second.given:
        two.run(second)
    two.end(second, FINISHED)
    assert two.outcomes == dict.fromkeys(TESTS[1:], "passed")
    assert two.session._worst_end().outcome is BootOutcome.NOT_TESTED


def test_emulator_fault_of_one_machine(two: Run) -> None:
    """After a fault of the emulator the machine boots again, its tests run there or in the other one, and nothing is bad."""
    first, second = two.boots
    two.run(first)
    two.begin(first)
    two.end(first, FAULT)
    assert len(two.boots) == 2
    while second.given:
        two.run(second)
    two.collect(two.boots[1])
    assert two.boots[1].orders == [NO_MORE]
    for boot in two.boots:
        two.end(boot, FINISHED)
    assert two.outcomes == dict.fromkeys(TESTS, "passed")
    assert two.session._worst_end() == FINISHED


@pytest.mark.parametrize(("machines", "faulty", "order"), [(1, 0, "abcdef"), (2, 0, "ab"), (2, 1, "fe")])
def test_order_after_an_emulator_fault(tmp_path: Path, machines: int, faulty: int, order: str) -> None:
    """A machine that boots again goes on where the one before it was in the list."""
    run = Run(tmp_path, machines)
    for boot in run.boots:
        run.collect(boot)
    run.begin(run.boots[faulty])
    run.end(run.boots[faulty], FAULT)
    again = run.boots[-1]
    run.collect(again)
    ran = list(again.given)
    while machines == 1 and again.given:
        run.run(again)
        ran += [test for test in again.given if test not in ran]
    assert "".join(ran) == order


def test_many_emulator_faults(two: Run) -> None:
    """The run boots twice more, and not again; the tests that are left make it one that cannot be tested."""
    while two.boots:
        two.end(two.boots[0], FAULT)
    assert two.session._booted == 4
    assert two.session._worst_end() == FAULT


def test_fault_after_the_last_test(two: Run) -> None:
    """A fault of the emulator that costs no test is none of the verdict, and nothing boots again."""
    first, second = two.boots
    while second.given:
        two.run(second)
    two.run(first)
    two.run(first)
    two.end(first, FAULT)
    two.end(second, FINISHED)
    assert not two.boots
    assert two.session._worst_end() == FINISHED


def test_maxfail_stops_all_machines(tmp_path: Path) -> None:
    """--maxfail counts the failures of all machines; then each ends after the test that runs there."""
    run = Run(tmp_path, 3, maxfail=2)
    first, second, third = run.boots
    run.collect(first)
    run.collect(second)
    run.run(first, "failed")
    run.run(second, "failed")
    assert (first.orders[-1], second.orders[-1], third.orders) == (STOP, STOP, [STOP])
    run.collect(third)
    assert third.orders == [STOP]
    for boot in run.boots:
        run.end(boot, FINISHED)
    assert len(run.outcomes) == 2


def test_machines_with_different_tests(two: Run) -> None:
    """Machines that have collected different tests cannot share them."""
    with pytest.raises(CannotTest, match="the machines have collected different tests"):
        two.collect(two.boots[0], TESTS[:3])


@pytest.mark.parametrize(
    ("outcomes", "worst"),
    [
        (["FINISHED", "PANIC"], "PANIC"),
        (["NOT_TESTED", "HANG", "FINISHED"], "HANG"),
        (["FINISHED", "NO_BOOT"], "NO_BOOT"),
        (["OOPS", "PANIC"], "OOPS"),
    ],
)
def test_verdict_of_all_machines(tmp_path: Path, outcomes: list[str], worst: str) -> None:
    """A bad end outweighs one that says nothing about the kernel, and that outweighs a good one; the first of two counts."""
    run = Run(tmp_path, len(outcomes))
    for boot, outcome in zip(run.boots, outcomes, strict=True):
        run.end(boot, Diagnosis(BootOutcome[outcome], ""))
    assert run.session._worst_end().outcome.name == worst


def test_reports_of_each_kernel(two: Run) -> None:
    """A report in the kernel log has the tests that ran in its machine, and the name of that machine's log."""
    for boot, test in zip(two.boots, "ac", strict=True):
        warn = vars(KernelReport("WARN", "WARNING: x", ["WARNING: x"], None, [test]))
        two.session.handle_message(boot, {"kernel_log": [warn]})
    for boot in two.boots:
        two.end(boot, FINISHED)
    assert [(one.log, one.tests) for one in two.report.kernel_reports] == [
        ("kernel-1.log", ["a"]),
        ("kernel-2.log", ["c"]),
    ]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first", "last"])
def test_facts_of_the_first_machine(tmp_path: Path, order: tuple[int, int]) -> None:
    """The number of CPUs among the results is that of the machine for all tests, whichever machine boots first."""
    run = Run(tmp_path, 2, threads="b")
    for number in order:
        environment = {"host": {"cpus": 2 - number}, "settings": {}, "cells": []}
        run.session.handle_message(run.boots[number], {"environment": environment})
    assert run.report.facts.host == {"cpus": 2}


def test_counters_of_each_machine(two: Run, tmp_path: Path) -> None:
    """The counters that a machine sends (--gcov) are kept in a folder of that machine."""
    for boot, data in zip(two.boots, (b"1", b"2"), strict=True):
        two.session.handle_message(boot, {"gcov": ["/linux/arch/x86/kvm/x.gcda", base64.b64encode(data).decode()]})
    kept = {path.relative_to(tmp_path).parts[1]: path.read_bytes() for path in tmp_path.rglob("*.gcda")}
    assert kept == {"kernel-1": b"1", "kernel-2": b"2"}


def test_splats_that_no_test_saw() -> None:
    """A WARN while KVM is loaded is reported, one that a test saw is not reported again, and one of the boot is not here."""
    titles = ("early", INIT_MARKER, "loading", "seen")
    lines = [f"[    1.0] {'' if title == INIT_MARKER else 'WARNING: '}{title}" for title in titles]
    seen = [KernelReport("WARN", "WARNING: seen", ["WARNING: seen"], None, ["a test"])]
    (report,) = unseen_reports("\n".join(lines), seen, ["b"], "kernel-2.log")
    assert (report.title, report.known_bug, report.tests, report.log) == (
        "WARNING: loading",
        None,
        ["b"],
        "kernel-2.log",
    )


@pytest.mark.parametrize(
    ("accel", "asked", "tests", "cpus", "free", "number"),
    [
        ("tcg", 0, 1000, 2, 20000, 2),
        ("tcg", 0, 1000, 2, 5000, 1),
        ("tcg", 0, 15, 2, 20000, 1),
        ("tcg", 0, 1000, 64, 200000, 16),
        ("tcg", 3, 1000, 2, 20000, 3),
        ("tcg", 3, 2, 2, 20000, 2),
        ("kvm", 0, 1000, 8, 20000, 4),
        ("kvm", 0, 1000, 1, 20000, 1),
    ],
)
def test_number_of_machines(
    monkeypatch: pytest.MonkeyPatch, accel: str, asked: int, tests: int, cpus: int, free: int, number: int
) -> None:
    """An emulated machine takes one of the host's CPUs, a virtualized one as many as it has; a few tests share one machine."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cpus))
    monkeypatch.setattr(targets, "available_memory", lambda: free << 20)
    qemu = Qemu(Emulator(("qemu",), "10.0", "here"), accel, "max", "kvm_amd")
    target: Any = SimpleNamespace(qemu=qemu, machine=Machine(3072, 2, ""))
    assert number_of_machines(target, asked, tests) == number


def test_machines_need_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that were asked for and do not fit into memory are refused in one line."""
    monkeypatch.setattr(targets, "available_memory", lambda: 5000 << 20)
    target: Any = SimpleNamespace(machine=Machine(3072, 2, ""))
    with pytest.raises(CannotTest, match="--machines: 2 of 3072 MiB need more than the 5000 MiB that are free"):
        number_of_machines(target, 2, 1000)


def test_waiting_messages_are_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine hangs only if it has sent nothing by its time limit, not if this host has not read what it sent."""
    run = Run(tmp_path, machines=1)
    (boot,) = run.boots
    messages, orders = os.pipe()
    boot._last_message, boot._target = 40.0, run.session._target  # with a time limit of 60 s
    boot._machine.fileno = lambda: messages  # type: ignore[method-assign]
    boot.diagnose_death = lambda timeout: Diagnosis(BootOutcome.HANG, timeout or "")  # type: ignore[method-assign]
    ended: list[Diagnosis] = []
    run.session._end = lambda _boot, end, _archive: ended.append(end)
    run.session._receive = lambda _boot: os.read(messages, 1) and None

    for now, sent in ((99.99, b""), (101.0, b"x"), (101.0, b"")):
        assert ended == []
        os.write(orders, sent)
        clock = iter([now])  # from the next look at it on it is much later
        monkeypatch.setattr(time, "monotonic", lambda clock=clock: next(clock, 200.0))
        run.session._wait(None)
    monkeypatch.undo()
    os.close(messages)
    os.close(orders)
    assert [str(end.detail) for end in ended] == ["no message for 60 s (--time-limit)"]


@pytest.mark.parametrize(
    ("machines", "tests", "with_threads", "cpus"),
    [
        (2, 1000, 500, [2, 1]),
        (2, 1000, 0, [1, 1]),
        (2, 1000, 1000, [2, 2]),
        (2, 1000, 991, [2, 2]),
        (2, 1000, 990, [2, 1]),
        (5, 1000, 981, [2, 2]),
        (5, 1000, 980, [2, 1]),
        (1, 1000, 500, [2, 2]),
        (1, 1000, 0, [1, 1]),
    ],
)
def test_cpus_of_machines(machines: int, tests: int, with_threads: int, cpus: list[int]) -> None:
    """Every second machine has one CPU if there are tests for it that start no threads, and all have if no test starts any."""
    qemu = Qemu(Emulator(("qemu",), "10.0", "here"), "tcg", "max", "kvm_amd")
    kernel: Any = SimpleNamespace(release="6.12", image=Path("x"))
    target = with_one_cpu(Target(kernel, [], {}, {}, qemu, Machine(3072, 2, ""), 60, machines), tests, with_threads)
    assert [target.booted_machine(threads).cpus for threads in (True, False)] == cpus
