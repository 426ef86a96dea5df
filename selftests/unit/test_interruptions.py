# SPDX-License-Identifier: GPL-2.0-only
"""Runs that end early lose no results, and list the tests that did not run in the table and the files."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from selftests.unit.commands import CELLS, open_terminal, pytest_command, read, running
from selftests.unit.mutants.faults import LOSING_PLUGIN

FOUR_CELLS = [*CELLS, "--log-mode=dirty-log,clear-log", "--test-mem=4M", "--interval=1"]
ENDLESS, SHORT = "--iterations=1000000", "--iterations=40"
PASSED, FAILED, INTERRUPTED = 0, 1, 2

pytestmark = pytest.mark.usefixtures("kvm")


@dataclass
class Run:
    """A run of four cells in a process group of its own."""

    folder: Path
    process: "subprocess.Popen[bytes]"

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text(errors="replace")

    def await_output(self, text: str) -> None:
        """Wait until the run has printed *text*."""
        deadline = time.monotonic() + 60
        while text not in self.output:
            assert time.monotonic() < deadline and self.process.poll() is None, self.output
            time.sleep(0.05)

    def ends(self) -> int:
        """Wait for the run to end and check that no process is left; returns the exit status."""
        status = self.process.wait(60)
        deadline = time.monotonic() + 10
        while any(is_running_in(self.process.pid, stat) for stat in Path("/proc").glob("[0-9]*/stat")):
            assert time.monotonic() < deadline, "processes of the run are still there"
            time.sleep(0.1)
        assert "Traceback" not in self.output
        assert "INTERNALERROR" not in self.output
        return status

    def verdicts(self) -> list[tuple[str, str]]:
        """Verdict and reason of each cell from the results file; checks that junit.xml has the same verdicts."""
        data = json.loads((self.folder / "results/results.json").read_text())
        cases = ElementTree.parse(self.folder / "junit.xml").getroot().iter("testcase")
        tags = {"failure": "FAIL", "error": "FAIL", "skipped": "not run"}
        in_junit = [next((tags[child.tag] for child in case if child.tag in tags), "pass") for case in cases]
        assert sorted(in_junit) == sorted(cell["verdict"] for cell in data["cells"])
        return [(cell["verdict"], cell["reason"]) for cell in data["cells"]]


def is_running_in(group: int, stat: Path) -> bool:
    """Whether the process of *stat* belongs to a process group, and is no zombie."""
    with suppress(FileNotFoundError, ProcessLookupError):
        state, _parent, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        return int(process_group) == group and state != "Z"
    return False


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A function that starts a run of four cells with the given pytest options."""
    with ExitStack() as runs:

        def begin(*options: str, plugin: str = "", terminal: int | None = None) -> Run:
            command, environment = pytest_command(tmp_path, plugin)
            command += ["-v", f"--junitxml={tmp_path}/junit.xml", *FOUR_CELLS, *options]
            environment["PYTHONUNBUFFERED"] = "1"
            with (tmp_path / "output.txt").open("w+b") as file:
                output = os.dup(file.fileno()) if terminal is None else terminal
            return Run(tmp_path, runs.enter_context(running(command, environment, output, own_terminal=False)))

        yield begin


@pytest.mark.parametrize(
    ("number", "to_all", "workers", "times"),
    [
        (signal.SIGINT, True, "-n2", 1),  # as a terminal sends it
        (signal.SIGINT, True, "-n0", 1),
        (signal.SIGINT, True, "-n2", 6),
        (signal.SIGTERM, False, "-n2", 1),
        (signal.SIGTERM, True, "-n2", 1),
        (signal.SIGHUP, False, "-n0", 1),
    ],
)
@pytest.mark.slow
def test_signal_ends_the_run(start: Start, number: signal.Signals, to_all: bool, workers: str, times: int) -> None:
    """A signal, also a repeated one, ends the run in an orderly way, and is the reason of each cell that has not run."""
    run = start(ENDLESS, workers)
    run.await_output("::test_dirty_log[")
    for _ in range(times):
        (os.killpg if to_all else os.kill)(run.process.pid, number)
        time.sleep(0.2)
    assert run.ends() == INTERRUPTED
    interrupted = f"the run was interrupted ({number.name})"
    assert {reason.removesuffix(", during the test") for _, reason in run.verdicts()} == {interrupted}
    assert [verdict for verdict, _ in run.verdicts()] == ["not run"] * 4
    assert "4 cells: 4 not run" in run.output
    assert ("the run is ending and writing its results" in run.output) == (times > 1)
    assert "make check-kernel" not in run.output  # no advice for an interrupted run
    assert "no test ran on KVM" not in run.output


def test_ctrl_c_while_workers_start(start: Start) -> None:
    """Ctrl-C while workers start ends them without tracebacks, and the run is reported as interrupted."""
    run = start(ENDLESS, "-n2")
    run.await_output("\nplugins: ")
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.ends() == INTERRUPTED
    assert re.search(r" interrupted: 0( of 4)? tests ran: no verdict", run.output)


STUCK_PLUGIN = """
import time
import pytest
import harness.interruption
harness.interruption._PATIENCE = 0.5
@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish():
    print("ending", flush=True)
    time.sleep(1000)
"""


def test_late_ctrl_c_discards_results(start: Start) -> None:
    """Ctrl-C some seconds after the first one exits at once, with the signal's status."""
    run = start(ENDLESS, "-n0", plugin=STUCK_PLUGIN)
    run.await_output("::test_dirty_log[")
    os.kill(run.process.pid, signal.SIGINT)
    run.await_output("ending")
    time.sleep(1)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.ends() == 128 + signal.SIGINT


@pytest.mark.slow
def test_closed_terminal_loses_nothing(start: Start) -> None:
    """A run whose terminal closes still writes its files."""
    ours, theirs = open_terminal()
    run = start(ENDLESS, "-n2", terminal=theirs)
    output = read(ours)
    seen = ""
    while "::test_dirty_log[" not in seen:
        seen += next(output)
    output.close()
    time.sleep(0.02)  # the run writes to the closed terminal before the signal comes
    os.killpg(run.process.pid, signal.SIGHUP)
    assert run.ends() == INTERRUPTED
    assert len(run.verdicts()) == 4


@pytest.mark.parametrize(
    ("number", "status", "verdict"),
    [(signal.SIGKILL, FAILED, ("FAIL", "")), (signal.SIGTERM, INTERRUPTED, ("not run", "SIGTERM ended its process"))],
)
@pytest.mark.slow
def test_killed_worker_is_reported(start: Start, number: signal.Signals, status: int, verdict: tuple[str, str]) -> None:
    """A killed worker's cell is in the results and the others run; SIGKILL is a failure, SIGTERM is not."""
    run = start(SHORT, "-n1")
    run.await_output("::test_dirty_log[")
    pid = run.process.pid
    (worker,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(worker), number)
    assert run.ends() == status
    assert sorted(run.verdicts()) == sorted([verdict, *[("pass", "")] * 3])


SET_UP_PLUGIN = """
import os, signal
from kvm_util.arch.x86_64.paging import PageTables
honest = PageTables._map
def interrupted(*arguments):
    PageTables._map = honest
    os.kill(os.getpid(), signal.SIGINT)
    return honest(*arguments)
PageTables._map = interrupted
"""


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_signal_during_vm_setup(start: Start, workers: str) -> None:
    """An error that a signal causes while a VM is set up is not a failure of the test."""
    run = start(ENDLESS, workers, plugin=SET_UP_PLUGIN)
    assert run.ends() == INTERRUPTED, run.output
    assert {verdict for verdict, _ in run.verdicts()} == {"not run"}


ENDING_PLUGIN = """
import os, signal
import pytest
@pytest.hookimpl(tryfirst=True)
def pytest_{hook}():
    os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("hook", ["sessionfinish", "terminal_summary", "unconfigure"])
def test_signal_after_the_last_test(start: Start, hook: str) -> None:
    """A signal after the last test changes neither files nor verdict nor exit status."""
    run = start("--iterations=2", "-n0", plugin=ENDING_PLUGIN.format(hook=hook))
    assert run.ends() == PASSED, run.output
    assert run.verdicts() == [("pass", "")] * 4
    assert "on this host: good: 4 passed" in run.output


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_tests_not_run_after_a_failure(start: Start, workers: str) -> None:
    """With -x the cells after the first failure are in the results, with the option as the reason."""
    run = start("--iterations=2", "-x", workers, plugin=LOSING_PLUGIN)
    assert run.ends() in (FAILED, INTERRUPTED), run.output  # the latter is xdist's
    assert run.verdicts().count(("not run", "the run stopped after 1 failure (--maxfail)")) == 3
    assert run.verdicts()[0][0] == "FAIL"


@pytest.mark.slow
def test_last_failed_list_is_kept(start: Start, tmp_path: Path) -> None:
    """After --lf -x, failures that did not run again are still in the list for --lf."""
    cache = ["--iterations=2", "-o", f"cache_dir={tmp_path}/cache"]
    assert start(*cache, plugin=LOSING_PLUGIN).ends() == FAILED
    failed = json.loads((tmp_path / "cache/v/cache/lastfailed").read_text())
    assert len(failed) == 4
    assert start(*cache, "--lf", "-x", plugin=LOSING_PLUGIN).ends() == FAILED
    assert json.loads((tmp_path / "cache/v/cache/lastfailed").read_text()) == failed
