# SPDX-License-Identifier: GPL-2.0-only
"""How a test on KVM ends (lib/harness/verdicts.py): known bugs, reports of violations, and skips that are failures."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runner import ROOT
from selftests.unit.commands import start

# The bugs that a run knows, on any host
BUGS = """
from harness import known_bugs
from harness.known_bugs import KnownBug
from dirty_tracking.violations import Kind

def bug(id, kinds, always, *tests):
    return KnownBug(id, "", "", (), frozenset(kinds), always, tests=tests)

BUGS = (
    bug("first-bug", {Kind.SPURIOUS}, False, "test_lost", "test_lost_in_setup"),
    bug("second-bug", {Kind.LOST}, True, "test_lost", "test_lost_and_more", "test_always"),
    bug("third-bug", {Kind.LOST}, False, "test_lost_in_setup", "test_sometimes"),
)
KnownBug.on = lambda self, host: True
known_bugs.load = lambda: BUGS
"""

TESTS = """
import pytest
from dirty_tracking.run_evidence import Figures
from dirty_tracking.violations import ContractViolation, Kind, Violation, violated

class Evidence:
    def lines(self):
        return ["seen by a witness"]
    def data(self):
        return {"witness": 1}

class OldKvm:
    def check_extension(self, cap):
        return 0

@pytest.fixture
def kvm():
    return OldKvm()

@pytest.fixture
def failing(kvm):
    raise violated(Kind.LOST, "in a fixture")

@pytest.mark.parametrize("page", [3])
def test_lost(kvm, record_figures, page):
    record_figures(Figures(writes=77))
    raise ContractViolation([Violation(Kind.LOST, "page 3", 1, (page,))], "a write", Evidence())

def test_lost_in_setup(failing):
    pass

def test_lost_and_more(kvm):
    raise ContractViolation([Violation(kind, "page 4") for kind in (Kind.LOST, Kind.SPURIOUS)])

def test_always(kvm):
    pass

def test_sometimes(kvm):
    pass

def test_no_bug(kvm):
    pass

def test_lacks_something(kvm):
    pytest.skip("no such capability")

def test_skip_off_kvm():
    pytest.skip("not about KVM")

@pytest.mark.disposable_kernel
def test_that_may_harm(kvm):
    pass

@pytest.mark.log_modes("ring", "dirty-log")
def test_some_modes(kvm, log_mode):
    pass

@pytest.mark.log_modes("clear-log")
def test_one_mode(kvm):
    pass

@pytest.mark.parametrize("size", [1])
@pytest.mark.log_modes("clear-log")
def test_one_mode_and_size(kvm, size):
    pass
"""


class Run:
    """A run of TESTS with the bugs of BUGS."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        (folder / "bugs.py").write_text(BUGS)
        (folder / "test_it.py").write_text(TESTS)
        self.results = folder / "results"
        command = [sys.executable, "-m", "pytest", str(folder / "test_it.py"), "-p", "bugs", "-p", "conftest"]
        command += [f"-c{ROOT}/pytest.ini", f"--rootdir={ROOT}", f"--confcutdir={ROOT}", f"--results={self.results}"]
        self.output = start([*command, *arguments], ROOT, PYTHONPATH=f"{folder}:{ROOT}", NO_COLOR="1").stdout
        file = self.results / "results.json"
        self._tests = json.loads(file.read_text())["tests"] if file.exists() else []

    def results_of(self, *names: str) -> list[tuple[str, str]]:
        """The verdict and the reason that the results have of each test."""
        results = {test["test"].partition("::")[2]: (test["verdict"], test["reason"]) for test in self._tests}
        return [results[name] for name in names]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    return lambda *arguments: Run(tmp_path, *arguments)


@pytest.mark.parametrize("workers", [[], ["-n1"]], ids=["alone", "xdist"])
def test_known_bugs_of_any_test(run: Callable[..., Run], workers: list[str]) -> None:
    """A known bug that names a test has to explain all kinds of its violations, and to show if it always does."""
    done = run(*workers)
    assert done.results_of("test_lost[3]", "test_lost_in_setup", "test_lost_and_more") == [
        ("known bug", "second-bug"), ("known bug", "third-bug"), ("FAIL", ""),
    ]  # fmt: skip
    assert done.results_of("test_always", "test_sometimes", "test_no_bug") == [
        ("FAIL", "known bug second-bug did not show"), ("known bug, not seen", ""), ("pass", ""),
    ]  # fmt: skip
    assert "known bug second-bug did not show: is it fixed? Then its entry in known_bugs.toml has to go" in done.output
    assert re.search(r"^second-bug \(described in known_bugs\.toml\):\n  \S*::test_lost$", done.output, re.M)


def test_option_no_known_bugs(run: Callable[..., Run]) -> None:
    """Under --no-known-bugs each violation is a failure, and whatever passes has passed."""
    done = run("--no-known-bugs")
    assert done.results_of("test_lost[3]", "test_lost_in_setup", "test_always", "test_sometimes") == [
        ("FAIL", ""), ("FAIL", ""), ("pass", ""), ("pass", ""),
    ]  # fmt: skip


def test_report_of_a_violation(run: Callable[..., Run]) -> None:
    """A violation's report has evidence, environment and command, in text and JSON, also of a known bug."""
    options = ["--no-known-bugs", "--seed=7", "--iterations=3", "--test-mem=8M", "--kvm-device=/dev/kvm", "--soak=9"]
    done = run(*options, "-k", "test_lost and not setup and not more")
    report = done.output.partition("= FAILURES =")[2]
    assert re.search(r"^a write: slot 1: LOST \(written but not reported\): page 3$", report, re.MULTILINE)
    assert re.search(rf"^kernel   {re.escape(os.uname().release)}$", report, re.MULTILINE)
    (reproduce,) = re.findall(r"^reproduce (.*)$", report, re.MULTILINE)
    assert {*options} < {*reproduce.split()}
    assert "::test_lost[3]'" in reproduce
    assert "\nseen by a witness\n" in report
    run("-k", "test_lost and not setup and not more")
    (file,) = done.results.glob("*-test_lost*.json")
    data = json.loads(file.read_text())
    assert data["findings"][0] == {
        "kind": "LOST", "detail": "page 3", "slot": 1, "pages": [3], "vcpu": None, "iteration": 0, "collection": 0, "rule": "",
        "ring_lapped": False,
    }  # fmt: skip
    assert data["witness"] == 1
    assert {"host", "settings", "reproduce", "test"} <= set(data)


@pytest.mark.parametrize("required", [False, True])
def test_skips_of_tests_on_kvm(run: Callable[..., Run], required: bool) -> None:
    """With --require-kvm, skips of tests on KVM are failures; known bugs and other skips are not."""
    done = run(*["--require-kvm"] * required)
    names = ["test_lacks_something", "test_that_may_harm", "test_one_mode", "test_one_mode_and_size[1]"]
    names += ["test_some_modes[dirty-ring]"]
    assert {verdict for verdict, _ in done.results_of(*names)} == {"FAIL" if required else "skipped"}, done.output
    assert ("required by --require-kvm: no such capability" in done.output) == required
    assert "1 skipped" in done.output or not required
    assert done.results_of("test_lost[3]", "test_some_modes[dirty-log]") == [("known bug", "second-bug"), ("pass", "")]


def test_cases_of_log_modes(run: Callable[..., Run]) -> None:
    """A test has a case for each mode that its marker names, and a single mode is not in the id."""
    done = run("--collect-only", "-q", "-m", "log_modes and kvm")
    cases = re.findall(r"^\S*::(\S+)$", done.output, re.MULTILINE)
    assert cases == [
        *(f"test_some_modes[{name}]" for name in ("dirty-ring", "dirty-ring-plain", "dirty-log")),
        "test_one_mode",
        "test_one_mode_and_size[1]",
    ]
