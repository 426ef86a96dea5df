# SPDX-License-Identifier: GPL-2.0-only
"""Plugin: the suite's options, and what they decide first: the kernel to test, and the results folder."""

import sys
from pathlib import Path
from typing import Any

import pytest

from harness import known_bugs
from harness.command_line import add_options, check_options, only_shows, seen_from
from harness.elsewhere import choose_kernel, needs_kernel
from harness.interruption import Interruption, handle_sigint_in_worker
from harness.kernel_options import AUTO
from harness.output_paths import OutputError, make_folder, remove_if_empty
from harness.results import new_folder
from harness.run_state import INTERRUPTION, TARGET, is_worker
from harness.selection import SelectionError
from harness.toml_file import TomlError
from kvm_util.host_limits import HostLimit

_made_key = pytest.StashKey[list[Path]]()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    add_options(parser, pluginmanager)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Find the other kernel to test, if there is one, before xdist and junitxml read the options."""
    option = config.option
    _read_known_bugs(option)
    if is_worker(config):
        handle_sigint_in_worker()
        config.args = config.workerinput["args"]  # type: ignore[attr-defined]
        return None
    interruption = config.stash[INTERRUPTION] = Interruption()
    if only_shows(option) and not option.collectonly:
        if option.kernel not in (None, AUTO):
            raise pytest.UsageError("an option that only shows something tests no kernel: leave out --kernel")
        return None
    interruption.install_handlers()
    config.pluginmanager.register(interruption, "interruption")
    try:
        check_options(config)
        if needs_kernel(option):
            status = choose_kernel(config)
            if TARGET in config.stash:
                make_results(config, config.stash[TARGET].label)
                if option.xmlpath is None:
                    option.xmlpath = f"{option.results}/junit.xml"
            return status
    except KeyboardInterrupt:
        print("interrupted: nothing was tested", file=sys.stderr)
        return pytest.ExitCode.INTERRUPTED
    except (SelectionError, OutputError) as error:
        raise pytest.UsageError(str(error)) from None
    except HostLimit as limit:
        raise pytest.UsageError(f"nothing can run here: {limit}") from None
    if option.kvm_params:
        raise pytest.UsageError("--kvm-params is for another kernel (--kernel); here, load KVM with these parameters")
    return None


def _read_known_bugs(option: Any) -> None:
    """Read the list of known bugs early, so that a mistake in it ends the run before any test; the list is cached."""
    if not option.no_known_bugs:
        try:
            known_bugs.load()
        except TomlError as error:
            raise pytest.UsageError(str(error)) from None


def make_results(config: pytest.Config, label: str) -> None:
    """Choose the results folder, and make it.

    :raises OutputError: it cannot be made
    """
    given = config.option.results
    folder = new_folder(label) if given is None else seen_from(config, given)
    config.option.results = str(folder)
    if not only_shows(config.option):
        config.stash[_made_key] = make_folder("--results", folder)


def pytest_unconfigure(config: pytest.Config) -> None:
    remove_if_empty(config.stash.get(_made_key, []))
