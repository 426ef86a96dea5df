# SPDX-License-Identifier: GPL-2.0-only
"""--ktap: standard output is KTAP and nothing else, complete however a run ends, and no run that ended early is a pass."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner import ROOT
from selftests.unit.ktap_reader import Result, read_ktap

USAGE_ERROR, INTERRUPTED = 4, 2
# Each test runs pytest once more
SLOW = pytest.mark.slow

TESTS = """
import os, signal, time
import pytest

def test_passes():
    print("hidden")

def test_fails():
    os.system("echo from a child")
    assert 1 == 2, "one is not two"

def test_skips():
    pytest.skip("no #1\\nfrobnicator")

@pytest.fixture
def bad():
    raise ValueError("a bad fixture")

def test_with_bad_set_up(bad):
    pass

@pytest.fixture
def late():
    yield
    raise ValueError("a bad end")

def test_with_bad_tear_down(late):
    pass

@pytest.mark.xfail(reason="known-bug")
def test_known_bug():
    assert False

@pytest.mark.parametrize("name", ["a#b"])
def test_hash_sign(name):
    pass

def test_parts(subtests):
    with subtests.test("first"):
        pass
    with subtests.test("second", number=2):
        assert False, "a bad part"
"""
ENDLESS = """
import time
def test_before():
    pass
def test_endless():
    print("begun", flush=True)
    time.sleep(1000)
def test_after():
    pass
"""
DYING = """
import os, signal
def test_dies():
    os.kill(os.getpid(), signal.SIGKILL)
def test_lives():
    pass
"""


def command(folder: Path, tests: str, *options: str) -> list[str]:
    """A command that runs the text of a test file with --ktap."""
    (folder / "test_it.py").write_text(tests)
    plugins = ("-p", "conftest", "-c", str(ROOT / "pytest.ini"), "-p", "no:cacheprovider")
    return [sys.executable, "-m", "pytest", *plugins, "--ktap", f"{folder}/test_it.py", *options]


# A kernel source tree, for the tests with what is in it
KERNEL_SOURCE = os.environ.get("KERNEL_SOURCE", "")

ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT / 'lib'}"}


def run(folder: Path, tests: str, *options: str) -> tuple[int, str, str]:
    """Run the text of a test file; returns exit status, standard output and standard error."""
    done = subprocess.run(
        command(folder, tests, *options), cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def by_name(text: str) -> dict[str, Result]:
    return {result.name.rpartition("::")[2]: result for result in read_ktap(text)}


@pytest.mark.parametrize(
    "options",
    [["-n0"], pytest.param(["-n0", "-s"], marks=SLOW), pytest.param(["-n2", "-v"], marks=SLOW)],
    ids=["here", "bare", "xdist"],
)
def test_line_of_each_kind(tmp_path: Path, options: list[str]) -> None:
    """A pass, a failure, a skip, a known bug, and errors of set-up and tear-down have their lines, after their comments."""
    status, output, _ = run(tmp_path, TESTS, *options)
    results = by_name(output)
    assert status == 1
    assert {name: (result.ok, result.directive, result.text) for name, result in results.items()} == {
        "test_passes": (True, "", ""),
        "test_fails": (False, "", ""),
        "test_skips": (True, "SKIP", "no _1 frobnicator"),
        "test_with_bad_set_up": (False, "ERROR", "its set-up failed"),
        "test_with_bad_tear_down": (False, "ERROR", "its tear-down failed"),
        "test_known_bug": (True, "XFAIL", "known-bug"),
        "test_hash_sign[a_b]": (True, "", ""),
        "test_parts": (False, "", ""),
        "the run": (False, "", ""),
    }
    wanted = {"test_fails": "one is not two", "test_with_bad_set_up": "a bad fixture"}
    assert [name for name, text in wanted.items() if text not in "\n".join(results[name].comments)] == []
    assert "hidden" not in output
    assert ("--- Captured stdout call" in results["test_fails"].comments) == ("-s" not in options)
    parts = results["test_parts"].nested
    assert [(part.ok, part.name.partition(" ")[0]) for part in parts] == [(True, "test_parts"), (False, "test_parts")]
    assert "a bad part" in "\n".join(parts[1].comments)
    assert any("on this host: no verdict" in line for line in results["the run"].comments)


def test_stream_without_a_capture_plugin(tmp_path: Path) -> None:
    """With -p no:capture, too, what tests print goes to standard error."""
    status, output, errors = run(tmp_path, "def test_prints():\n    print('seen')\n", "-p", "no:capture")
    test, the_run = read_ktap(output)
    assert status == 0
    assert (test.ok, the_run.ok) == (True, True)
    assert "seen" in errors and "seen" not in output


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        pytest.param(signal.SIGINT, "-n0", marks=SLOW),
        (signal.SIGTERM, "-n0"),
        pytest.param(signal.SIGTERM, "-n1", marks=SLOW),
    ],
)
def test_signal_names_the_running_test(tmp_path: Path, number: signal.Signals, workers: str) -> None:
    """After a signal the test that ran and the run itself are errors, those to come are skips, and the plan is kept."""
    words = command(tmp_path, ENDLESS, workers)
    with subprocess.Popen(words, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        begin = ""
        while "\nok 1 " not in begin:
            begin += process.stdout.readline()
        time.sleep(0.3)  # test_endless begins
        process.send_signal(number)
        results = by_name(begin + process.stdout.read())
    assert process.returncode == INTERRUPTED
    why = f"not run: the run was interrupted ({number.name})"
    assert [(result.directive, result.text) for result in results.values()] == [
        *[("", ""), ("ERROR", f"{why}, during the test"), ("SKIP", why)],
        ("ERROR", "it ended before all tests had run"),
    ]


@SLOW
def test_crashed_worker_is_an_error(tmp_path: Path) -> None:
    """A test whose process was killed is an error, and the others run."""
    status, output, _ = run(tmp_path, DYING, "-n1")
    results = by_name(output)
    assert status == 1
    assert (results["test_dies"].directive, results["test_dies"].text) == ("ERROR", "its process died")
    assert results["test_lives"].ok
    assert not results["the run"].ok


@pytest.mark.parametrize("workers", ["-n0", pytest.param("-n1", marks=SLOW)])
def test_uncollected_file_is_an_error(tmp_path: Path, workers: str) -> None:
    """A file that cannot be imported is an error of its own."""
    status, output, _ = run(tmp_path, "import no_such_module", workers)
    broken, the_run = read_ktap(output)
    assert status == (INTERRUPTED if workers == "-n0" else 1)  # xdist makes it a failure
    assert (broken.directive, broken.text) == ("ERROR", "its tests cannot be collected")
    assert any("no_such_module" in line for line in broken.comments)
    assert not the_run.ok


@SLOW
def test_nothing_collected_is_an_error(tmp_path: Path) -> None:
    """A selection that matches no test is no pass."""
    status, output, _ = run(tmp_path, TESTS, "-k", "nothing_like")
    (the_run,) = read_ktap(output)
    assert status == USAGE_ERROR
    assert (the_run.directive, the_run.text) == ("ERROR", "it cannot run as it was called")
    assert any("no test matches -k 'nothing_like'" in line for line in the_run.comments)


@SLOW
def test_no_kvm_is_a_skip(tmp_path: Path) -> None:
    """A run whose tests all skipped for want of KVM is a skip, with the reason at each test."""
    status, output, _ = run(tmp_path, "def test_on_kvm(kvm):\n    pass\n", "--kvm-device=/dev/null")
    test, the_run = read_ktap(output)
    assert status == 5
    assert test.directive == "SKIP" and "/dev/null" in test.text
    assert (the_run.directive, the_run.text) == ("SKIP", "no test ran on KVM")


@pytest.mark.parametrize(
    "option", ["--iterations=0", pytest.param("--collect-only", marks=SLOW), pytest.param("--pdb", marks=SLOW)]
)
def test_usage_error_prints_no_ktap(tmp_path: Path, option: str) -> None:
    """A wrong option is one line on standard error, and standard output is empty."""
    status, output, errors = run(tmp_path, TESTS, option)
    assert (status, output) == (USAGE_ERROR, "")
    assert errors.startswith("ERROR: ") and option.partition("=")[0] in errors


@SLOW
@pytest.mark.skipif(not KERNEL_SOURCE, reason="KERNEL_SOURCE in the environment names no kernel source tree")
def test_kunit_reads_the_stream(tmp_path: Path) -> None:
    """The kernel's own parser finds each result, and no error in the format."""
    _, output, _ = run(tmp_path, TESTS)
    parser = [sys.executable, "-B", f"{KERNEL_SOURCE}/tools/testing/kunit/kunit.py", "parse"]
    done = subprocess.run(parser, input=output, capture_output=True, text=True)
    # It has no XFAIL, and counts the parts of a test instead of the test.
    assert "Ran 10 tests: passed: 4, failed: 5, skipped: 1" in done.stdout
    assert "[ERROR]" not in done.stdout and "[CRASHED]" not in done.stdout
