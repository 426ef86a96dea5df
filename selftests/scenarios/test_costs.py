# SPDX-License-Identifier: GPL-2.0-only
"""What dirty logging costs: how long each phase takes for a fixed number of writes (perf_run.py), for `make compare`."""

import pytest

from dirty_tracking.modes import LOG_MODES
from dirty_tracking.perf_run import Scenario, measure
from dirty_tracking.platform import uses_pml
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB

pytestmark = pytest.mark.threads

# Of many short rounds some are not disturbed by what else runs on the host.
ROUNDS, ROUNDS_IF_THOROUGH = 3, 20


@pytest.mark.log_modes("dirty-log", "clear-log", "dirty-ring")
def test_each_write_is_reported_once(
    kvm: Kvm, host: Host, request: pytest.FixtureRequest, thorough: bool, log_mode: str, emulated_cpu: bool
) -> None:
    """If each page is written once in each iteration, with all vCPUs stopped between, it is reported once for each."""
    scenario = Scenario(log_mode, memory=(8 if emulated_cpu else 64) * MIB, iterations=2)
    costs = [measure(kvm, scenario, seed) for seed in range(ROUNDS_IF_THOROUGH if thorough else ROUNDS)]
    # The mean of a phase, since the iterations differ: only in the first is logging new to a page.
    rounds = [
        {phase: round(times["total"] / times["count"], 4) for phase, times in cost.phases.items()} for cost in costs
    ]
    request.node.user_properties += [("cost", f"{log_mode}, {scenario.memory // MIB} MiB"), ("cost_rounds", rounds)]
    written = scenario.iterations * scenario.npages
    most = written * (2 if LOG_MODES[log_mode].uses_ring and uses_pml(host) else 1)  # E4
    for cost in costs:
        assert written <= cost.dirty_pages <= most, f"{cost.dirty_pages} pages reported, {written} written"
