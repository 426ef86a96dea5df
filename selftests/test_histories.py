# SPDX-License-Identifier: GPL-2.0-only
"""Histories that nobody thought of: what guest and VMM do in any order, on KVM and on a model of the contract alike."""

import random
import shlex
import time
from collections.abc import Callable, Sequence

import pytest

from lib.cell import Settings
from lib.history import HistoryFailed, Step, run_history
from lib.history_search import shortest_failure
from lib.host import Host
from lib.kvm import Kvm
from lib.log_modes import LOG_MODES, DirtyRing
from lib.report import environment_lines, this_pytest

EXAMPLES = 50  # of a round; each round has a seed of its own, with which it is the first one
ROUNDS, THOROUGH_ROUNDS = 1, 20


def failure_text(failure: HistoryFailed, host: Host, repeat: str) -> str:
    """What a developer gets to see, with a script to paste into a report."""
    notes = getattr(failure, "__notes__", [])
    return "\n".join(
        [
            f"KVM and the model of its contract differ: {failure}",
            *notes,
            "",
            *environment_lines(host),
            f"repeat   {repeat}",
            "",
            "the shortest history that shows it, as a script (python - < FILE, in the suite's folder):",
            "",
            failure.script,
        ]
    )


@pytest.mark.parametrize("mode", list(LOG_MODES))
def test_any_history(
    kvm: Kvm, host: Host, settings: Settings, needs_log_mode: Callable[[str], None], thorough: bool,
    soak: int | None, pytestconfig: pytest.Config, mode: str,
) -> None:  # fmt: skip
    """Writes, loads, GET, CLEAR, harvests, resets, tracking on and off, slots made, moved, deleted: KVM does as the model."""
    needs_log_mode(mode)

    def run(steps: Sequence[Step]) -> None:
        run_history(kvm, host, mode, steps)

    rings = issubclass(LOG_MODES[mode], DirtyRing)
    end = time.monotonic() + (soak or 0)
    rounds = THOROUGH_ROUNDS if thorough else ROUNDS
    done = 0
    while (time.monotonic() < end) if soak else (done < rounds):
        seed = settings.seed + done
        failure = shortest_failure(run, rings, random.Random(f"{mode} {seed}").getrandbits(64), EXAMPLES)
        if failure is not None:
            command = pytestconfig.option.repeat_with or this_pytest()
            test = shlex.quote(f"selftests/test_histories.py::test_any_history[{mode}]")
            text = failure_text(failure, host, f"{command} {test} --seed {seed}")
            raise pytest.fail.Exception(text, pytrace=False)
        done += 1
