# SPDX-License-Identifier: GPL-2.0-only
"""The journal: a run that dies loses no verdict, the next one says where it died, and --resume goes on behind it."""

import errno
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from harness import resume
from harness.journal import NAME, Journal, JournalError, PastRun, boot_id, newest, read
from harness.journal_writer import kernel_digest
from harness.version import suite_version
from runner import ROOT
from selftests.unit.commands import Done, start

CASES = "selftests/interface/test_slots.py"
FATAL = f"{CASES}::test_enabling_logging_twice[dirty-ring]"
HEAD: dict[str, Any] = {
    "label": "6.12",
    "suite": suite_version(),
    "host": {"parameters": {}},
    "folder": ".",
    "arguments": [],
    "addopts": "",
    "seed": "1",
    "plan": [],
}

# Notes each test that runs. The first time that the fatal one does, a process (or all of them) dies at once.
PLUGIN = """
import os, pathlib, signal
import harness.output_paths, harness.resume
folder = pathlib.Path({folder!r})
harness.output_paths.RESULTS = harness.resume.RESULTS = folder / "results"
def pytest_runtest_call(item):
    dies = item.nodeid == {fatal!r} and item.nodeid not in (folder / "ran").read_text()
    with (folder / "ran").open("a") as file:
        file.write(item.nodeid + "\\n")
    if dies:
        {death}
"""
ALL, WORKER = "os.killpg(0, signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGKILL)"


@dataclass
class Runs:
    """Runs of ten short tests on KVM, one of which is fatal."""

    folder: Path

    def run(self, *words: str) -> Done:
        command = ["setsid", sys.executable, "-m", "pytest", "-p", "under_test", *words]
        return start(command, ROOT, PYTHONPATH=f"{self.folder}:{ROOT}/lib", COLUMNS="200")

    def tests(self, *words: str) -> Done:
        return self.run(f"{CASES}::test_enabling_logging_twice", f"{CASES}::test_logging_disabled_and_enabled", *words)

    def ran(self) -> list[str]:
        return (self.folder / "ran").read_text().splitlines()

    def newest(self) -> Path:
        return max((self.folder / "results").glob(f"*/{NAME}"), key=lambda path: path.stat().st_mtime).parent

    def verdicts(self, results: Path) -> dict[str, str]:
        rows = json.loads((results / "results.json").read_text())["tests"]
        return {row["test"]: row["verdict"] for row in rows}


@pytest.fixture
def runs(kvm: object, tmp_path: Path) -> Runs:
    """Runs in which all processes die with the fatal test."""
    (tmp_path / "ran").touch()
    (tmp_path / "under_test.py").write_text(PLUGIN.format(folder=str(tmp_path), fatal=FATAL, death=ALL))
    return Runs(tmp_path)


def replace_in_journal(results: Path, old: str, new: str) -> None:
    """Replace a text in a journal."""
    text = (results / NAME).read_text()
    assert old in text
    (results / NAME).write_text(text.replace(old, new))


@pytest.mark.slow
@pytest.mark.parametrize(("what_died", "workers"), [("host", "-n0"), ("host", "-n2"), ("run", "-n2")])
def test_resumed_run_goes_on_behind_a_death(runs: Runs, what_died: str, workers: str) -> None:
    """No test that ended runs again, and all verdicts are in the results. The test that was running failed if the host died;
    if only the run was killed, it runs again.
    """
    died = runs.tests(workers)
    assert died.returncode == -signal.SIGKILL, died.stdout + died.stderr
    results, before = runs.newest(), runs.ran()
    assert FATAL in before
    ended = set(read(results).ended)
    running = set(read(results).running)
    assert FATAL in running
    if what_died == "host":
        replace_in_journal(results, boot_id(), "another boot")
    told = runs.run("selftests/unit/test_binary_stats.py")  # a run of anything
    how = "the host died while" if what_died == "host" else "the run was killed while"
    assert f"{results}: {how}" in told.stderr, told.stdout + told.stderr
    assert FATAL in told.stderr
    assert f"--resume={results} goes on behind it\n" in told.stderr
    done = runs.run(f"--resume={results}")
    again = runs.ran()[len(before) :]
    verdicts = runs.verdicts(results)
    assert len(verdicts) == 10, done.stdout + done.stderr
    assert not ended & {*again}
    if what_died == "host":
        assert not running & {*again}
        assert {test for test, verdict in verdicts.items() if verdict == "FAIL"} == running
        assert "the host died while this test ran" in done.stdout
        assert done.returncode == 1
    else:
        assert running <= {*again}
        assert {*verdicts.values()} == {"pass"}
        assert done.returncode == 0
    assert read(results).finished


@pytest.mark.slow
def test_resume_is_refused(runs: Runs) -> None:
    """A run that died goes on with its own options and kernel only, and no other run writes over it: one line says so."""
    runs.tests("-n0")
    results = runs.newest()
    for words, error in {
        (f"--results={results}",): f"--results: {results}: the run was killed while {FATAL} ran: ",
        (
            f"--resume={results}",
            "--seed=1",
            "-x",
        ): "--resume: the run goes on with its own options: leave out --seed=1 -x",
        ("--resume=/nonexistent",): f"--resume: /nonexistent/{NAME}: No such file or directory",
    }.items():
        assert refusal(runs.run(*words)).startswith(f"ERROR: {error}")
    replace_in_journal(results, os.uname().release, "5.4.0-other")
    journal = (results / NAME).read_text()
    other = f"is of another kernel: kernel was 5.4.0-other, and is {os.uname().release} here"
    assert other in refusal(runs.run(f"--resume={results}"))
    assert (results / NAME).read_text() == journal


def refusal(done: Done) -> str:
    """The only line of output of a run that was refused."""
    assert done.returncode == 4, done.stdout + done.stderr
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    return line


@pytest.mark.slow
def test_worker_that_died_is_in_the_journal(runs: Runs) -> None:
    """A test with which its xdist worker died has ended: a run that is resumed later does not begin it again."""
    (runs.folder / "under_test.py").write_text(PLUGIN.format(folder=str(runs.folder), fatal=FATAL, death=WORKER))
    done = runs.tests("-n1")
    assert done.returncode == 1, done.stdout + done.stderr
    run = read(runs.newest())
    assert run.finished
    assert not run.running
    assert FATAL in run.ended
    assert len(run.ended) == 10


def records(*lines: dict[str, Any]) -> str:
    """A journal with these lines after its first."""
    return "".join(json.dumps(line) + "\n" for line in ({"run": HEAD}, {"boot": boot_id(), "taint": 0}, *lines))


START, OTHER = {"start": "a", "taint": 0}, {"start": "b", "taint": 0}
END = {"end": "a", "reports": [{"nodeid": "a"}]}


@pytest.mark.parametrize(
    ("text", "running", "ended"),
    [
        (records(START), ["a"], []),
        (records(START, OTHER, END), ["b"], ["a"]),
        (records(START, END, OTHER) + '{"end": "b", "rep', ["b"], ["a"]),
        (records(START, {"end": "a", "reports": []}), [], []),
        (records(START, {"end": "a", "died": "the host died"}), [], ["a"]),
    ],
    ids=["start", "two", "torn", "again", "died"],
)
def test_what_a_journal_says(tmp_path: Path, text: str, running: list[str], ended: list[str]) -> None:
    """Tests with a start only were running; a line that a crash cut off counts as not written."""
    (tmp_path / NAME).write_text(text)
    run = read(tmp_path)
    assert ([*run.running], [*run.ended], run.finished) == (running, ended, False)


def test_line_is_on_disk_when_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is followed by an fsync, unless it need not be, and the folder has one when the journal begins."""
    calls = []
    monkeypatch.setattr("harness.journal.os.fsync", lambda file: calls.append(os.readlink(f"/proc/self/fd/{file}")))
    journal = Journal(tmp_path, new=True)
    journal.clear()
    assert calls[0] == str(tmp_path)
    calls.clear()
    journal.write(start="a")
    journal.write(end="a")
    assert calls == [str(tmp_path / NAME)] * 2
    assert (tmp_path / NAME).read_text() == '{"start": "a"}\n{"end": "a"}\n'
    journal.synced = False
    journal.write(start="b")
    assert len(calls) == 2
    journal.close()


def test_journal_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the journal goes, instead of blaming the test whose end it lacks."""
    journal = Journal(tmp_path, new=True)
    journal.write(**START)

    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("harness.journal.os.fsync", full)
        journal.write(**END)
    assert not (tmp_path / NAME).exists()
    journal.write(**OTHER)
    assert not (tmp_path / NAME).exists()
    journal.close()


def test_line_that_is_not_written_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that ends early has failed: the disk is full."""
    journal = Journal(tmp_path, new=True)
    with monkeypatch.context() as patched:
        patched.setattr("harness.journal.os.write", lambda _file, line: len(line) - 1)
        journal.write(**END)
    assert not (tmp_path / NAME).exists()
    journal.close()


@pytest.mark.parametrize("call", ["os.fsync", "os.open"])
def test_folder_that_cannot_be_synchronized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A journal is written also where folders cannot be read, or have no fsync."""
    journal = Journal(tmp_path, new=True)
    with monkeypatch.context() as patched:
        patched.setattr(f"harness.journal.{call}", Mock(side_effect=OSError(errno.EINVAL, "Invalid argument")))
        journal.clear()
    journal.write(**START)
    assert (tmp_path / NAME).read_text()
    journal.close()


@pytest.mark.parametrize("call", ["fcntl.flock", "os.ftruncate"])
def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """One line says that a journal cannot be kept there, and why."""
    monkeypatch.setattr(f"harness.journal.{call}", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with pytest.raises(pytest.UsageError, match=f"^{tmp_path / NAME}: No locks available$"):
        resume.open_journal(tmp_path, resumed=False)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "is no journal"),
        ("[]\n", "is no journal"),
        ('{"run": 1}\n', "is no journal"),
        ('{"run": {"label": "6.12"}}\n', "is no journal"),
        (json.dumps({"run": HEAD | {"host": {}}}) + "\n", "is no journal"),
        (records({"start": "a"}), 'is damaged .*: {"start": "a"}'),
        (records({"start": [], "taint": 0}), "is damaged"),
        (records({"end": "a"}), "is damaged"),
        (records({"kernel": "other", "lines": []}), "is damaged"),
    ],
    ids=["empty", "list", "number", "label-only", "no-parameters", "no-taint", "no-id", "no-reports", "no-kind"],
)
def test_damaged_journal(tmp_path: Path, text: str, error: str) -> None:
    """A journal that lacks something is refused in one line, and not told of."""
    folder = tmp_path / "6.12-damaged"
    folder.mkdir()
    (folder / NAME).write_text(text)
    with pytest.raises(JournalError, match=error):
        read(folder)
    assert newest(tmp_path, "6.12") is None


def test_journal_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal that is removed while journals are looked for is none."""
    folder = tmp_path / "6.12-new"
    folder.mkdir()
    (folder / NAME).symlink_to("removed")
    assert newest(tmp_path, "6.12") is None
    (folder / NAME).unlink()
    (folder / NAME).write_text(records(START))
    monkeypatch.setattr("harness.journal.is_locked", Mock(side_effect=FileNotFoundError))
    assert newest(tmp_path, "6.12") is None


def test_newest_run_that_died(tmp_path: Path) -> None:
    """The newest run of a kernel is told of, unless it finished or lives."""
    old, new, other = (tmp_path / name for name in ("6.12-old", "6.12-new", "6.12-npt-new"))
    for age, folder in enumerate((other, new, old)):
        folder.mkdir()
        (folder / NAME).write_text(records(START).replace("6.12", folder.name.rpartition("-")[0]))
        os.utime(folder / NAME, (1000 - age, 1000 - age))
    assert newest(tmp_path, "6.1") is None
    found = newest(tmp_path, "6.12")
    assert found is not None
    assert found.folder == new
    journal = Journal(new)
    journal.lock()
    assert newest(tmp_path, "6.12") is None
    with pytest.raises(JournalError, match="another run is writing there"):
        Journal(new).lock()
    journal.write(finished=2)
    journal.close()
    assert newest(tmp_path, "6.12") is None


@pytest.mark.parametrize(
    ("boot", "taint", "local", "verdict"),
    [
        ("another boot", 0, True, "the host died while this test ran, and 1 more: it may have been any of them"),
        ("another boot", 0, False, None),  # the kernel that the test ran on was another one, in QEMU
        ("", 0, True, None),
        ("", 1 << 12, True, None),
        ("", 1 << 7, True, "the kernel has set taint flag D"),
    ],
    ids=["host", "booted-kernel", "killed", "module", "oops"],
)
def test_verdict_on_running_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boot: str, taint: int, local: bool, verdict: str | None
) -> None:
    """A test that was running failed only if its kernel died, or has reported a fault since."""
    monkeypatch.setattr(resume, "taint_flags", lambda: taint)
    run = PastRun(tmp_path, {}, boot=boot or boot_id(), running={"a": 0, "b": 0})
    journal = Journal(tmp_path, new=True)
    line = resume.settle(journal, run, on_this_kernel=local, known_warn=False)
    assert "a and b ran" in line
    assert ("a" in run.ended) == (verdict is not None)
    if verdict is not None:
        assert verdict in str(run.ended["a"])
    journal.kept = True
    journal.close()
    after = [json.loads(text) for text in (tmp_path / NAME).read_text().splitlines()]
    assert [record.get("end") for record in after] == ["a", "b", None]
    assert after[-1] == {"boot": boot_id(), "taint": taint}


def test_kernel_that_was_built_anew(tmp_path: Path) -> None:
    """A booted kernel is another one if its image or a module is, and so is another version of the suite."""
    image = tmp_path / "bzImage"
    image.write_bytes(b"image")
    target = Mock(kernel=Mock(image=image), modules=[Mock(data=b"kvm")])
    digest = kernel_digest(target)
    assert kernel_digest(target) == digest
    target.modules[0].data = b"kvm, fixed"
    assert kernel_digest(target) != digest
    target.modules[0].data = b"kvm"
    image.write_bytes(b"image, fixed")
    assert kernel_digest(target) != digest
    host = {"kernel": "6.12", "build": digest, "backend": "kvm_amd", "parameters": {"kvm.tdp_mmu": "Y"}}
    head = {"host": host, "suite": suite_version()}
    resume.check_same(PastRun(tmp_path, head), host)
    with pytest.raises(
        pytest.UsageError, match=f"is of another kernel: build was {digest}, and is other here; without"
    ):
        resume.check_same(PastRun(tmp_path, head), host | {"build": "other"})
    with pytest.raises(pytest.UsageError, match=r"is of another suite: version was 0\.0, and is"):
        resume.check_same(PastRun(tmp_path, head | {"suite": "0.0"}), host)


W, D = 1 << 9, 1 << 7
DEATH, TAINT_D = "the host died between two tests", "taint flag D (the kernel oopsed, or met a BUG)"
WARN = {"kernel": "WARN", "lines": ["WARNING: at a.c:1"]}


@pytest.mark.parametrize(
    ("lines", "boot", "taint", "known_warn", "local", "titles"),
    [
        ([START, END], "another boot", 0, False, True, [DEATH]),
        ([START, END], "another boot", 0, False, False, []),
        ([START, END], "", 0, False, True, []),
        ([START, END], "", D, False, True, [TAINT_D]),
        ([START, END], "", D, False, False, []),
        ([START, END], "", W, True, True, []),
        ([START, END, WARN], "", W, False, True, ["WARNING: at a.c:1"]),
        ([START, END, {"kernel": "taint", "lines": [TAINT_D]}], "", D, False, True, [TAINT_D]),
        ([START, END, {"finished": 2}], "another boot", D, False, True, []),
    ],
    ids=["host", "booted-kernel", "killed", "oops", "not-here", "known-warn", "logged", "told", "interrupted"],
)
def test_death_between_tests(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[dict[str, Any]],
    boot: str,
    taint: int,
    known_warn: bool,
    local: bool,
    titles: list[str],
) -> None:
    """Where no test was running, the death or the fault of the kernel is one report of it, however often it is resumed."""
    monkeypatch.setattr(resume, "taint_flags", lambda: taint)
    (tmp_path / NAME).write_text(records(*lines).replace(boot_id(), boot or boot_id()))
    for _ in range(2):
        journal = Journal(tmp_path)
        run = read(tmp_path)
        resume.settle(journal, run, on_this_kernel=local, known_warn=known_warn)
        journal.close()
        assert [splat.title for splat in run.reports] == titles


@pytest.mark.parametrize("torn", ['{"start": "b", "ta', "\0\0\0"], ids=["half", "zeros"])
def test_resuming_behind_a_torn_line(tmp_path: Path, torn: str) -> None:
    """What is written behind a line that a crash cut off can be read."""
    (tmp_path / NAME).write_text(records(START, END).replace(boot_id(), "another boot") + torn)
    journal = Journal(tmp_path)
    resume.settle(journal, read(tmp_path), on_this_kernel=True, known_warn=False)
    journal.close()
    again = read(tmp_path)
    assert [splat.title for splat in again.reports] == [DEATH]
    assert again.boot == boot_id()


@pytest.mark.parametrize(("known_warn", "lines"), [(True, []), (False, [WARN])], ids=["known-bug", "logged"])
def test_warn_that_is_explained_blames_no_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_warn: bool, lines: list[dict[str, Any]]
) -> None:
    """A test that was running when the run was killed runs again if W is explained."""
    monkeypatch.setattr(resume, "taint_flags", lambda: W)
    (tmp_path / NAME).write_text(records(START, *lines))
    journal, run = Journal(tmp_path), read(tmp_path)
    resume.settle(journal, run, on_this_kernel=True, known_warn=known_warn)
    journal.close()
    assert run.ended == {}


@pytest.mark.parametrize(("status", "how"), [(0, "it finished"), (1, "it finished"), (2, "it was interrupted")])
def test_how_a_resumed_run_ended(tmp_path: Path, status: int, how: str) -> None:
    """What --resume says of a run that ended in order."""
    (tmp_path / NAME).write_text(records(START, END, {"finished": status}))
    journal = Journal(tmp_path)
    line = resume.settle(journal, read(tmp_path), on_this_kernel=True, known_warn=False)
    journal.close()
    assert line.endswith(f": 1 test had ended when {how}")
