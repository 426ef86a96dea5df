# SPDX-License-Identifier: GPL-2.0-only
"""kselftest/: the C test's options, kselftest's exit statuses, and the folder for the kernel's tree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dirty_tracking.modes import LOG_MODES
from harness import c_test
from harness.selection import DIMENSIONS
from kvm_util.host_limits import HostLimit, Limit
from runner import ROOT
from selftests.unit.ktap_reader import read_ktap

PASS, FAIL, SKIP = 0, 1, 4
MATRIX = "selftests/matrix/test_dirty_log.py"
PROGRAM = ROOT / "kselftest/dirty_log_test"
SMALL = ("--test-mem=4M", "--iterations=2", "--interval=1", "--ring-count=1024", "--guest-mode=48bit-4k")
SMALL_CELL = (MATRIX, *SMALL, "--backing=anonymous", "--stop=forced", "--density=sparse", "--vcpus=1")


def run(*words: str, folder: Path = ROOT, **environment: str) -> tuple[int, str, str]:
    """Run a program of kselftest/; returns exit status, standard output and standard error."""
    done = subprocess.run(words, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


# --- the C test's options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("", []),
        ("-M all", []),
        ("-M dirty-log -M clear-log", ["--log-mode=clear-log,clear-log-unset"]),
        ("-Mdirty-ring -c 1024", ["--ring-count=1024", "--log-mode=dirty-ring,dirty-ring-plain"]),
        ("-i 3 -I 20 -p 0x40000000", ["--iterations=3", "--interval=20", "--phys-offset=0x40000000"]),
        ("-m 8", ["--guest-mode=48bit-4k,57bit-4k"]),
        ("-m 48bit-2m -m 48bit-1g", ["--guest-mode=48bit-1g,48bit-2m"]),
    ],
)
def test_options_of_the_c_test(words: str, options: list[str]) -> None:
    """Each option of the C test selects the part of the matrix, or the setting, that has its meaning."""
    assert sorted(c_test.suite_options(words.split())) == sorted([MATRIX, *options])


def test_c_test_has_all_log_modes() -> None:
    """Every log mode of the suite belongs to one of the C test's."""
    modes = [
        option for mode in ("dirty-log", "clear-log", "dirty-ring") for option in c_test.suite_options(["-M", mode])
    ]
    named = [name for word in modes if word.startswith("--log-mode=") for name in word.partition("=")[2].split(",")]
    assert sorted(named) == sorted(LOG_MODES)
    assert set(DIMENSIONS["guest_mode"]) <= set(c_test.USAGE.replace(",", " ").split())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("-x", "option -x not recognized (-h lists all options)"),
        ("-i", "option -i requires argument"),
        ("-i 0", "-i: 0 is out of range, it must be from 1 to 1000000"),
        ("-I soon", "-I: 'soon' is not a number of milliseconds"),
        ("-M bogus", "-M: no such mode: 'bogus' (there are all, dirty-log, clear-log, dirty-ring)"),
        ("-m 3", "-m: no such mode: '3' (there are 8, 9, 48bit-4k,"),
        ("-c 3", "--ring-count: 3 is not a power of two"),
        ("12", "'12' is no option"),
    ],
)
def test_wrong_option_of_the_c_test(words: str, text: str) -> None:
    """A wrong option is a usage error that names it."""
    with pytest.raises(pytest.UsageError) as raised:
        c_test.suite_options(words.split())
    assert text in str(raised.value)


def test_little_memory_is_no_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that has too little memory for the C test's sizes is a reason to skip."""
    monkeypatch.setattr(c_test, "memory_limits", lambda: [Limit("the machine has 100 MiB", 100 << 20, "more memory")])
    with pytest.raises(HostLimit, match="100 MiB"):
        c_test.suite_options([])


# --- exit statuses ----------------------------------------------------------------------------------------------------


def test_usage_and_help() -> None:
    """Help exits with 0, and a wrong option with 1 after one line on standard error."""
    status, output, errors = run(str(PROGRAM), "-h")
    assert (status, errors) == (PASS, "") and output.startswith("usage: dirty_log_test [-h]")
    assert run(str(PROGRAM), "-x") == (FAIL, "", "dirty_log_test: option -x not recognized (-h lists all options)\n")


PROGRAMS = [
    ("passes", [*SMALL_CELL, "--log-mode=dirty-log"], PASS),
    ("wrong-option", [*SMALL_CELL, "--iterations=x"], FAIL),
    ("nothing-matches", [*SMALL_CELL, "-k", "nothing_like"], FAIL),
    ("no-kvm", [*SMALL_CELL, "--log-mode=dirty-log", "--kvm-device=/dev/null"], SKIP),
    ("too-few-cpus", [*SMALL_CELL, "--vcpus=9999"], FAIL),
]


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize(("words", "wanted"), [case[1:] for case in PROGRAMS], ids=[case[0] for case in PROGRAMS])
def test_exit_status_of_kselftest(tmp_path: Path, words: list[str], wanted: int) -> None:
    """Pytest's exit statuses become kselftest's: a run that cannot begin fails, one without KVM is a skip."""
    command = (str(ROOT / "kselftest/ksft.sh"), "dirty_log_small", *words)
    status, output, errors = run(*command, TMPDIR=str(tmp_path))
    assert status == wanted, output + errors
    if output:
        *_, the_run = read_ktap(output)
        assert the_run.ok == (wanted != FAIL)
        assert (the_run.directive == "SKIP") == (wanted == SKIP)
    assert [path.name.rpartition("-")[0] for path in tmp_path.iterdir()] in ([], ["dirty_log_small"])


@pytest.mark.usefixtures("kvm")
def test_failure_is_a_fail(tmp_path: Path) -> None:
    """A lost page is "not ok" and exit status 1."""
    words = [*SMALL_CELL, "--log-mode=dirty-log", "-p", "docs.examples.planted_fault"]
    status, output, _ = run(str(ROOT / "kselftest/ksft.sh"), "dirty_log_small", *words, TMPDIR=str(tmp_path))
    test, the_run = read_ktap(output)
    assert status == FAIL
    assert not test.ok and not the_run.ok
    assert any("LOST [R1]" in line for line in test.comments)


def test_missing_package_is_a_skip(tmp_path: Path) -> None:
    """Without Python, a package or the suite itself a program is a skip, and the reason names what is missing."""
    for name in ("ksft.sh", "dirty_log_test"):
        shutil.copy(ROOT / "kselftest" / name, tmp_path)
    for name in ("runner", "lib"):
        (tmp_path / name).symlink_to(ROOT / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "readlink", "dirname"):
        (tools / name).symlink_to(str(shutil.which(name)))

    def reason() -> str:
        status, output, _ = run(str(tmp_path / "dirty_log_test"), PATH=str(tools))
        assert status == SKIP
        (result,) = read_ktap(f"{output}# Totals: pass:0 fail:0 xfail:0 xpass:0 skip:1 error:0\n")
        return result.text

    (tmp_path / "conftest.py").symlink_to("../nowhere/conftest.py")
    assert "cp -rL" in reason()
    (tmp_path / "conftest.py").unlink()
    shutil.copy(ROOT / "conftest.py", tmp_path)
    assert reason() == "there is no python3"
    (tools / "python3").write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 -S "$@"\n')
    (tools / "python3").chmod(0o755)
    assert reason().startswith("the suite needs pytest, ")
