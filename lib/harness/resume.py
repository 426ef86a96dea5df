# SPDX-License-Identifier: GPL-2.0-only
"""Going on with a run that died (--resume): with its options, behind the tests that ended."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.failure_report import this_pytest
from harness.journal import Journal, JournalError, PastRun, boot_id, newest, read
from harness.output_paths import RESULTS
from harness.stored_reports import from_data
from harness.version import suite_version
from kvm_util.wording import counted
from runner import ROOT
from runner.kernel_log import Kind, Splat
from runner.store import say, shown
from runner.taint import TITLE, WARN_TITLE, describe, new_faults, taint_flags, unreported

_OPTION = "--resume"
_ADDED = "PYTEST_ADDOPTS"


def resume(config: pytest.Config, folder: Path) -> int:
    """Run pytest with the options of the run in *folder*, behind the tests that ended there; returns its exit status."""
    try:
        run = read(folder)
    except JournalError as error:
        raise pytest.UsageError(f"{_OPTION}: {error}") from None
    recorded = run.head["arguments"]
    others = [word for word in _without_resume(config.invocation_params.args) if word not in recorded]
    if others:
        raise pytest.UsageError(f"{_OPTION}: the run goes on with its own options: leave out {shlex.join(others)}")
    os.environ[_ADDED] = run.head["addopts"]
    os.chdir(ROOT / run.head["folder"])
    options = [f"--seed={run.head['seed']}", f"--results={folder}", "--resumed"]
    return int(pytest.main([*recorded, *options]))


def _without_resume(arguments: tuple[Any, ...]) -> list[str]:
    words = map(str, arguments)
    left = []
    for word in words:
        if word == _OPTION:
            next(words, None)
        elif not word.startswith(f"{_OPTION}="):
            left.append(word)
    return left


def open_journal(folder: Path, resumed: bool) -> tuple[Journal, PastRun | None]:
    """Open the journal in the results folder of this run, and read it if that is resumed.

    :raises pytest.UsageError: another run needs it, or it cannot be used
    """
    try:
        journal = Journal(folder, new=not resumed)
    except OSError as error:
        raise pytest.UsageError(f"{error.filename}: {error.strerror}") from None
    try:
        journal.lock()
        if resumed:
            return journal, read(folder)
        if journal.path.stat().st_size:
            run = read(folder)
            if not run.finished:
                raise JournalError(
                    f"--results: {shown(folder)}: {run.death}: {command(folder)} goes on behind it;"
                    f" without {shown(journal.path)}, a new run begins"
                )
        journal.clear()
    except (JournalError, OSError) as error:
        journal.kept = True
        journal.close()
        text = f"{shown(journal.path)}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise pytest.UsageError(text) from None
    return journal, None


def tell_of_death(label: str) -> None:
    """Say so if the newest run of this kernel died, and how to go on with it."""
    if run := newest(RESULTS, label):
        say(f"{shown(run.folder)}: {run.death}: {command(run.folder)} goes on behind it")


def command(folder: Path) -> str:
    """The command that goes on with the run in *folder*."""
    path = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    return f"{this_pytest()} {shlex.quote(f'{_OPTION}={path}')}"


def check_same(run: PastRun, host: Mapping[str, Any]) -> None:
    """Check that a run goes on with the kernel and the suite with which it began.

    :raises pytest.UsageError: it does not
    """
    was = run.head["host"]
    facts = [("kernel", name, was.get(name), host[name]) for name in ("kernel", "build", "backend")]
    facts += [("kernel", name, was["parameters"].get(name), value) for name, value in host["parameters"].items()]
    facts.append(("suite", "version", run.head["suite"], suite_version()))
    for what, name, then, now in facts:
        if then != now:
            raise pytest.UsageError(
                f"{_OPTION}: {shown(run.folder)} is of another {what}: {name} was {then}, and is {now} here; without"
                f" {_OPTION}, a new run begins"
            )


def settle(journal: Journal, run: PastRun, on_this_kernel: bool, known_warn: bool) -> str:
    """Give each test that was running a verdict, or have it run again; returns what to tell the user.

    If the kernel died, or reported a fault, and no test is to blame, that becomes a report of the kernel.

    :param on_this_kernel: whether the tests ran on the kernel that died
    :param known_warn: whether this kernel has a known bug that makes it warn
    """
    how = run.death
    if run.finished:
        how = "it was interrupted" if run.status == pytest.ExitCode.INTERRUPTED else "it finished"
    line = f"resuming {shown(run.folder)}: {counted(len(run.ended), 'test')} had ended when {how}"
    journal.end_torn_line()
    to_blame = False
    for test, flags in run.running.items():
        why = _why_failed(run, flags, known_warn) if on_this_kernel else ""
        if why:
            to_blame = True
            run.ended[test] = why
            journal.write(end=test, died=why)
        else:
            journal.write(end=test, reports=[])
    run.running.clear()
    if on_this_kernel and not to_blame:
        for splat in _between_tests(run, known_warn):
            run.reports.append(splat)
            journal.write(kernel=splat.kind.value, lines=splat.lines)
    journal.write(boot=boot_id(), taint=taint_flags())
    return line


def _between_tests(run: PastRun, known_warn: bool) -> list[Splat]:
    """What the kernel did to a run while no test ran."""
    if run.host_died:
        return [Splat(Kind.DEATH, ["the host died between two tests"])]
    if run.finished:
        return []
    return [Splat(Kind.TAINT, [f"{TITLE} {text}"]) for text in _new_faults(run, run.taint, known_warn)]


def _why_failed(run: PastRun, flags: int | None, known_warn: bool) -> str:
    """Why a test that was running failed; empty if the kernel did not end it, as far as can be known."""
    if run.host_died:
        others = len(run.running) - 1
        also = f", and {others} more: it may have been any of them" if others else ""
        return f"the host died while this test ran{also}"
    new = _new_faults(run, flags, known_warn)
    if new and not run.finished:
        return f"the run was killed while this test ran, and the kernel has set taint flag {', '.join(new)} since"
    return ""


def _new_faults(run: PastRun, before: int | None, known_warn: bool) -> list[str]:
    """The taint flags since *before* that neither a report in the journal nor a known bug explains, in words."""
    logged = {splat.kind for splat in run.reports_of_boot} - {Kind.TAINT, Kind.DEATH}
    told = {splat.title for splat in run.reports_of_boot}
    new = [f"{TITLE} {text}" for text in describe(unreported(new_faults(before, taint_flags()), logged))]
    # Nobody read the log after the run was killed: as where it cannot be read, W may be from the known bug.
    left = [title for title in new if title not in told and not (known_warn and title.startswith(WARN_TITLE))]
    return [title.removeprefix(f"{TITLE} ") for title in left]


class Replay:
    """A pytest plugin that reports what ended before in place of running it again.

    :param ended: as in ``PastRun``
    """

    def __init__(self, ended: Mapping[str, list[dict[str, Any]] | str]) -> None:
        self._ended = ended

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        verdict = self._ended.get(item.nodeid)
        if verdict is None:
            return None
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        if isinstance(verdict, str):
            call = pytest.CallInfo.from_call(lambda: pytest.fail(verdict, pytrace=False), when="call")
            hook.pytest_runtest_logreport(report=hook.pytest_runtest_makereport(item=item, call=call))
        else:
            for data in verdict:
                hook.pytest_runtest_logreport(report=from_data(item.config, data))
        # pytest has kept for this test what fixtures of the one before made; the next one may not share them.
        item.session._setupstate.teardown_exact(nextitem)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True
