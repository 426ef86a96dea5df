# SPDX-License-Identifier: GPL-2.0-only
"""Plugin: the suite's options, and what they decide first: the kernel to test, and the results folder."""

import sys

import pytest

from harness import known_bugs
from harness.command_line import add_options, check_options, only_shows, seen_from
from harness.elsewhere import choose_kernel, needs_kernel
from harness.interruption import Interruption, handle_sigint_in_worker
from harness.kernel_options import AUTO
from harness.ktap import Ktap
from harness.output_paths import make_folder, new_folder, remove_if_empty
from harness.resume import open_journal, resume, tell_of_death
from harness.run_state import INTERRUPTION, JOURNAL, RESUMED, TARGET, is_worker
from harness.toml_file import TomlError
from kvm_util.host_limits import HostLimit
from runner.guest_session import guest_session


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    add_options(parser, pluginmanager)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Find the other kernel to test, if there is one, before xdist and junitxml read the options."""
    option = config.option
    if not option.no_known_bugs:
        try:
            known_bugs.load()
        except TomlError as error:  # a mistake in the list ends the run before any test
            raise pytest.UsageError(str(error)) from None
    if is_worker(config):
        handle_sigint_in_worker()
        config.args = config.workerinput["args"]  # type: ignore[attr-defined]
        return None
    if option.resume is not None:
        return resume(config, seen_from(config, option.resume))
    interruption = config.stash[INTERRUPTION] = Interruption()
    if only_shows(option) and not option.collectonly:
        if option.kernel not in (None, AUTO):
            raise pytest.UsageError("an option that only shows something tests no kernel: leave out --kernel")
        return None
    interruption.install_handlers()
    config.pluginmanager.register(interruption, "interruption")
    try:
        check_options(config)
        if option.ktap:
            config.pluginmanager.register(Ktap(config), "ktap")
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
    except HostLimit as limit:
        raise pytest.UsageError(f"nothing can run here: {limit}") from None
    if option.kvm_params:
        raise pytest.UsageError("--kvm-params is for another kernel (--kernel); here, load KVM with these parameters")
    return None


def make_results(config: pytest.Config, label: str) -> None:
    """Choose the results folder, and make it."""
    given = config.option.results
    folder = new_folder(label) if given is None else seen_from(config, given)
    config.option.results = str(folder)
    if only_shows(config.option):
        return
    made = make_folder("--results", folder)
    config.add_cleanup(lambda: remove_if_empty(made))
    if guest_session(config) is not None:  # its host has the journal
        return
    if given is None:
        tell_of_death(label)
    journal, run = open_journal(folder, config.option.resumed)
    config.add_cleanup(journal.close)
    config.stash[JOURNAL] = journal
    if run is not None:
        config.stash[RESUMED] = run
