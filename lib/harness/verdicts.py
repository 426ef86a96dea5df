# SPDX-License-Identifier: GPL-2.0-only
"""Plugin: the verdict on a test on KVM. A violation of the contract is a known bug, or a failure with a report; an error
from what the host lacks is no verdict on KVM, and skips the test.

Only this plugin turns a violation into a verdict: tests raise ContractViolation, and do not depend on known bugs.
"""

import os
import shlex
import traceback
from collections.abc import Callable, Generator
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dirty_tracking.run_evidence import Figures
from dirty_tracking.violations import ContractViolation
from harness import known_bugs
from harness.collection import cell_of
from harness.command_line import SETTING_PARSERS
from harness.failure_report import Context, cell_command, failure_data, file_name, this_pytest
from harness.kernel_options import flags_given, options_given
from harness.known_bugs import KnownBug
from harness.limited_errors import explain_error, was_interrupted
from harness.report_stream import ReportStream
from harness.run_report import not_kept, verdict, write_failure
from harness.run_state import SETTINGS
from kvm_util.host import this_host
from kvm_util.wording import wrapped
from runner import ROOT
from runner.guest_session import guest_session

_FINDINGS = 4  # violations of a known bug that the run's summary shows
_figures_key = pytest.StashKey[Figures]()


@pytest.fixture
def record_figures(request: pytest.FixtureRequest) -> Callable[[Figures], None]:
    """Returns a function that adds a run's figures to the results, as they are when the test ends, however it ends."""

    def record(figures: Figures) -> None:
        request.node.stash[_figures_key] = figures

    return record


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make the verdict on a test on KVM, and add environment and command to each failure."""
    error = call.excinfo.value if call.excinfo is not None else None
    if isinstance(error, Exception) and was_interrupted(error):
        raise KeyboardInterrupt from error  # an error because of a signal is no failure of the test
    if not item.get_closest_marker("kvm"):
        return (yield)
    if call.when == "call" and _figures_key in item.stash:
        item.user_properties += asdict(item.stash[_figures_key]).items()
    if isinstance(error, Exception) and (limit := explain_error(error)):
        error = pytest.skip.Exception(limit)
        _end_with(call, error)
    reported = False
    if isinstance(error, ContractViolation):
        reported = _judge_violation(item, call, error)
    elif isinstance(error, pytest.skip.Exception) and item.config.option.require_kvm:
        _end_with(call, pytest.fail.Exception(f"required by --require-kvm: {error.msg}", pytrace=False))
    elif error is None and call.when == "call":
        _judge_pass(item, call)
    report = yield
    if report.failed and not reported:
        lines = _context(item).lines()
        if isinstance(error, ContractViolation) and error.evidence is not None:
            lines += ["", *error.evidence.lines()]
        report.sections.append(("where, and how to reproduce it", "\n".join(lines)))
    return report


def _judge_violation(item: pytest.Item, call: pytest.CallInfo[None], error: ContractViolation) -> bool:
    """Turn a violation into a known bug if one explains it, else into a failure.

    :returns: whether the failure's report is complete already
    """
    context = _context(item)
    try:
        _keep(item, failure_data(error, context))
    except OSError as why_not:
        error.add_note(not_kept(item.config.option.results, why_not))
    if bug := next((bug for bug in _known_bugs_of(item) if bug.explains(error.violations)), None):
        item.user_properties.append(("findings", "\n".join(map(str, error.violations[:_FINDINGS]))))
        _end_with(call, pytest.xfail.Exception(bug.id))
        return False
    option = item.config.option
    if option.tbstyle != "auto" or option.showlocals or option.fulltrace:
        return False
    _end_with(call, pytest.fail.Exception(_failure_text(error, context), pytrace=False))
    return True


def _judge_pass(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Fail a passed test if it has a known bug that should always show."""
    bugs = _known_bugs_of(item)
    if always := next((bug for bug in bugs if bug.always), None):
        reason = known_bugs.not_shown(always.id)
        item.user_properties.append(("reason", reason))
        text = f"{reason}: is it fixed? Then its entry in known_bugs.toml has to go"
        _end_with(call, pytest.fail.Exception(text, pytrace=False))
    elif bugs:
        item.user_properties.append(("verdict", "known bug, not seen"))


def _known_bugs_of(item: pytest.Item) -> list[KnownBug]:
    """The known bugs of this kernel that concern the test."""
    if item.config.option.no_known_bugs or item.config.option.runxfail:
        return []
    test, cell = getattr(item, "originalname", item.name), cell_of(item)
    if bugs := [bug for bug in known_bugs.load() if bug.concerns(test, cell)]:
        host = this_host()
        return [bug for bug in bugs if bug.on(host)]
    return []


def _end_with(call: pytest.CallInfo[None], outcome: BaseException) -> None:
    """Replace the exception that ended the test by *outcome*, with the same traceback."""
    trace = call.excinfo.value.__traceback__ if call.excinfo is not None else None
    if trace is not None:
        call.excinfo = pytest.ExceptionInfo.from_exception(outcome.with_traceback(trace))
        return
    try:
        raise outcome
    except type(outcome):
        call.excinfo = pytest.ExceptionInfo.from_current()


def _keep(item: pytest.Item, data: dict[str, Any]) -> None:
    """Write the data of a violation into the results folder, of the host that booted this kernel if there is one."""
    name = file_name(item.nodeid)
    stream: ReportStream | None = item.config.pluginmanager.get_plugin("report-stream")
    if stream is not None:
        stream.send(failure=[name, data])
    else:
        write_failure(Path(item.config.option.results), name, data)


def _context(item: pytest.Item) -> Context:
    settings, cell = item.config.stash[SETTINGS], cell_of(item)
    if cell is not None:
        command = cell_command(_command_of(item.config), cell, settings)
    else:
        option = copy(item.config.option)
        option.seed = dict(item.user_properties).get("seed", option.seed)  # a test may have a seed of its own
        arguments = [item.nodeid, *options_given(option, [*SETTING_PARSERS, "kvm_device", "soak"])]
        command = f"{_command_of(item.config)} {shlex.join(arguments)}"
    return Context(this_host(), settings, item.nodeid, command, cell)


def _command_of(config: pytest.Config) -> str:
    """The command that runs pytest in this kernel again, with the options without a value."""
    session = guest_session(config)
    command = this_pytest() if session is None else session.reproduce_command
    return " ".join([command, *flags_given(config.option, ["thorough", "require_kvm", "no_known_bugs", "emit_c"])])


def _failure_text(error: ContractViolation, context: Context) -> str:
    """The violations, the test's own lines, environment and evidence; ``--tb=long`` shows the library's frames."""
    frames = [
        f"{os.path.relpath(frame.filename, ROOT)}:{frame.lineno}: in {frame.name}\n    {frame.line}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(ROOT / "selftests")
    ]
    message = [part for line in str(error).splitlines() for part in wrapped(line)]
    evidence = ["", *error.evidence.lines()] if error.evidence is not None else []
    return "\n".join([*message, *getattr(error, "__notes__", []), "", *frames, "", *context.lines(), *evidence])


def pytest_report_teststatus(
    report: pytest.CollectReport | pytest.TestReport,
) -> tuple[str, str, tuple[str, dict[str, bool]]] | None:
    """Show known bugs as such in the progress lines and in the count at the end."""
    if isinstance(report, pytest.TestReport) and (report.when == "call" or hasattr(report, "wasxfail")):
        outcome, _ = verdict(report, dict(report.user_properties))
        if outcome.startswith("known bug"):
            # pytest's count at the end has its own commas, and no plurals.
            return f"with a {outcome.replace(',', '')}", "k", (outcome.upper(), {"yellow": True})
    return None
