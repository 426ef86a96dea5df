# SPDX-License-Identifier: GPL-2.0-only
"""``make perf``: its scenarios, what a run of one measures, and how the C test's times are read."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.perf import ScenarioError, c_arguments, c_phases, load
from dirty_tracking.modes import LOG_MODES
from dirty_tracking.perf_run import Scenario, measure
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB
from kvm_util.vm import Vm
from runner import ROOT
from selftests.unit.commands import Done, start

NPAGES = 2 * 256
SMALL: dict[str, Any] = {"vcpus": 2, "memory": MIB, "ring_count": 4096}


def perf(*arguments: str) -> Done:
    return start([sys.executable, "-m", "bench.perf", *arguments], ROOT, PYTHONPATH=f"{ROOT}:{ROOT}/lib")


def test_scenarios_of_the_tree() -> None:
    """The scenarios that come with the suite can be loaded; each is measured in the log modes that it names."""
    scenarios = load(ROOT / "bench/scenarios.toml", None)
    assert len(scenarios) > 4
    assert [one.log_mode for one in scenarios["many-slots"]] == ["dirty-log", "clear-log"]
    assert scenarios["full-rings"][0].memory == 64 * MIB
    assert list(load(ROOT / "bench/scenarios.toml", "overlap")) == ["overlap"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nvcpu = 1", "a: no such value: vcpu (there are backing,"),
        ("a = 1", "a: is no table"),
        ("[a]\nlog_modes = ['dirty']", "a: log_mode: no such mode: 'dirty' (choose from dirty-log,"),
        ("[a]\nmemory = '1X'", "a: memory: '1X' is no size"),
        ("[a]\nmemory = 5", "a: memory: 5 is not one or more whole pages"),
        ("[a]\nvcpus = 0", "a: vcpus, iterations and slots must be at least 1"),
        ("[a]\nvcpus = 'two'", "a: vcpus: 'two' is not a whole number"),
        ("[a]\nvcpus = true", "a: vcpus: True is not a whole number"),
        ("[a]\nvcpus = 2.0", "a: vcpus: 2.0 is not a whole number"),
        ("[a]\niterations = 1.5", "a: iterations: 1.5 is not a whole number"),
        ("[a]\nslots = 1.0", "a: slots: 1.0 is not a whole number"),
        ("[a]\nmemory = 4096.0", "a: memory: 4096.0 is not a whole number"),
        ("[a]\nring_count = 'x'", "a: ring_count: 'x' is not a whole number"),
        ("[a]\nring_count = 0", "a: ring_count: 0 is not a power of two"),
        ("[a]\nring_count = -1", "a: ring_count: -1 is not a power of two"),
        ("[a]\nring_count = 1000", "a: ring_count: 1000 is not a power of two"),
        ("[a]\nrandom = 3", "a: random: 3 is not true or false"),
        ("[a]\nbacking = 1", "a: backing: 1 is not a string"),
        ("[a]\npin = 3", "a: pin: 3 is not a list of whole numbers"),
        ("[a]\npin = [true]", "a: pin: [True] is not a list of whole numbers"),
        ("[a]\nlog_modes = 5", "a: log_modes: 5 is not a list of strings"),
        ("[a]\nlog_modes = 'dirty-ring'", "a: log_modes: 'dirty-ring' is not a list of strings"),
        ("[a]\nlog_modes = [1]", "a: log_modes: [1] is not a list of strings"),
        ("[a]\nwrite_percent = 101", "a: write_percent: 101 is not from 0 to 100"),
        ("[a]\nmemory = '1M'\nslots = 3", "a: slots: 256 pages are not divided into 3 equal slots"),
        ("[a]\nbacking = 'anon'", "a: backing: no such backing: 'anon'"),
        ("[a]\nvcpus = 2\npin = [0]", "a: pin: 1 CPUs for 2 vCPUs"),
        ("[a]\npin = [4096]", "a: pin: this process may run on CPUs"),
        ("[a", "Expected ']'"),
    ],
)
def test_wrong_scenarios(tmp_path: Path, text: str, message: str) -> None:
    """A scenario that cannot be measured is an error that names the file, the scenario and the value."""
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=re.escape(f"{path}: {message}")):
        load(path, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenarios=/nope"], "perf: /nope: No such file or directory"),
        (["--only=nope"], "there is no scenario 'nope' (choose from sequential,"),
        (["--rounds=0"], "perf: --rounds must be at least 1"),
        (["--c-test=/nope"], "perf: --c-test: /nope is no program that can be run"),
    ],
)
def test_wrong_options_of_perf(arguments: list[str], message: str) -> None:
    """A wrong option is one line and a status that is not 0."""
    done = perf(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, NPAGES),
        ({"slots": 4}, NPAGES),
        ({"write_percent": 0}, 0),
        ({"overlap": True}, NPAGES),
    ],
    ids=["each-page", "slots", "loads", "overlap"],
)
def test_pages_dirtied_in_a_scenario(kvm: Kvm, log_mode: str, values: dict[str, Any], expected: int) -> None:
    """What KVM reports in each iteration is what the scenario's vCPUs write."""
    mode = LOG_MODES[log_mode]
    cost = measure(kvm, Scenario(log_mode, iterations=3, **SMALL | values), seed=1)
    first = NPAGES if mode.initially_set else expected
    if mode.uses_ring and "overlap" in values:  # each vCPU may have an entry of a page
        assert 3 * expected <= cost.dirty_pages <= 6 * expected
    else:
        assert cost.dirty_pages == first + 2 * expected
    assert cost.phases["dirty"]["count"] == 3
    assert cost.exits >= 2 * 4


def test_random_accesses_of_a_scenario(kvm: Kvm) -> None:
    """Random accesses leave some pages out, and a share of stores dirties about that share of pages."""

    def dirty(seed: int, **values: Any) -> int:
        return measure(kvm, Scenario("dirty-log", iterations=1, **SMALL | values), seed).dirty_pages

    assert 0.5 * NPAGES < dirty(1, random=True) < 0.8 * NPAGES
    assert dirty(1, random=True) == dirty(1, random=True)
    assert 0.2 * NPAGES < dirty(1, write_percent=30) < 0.4 * NPAGES


@pytest.mark.parametrize(("phase", "call"), [("get", "get_dirty_log"), ("clear", "clear_dirty_log")])
def test_slow_call_shows_in_its_cost(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, phase: str, call: str) -> None:
    """A delay in a call of KVM's is in its phase, once for each slot and iteration, and in no other."""
    original = getattr(Vm, call)

    def slow(vm: Vm, *arguments: Any) -> Any:
        time.sleep(0.02)
        return original(vm, *arguments)

    monkeypatch.setattr(Vm, call, slow)
    phases = measure(kvm, Scenario("clear-log", slots=2, **SMALL), seed=1).phases
    assert phases[phase]["count"] == 4
    assert phases[phase]["p50"] >= 20
    assert phases[{"get": "clear", "clear": "get"}[phase]]["p50"] < 20


@pytest.mark.usefixtures("kvm")
def test_perf_beside_a_c_test(tmp_path: Path) -> None:
    """The table has times, those of the C test and their ratios; the file has every round."""
    fake = tmp_path / "dirty_log_perf_test"
    fake.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/seen\nprintf '{C_OUTPUT}'\n")
    fake.chmod(0o755)
    own = tmp_path / "own.toml"
    own.write_text("[one]\nlog_modes = ['dirty-log', 'dirty-ring']\nmemory = '1M'\nslots = 2\n")
    command = [f"--scenarios={own}", "--rounds=2", f"--c-test={fake}", f"--output={tmp_path}/times.json"]
    done = perf(*command)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["C", "test", "1000", "0.5", "2000", "0.02", "0.1"] in rows
    assert sum(row[:1] == ["ratio"] for row in rows) == 1
    assert (tmp_path / "seen").read_text() == 2 * "-v 1 -b 1048576 -i 2 -x 2 -s anonymous -g\n"
    data = json.loads((tmp_path / "times.json").read_text())
    assert [(one["name"], len(one["costs"]), "c_test" in one) for one in data["scenarios"]] == [
        ("one", 2, True), ("one", 2, False)
    ]  # fmt: skip


SMALL_FILE = "[one]\nlog_modes = ['dirty-log', 'dirty-ring']\nmemory = '1M'\n"


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("#!/bin/sh\necho it is broken >&2\nexit 254\n", "-g ended with status 254: it is broken\n"),
        ("#!/nowhere\n", "fake: No such file or directory\n"),
    ],
    ids=["ends", "does-not-start"],
)
def test_failing_c_test_is_one_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    """A C test of PATH that fails is a failure of its scenario; the others are measured, and are in the file."""
    fake, own, output = tmp_path / "fake", tmp_path / "own.toml", tmp_path / "times.json"
    fake.write_text(script)
    fake.chmod(0o755)
    own.write_text(SMALL_FILE)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = perf(f"--scenarios={own}", "--rounds=1", "--c-test=fake", f"--output={output}")
    assert (done.returncode, done.stderr) == (1, "perf: 1 scenario failed\n")
    assert f"one, dirty-log: failed: {fake}" in done.stdout and message in done.stdout
    assert [one["scenario"]["log_mode"] for one in json.loads(output.read_text())["scenarios"]] == ["dirty-ring"]


@pytest.mark.usefixtures("kvm")
def test_interrupted_perf_writes_its_file(tmp_path: Path) -> None:
    """Ctrl-C is one line and status 130, and what was measured before is in the file."""
    own, output = tmp_path / "own.toml", tmp_path / "times.json"
    own.write_text(f"{SMALL_FILE}\n[two]\nlog_modes = ['dirty-log']\nmemory = '1M'\niterations = 1000000\n")
    command = [sys.executable, "-u", "-m", "bench.perf", f"--scenarios={own}", "--rounds=1", f"--output={output}"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/lib"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it for background jobs
    ) as process:  # fmt: skip
        assert process.stdout is not None
        while not process.stdout.readline().startswith("one            dirty-ring"):
            assert process.poll() is None
        time.sleep(0.3)  # the endless one begins
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "perf: interrupted\n")
    assert [one["name"] for one in json.loads(output.read_text())["scenarios"]] == ["one", "one"]


@pytest.mark.usefixtures("kvm")
def test_output_is_checked_first(tmp_path: Path) -> None:
    """A file that cannot be written is one line before anything is measured."""
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "no/file", "No such file or directory")):
        done = perf(f"--output={path}")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"perf: --output: {path}: {reason}\n"


C_OUTPUT = (
    "Populate memory time: 1.000000000s\\nEnabling dirty logging time: 0.000500000s\\n\\n"
    "Iteration 1 dirty memory time: 3.000000000s\\nIteration 1 get dirty log time: 0.000030000s\\n"
    "Iteration 2 dirty memory time: 1.000000000s\\nIteration 2 get dirty log time: 0.000010000s\\n"
    "Disabling dirty logging time: 0.000100000s\\n"
)


def test_times_of_the_c_test() -> None:
    """A phase of the C test that comes in each iteration has the mean of its times."""
    phases = c_phases(C_OUTPUT.replace("\\n", "\n"))
    assert phases == pytest.approx({"populate": 1000, "enable": 0.5, "dirty": 2000, "get": 0.02, "disable": 0.1})


@pytest.mark.parametrize(
    "values", [{"random": True}, {"write_percent": 50}, {"pin": (0,)}, {"log_mode": "dirty-ring"}], ids=str
)
def test_scenarios_without_a_c_test(values: dict[str, Any]) -> None:
    """A scenario that the C test cannot run the same way on every kernel is not compared with it."""
    assert c_arguments(Scenario(**{"log_mode": "dirty-log"} | values)) is None
