# SPDX-License-Identifier: GPL-2.0-only
"""How a KVM test ends: what it found is a failure with its report, or a known bug."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyTrackingError
from dirty_tracking.violations import ContractViolation
from harness import known_bugs
from harness.failure_report import Context, context_lines, failure_data, failure_text, this_pytest
from harness.kernel_options import flags_given
from harness.report_stream import ReportStream
from harness.run_report import not_kept, write_failure
from kvm_util.host import Host
from kvm_util.wording import wrapped
from runner import ROOT
from runner.guest_session import guest_session


def command_of(config: pytest.Config) -> str:
    """The command that runs pytest in this kernel again, with the options that have no value."""
    session = guest_session(config)
    command = this_pytest() if session is None else session.reproduce_command
    return " ".join([command, *flags_given(config.option, ["thorough", "require_kvm", "no_known_bugs"])])


class Outcome:
    """Runs the body of a KVM test, and turns its outcome into pytest's terms.

    A broken contract is a failure with the whole report, unless a known bug explains all of it; other errors get the
    context and the command that reproduces them.
    """

    def __init__(self, request: pytest.FixtureRequest, host: Host, settings: Settings) -> None:
        self._node = request.node
        self._config = request.config
        self._host = host
        self._settings = settings

    @contextmanager
    def expected(self, cell: Cell, settings: Settings | None = None) -> Iterator[None]:
        """Run the body; *settings* are those of the run, when they are not the command line's."""
        context = Context(self._host, settings or self._settings, command_of(self._config))
        bug = self._known_bug(cell)
        try:
            yield
        except DirtyTrackingError as error:
            text = failure_text(error, context)
            try:
                self._keep(failure_data(error, context))
            except OSError as why_not:
                text += f"\n{not_kept(self._config.option.results, why_not)}"
            self.record(error.run.figures)
            if bug is not None and bug.explains(error.kinds):
                self._node.user_properties.append(("findings", "\n".join(map(str, error.violations[:4]))))
                pytest.xfail(bug.id)
            raise pytest.fail.Exception(text, pytrace=False) from None  # the report says all that the error does
        except Exception as error:
            error.add_note("\n".join(context_lines(cell, context)))
            raise
        self._passed(bug)

    @contextmanager
    def contract(self) -> Iterator[None]:
        """Run the body of a test that is no cell, and that a known bug may concern."""
        bug = self._known_bug(None)
        try:
            yield
        except ContractViolation as error:
            if bug is not None and bug.explains(error.kinds):
                self._node.user_properties.append(("findings", str(error)))
                pytest.xfail(bug.id)
            raise
        self._passed(bug)

    def _passed(self, bug: known_bugs.KnownBug | None) -> None:
        if bug is not None and bug.always:
            pytest.fail(
                f"known bug {bug.id} did not show: is it fixed? Then its entry in known_bugs.toml has to go",
                pytrace=False,
            )
        if bug is not None:
            self._node.user_properties.append(("verdict", "known bug, not seen"))

    def record(self, figures: Any) -> None:
        """Put a run's figures into the results: the table, and JUnit's properties."""
        self._node.user_properties += asdict(figures).items()

    def _known_bug(self, cell: Cell | None) -> known_bugs.KnownBug | None:
        if self._config.option.no_known_bugs:
            return None
        matrix = "planned_cell" in self._node.fixturenames
        for bug in known_bugs.load():
            if bug.on(self._host) and (
                bug.concerns_cell(cell) if matrix and cell else self._node.originalname in bug.tests
            ):
                return bug
        return None

    def _keep(self, data: dict[str, Any]) -> None:
        name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in self._node.name)
        stream: ReportStream | None = self._config.pluginmanager.get_plugin("report-stream")
        if stream is not None:
            stream.send(failure=[name, data])
        else:
            write_failure(Path(self._config.option.results), name, data)


def in_short(broken: pytest.ExceptionInfo[BaseException]) -> pytest.ExceptionInfo[BaseException]:
    """What KVM did wrong, and the test's own lines that found it; ``--tb=long`` shows the suite's lines too."""
    trace = broken.value.__traceback__
    frames = [
        f"{os.path.relpath(frame.filename, ROOT)}:{frame.lineno}: in {frame.name}\n    {frame.line}"
        for frame in traceback.extract_tb(trace)
        if Path(frame.filename).is_relative_to(ROOT / "selftests")
    ]
    message = [part for line in str(broken.value).splitlines() for part in wrapped(line)]
    text = "\n".join([*message, *getattr(broken.value, "__notes__", []), "", *frames])
    return pytest.ExceptionInfo.from_exception(pytest.fail.Exception(text, pytrace=False).with_traceback(trace))
