# SPDX-License-Identifier: GPL-2.0-only
"""The plugins that make pytest run the suite; each says what it is for."""

import pytest

from runner.unmet import leave, unmet

if reason := unmet():  # before it shows as an import that fails
    leave(reason, pytest.ExitCode.USAGE_ERROR)

# Of two hooks the plugin that comes later has the first.
pytest_plugins = [
    "harness.startup",
    "harness.session",
    "harness.collection",
    "harness.fixtures",
    "harness.verdicts",
    "harness.summary",
]
