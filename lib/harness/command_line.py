# SPDX-License-Identifier: GPL-2.0-only
"""The suite's options of pytest: their definitions, their values, and checks of these."""

import argparse
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dirty_tracking.cell import Settings
from harness.kernel_options import (
    AUTO,
    LONGEST,
    add_kernel_options,
    machine_numbers,
    option_name,
    other_kernel_options,
)
from harness.output_paths import RESULTS, check_file, check_folder
from harness.run_report import FILES_OF_A_RUN
from harness.selection import (
    DEFAULT_VCPUS,
    DEFAULTS,
    DIMENSIONS,
    check_memory,
    check_values,
    parse_milliseconds,
    parse_names,
    parse_number,
    parse_size,
)
from kvm_util.host_limits import MIB, Limit
from kvm_util.kvm import DEFAULT_DEVICE
from runner.errors import CannotTest

_MOST_WORKERS = 1024
_MOST_ITERATIONS = 1_000_000  # some days
# Options of pytest that show something and run no tests
_ONLY_SHOW = ("help", "version", "collectonly", "showfixtures", "show_fixtures_per_test", "markers", "cacheshow")
# Options of pytest that print something of their own, or need a terminal
_NO_KTAP = {"collectonly": "--collect-only", "usepdb": "--pdb", "trace": "--trace"}
# How the options that make the settings of a run are read
SETTING_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "seed": lambda option, text: parse_number(option, text, 0),
    "iterations": lambda option, text: parse_number(option, text, 1, _MOST_ITERATIONS),
    "interval": parse_milliseconds,
    "ring_count": lambda option, text: parse_number(option, text, 1),
    "phys_offset": lambda option, text: parse_number(option, text, 0),
    "test_mem": parse_size,
}


class _NoWorkers(argparse.Action):
    """Option -n if xdist is not loaded: pytest would only report an unrecognized argument."""

    def __call__(self, *_: object) -> NoReturn:
        loads = "it is not loaded (add -p xdist, or unset PYTEST_DISABLE_PLUGIN_AUTOLOAD)"
        why = loads if find_spec("xdist") else "it is not installed"
        raise pytest.UsageError(f"-n needs pytest-xdist: {why}")


def add_options(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the suite's options to pytest's."""
    group = parser.getgroup(
        "dirty", "KVM dirty-page tracking (letters in brackets: the option of the C dirty_log_test)"
    )
    for name, values in DIMENSIONS.items():
        letter = {"log_mode": " [-M]", "guest_mode": " [-m]"}.get(name, "")
        left_out = " and ".join(value for value in values if value not in DEFAULTS[name])
        text = f"which of {', '.join(values)}; default all{f' but {left_out}' if left_out else ''}{letter}"
        group.addoption(option_name(name), metavar="NAME,...", help=text)
    default = Settings()
    texts = {
        "vcpus N": "vCPUs of each VM; default both 1 and 2",
        "iterations N": f"how often to verify, up to {_MOST_ITERATIONS}; default {default.iterations} [-i]",
        "interval MS": "for how many milliseconds the guest writes in each, up to an hour;"
        f" default {default.interval:g} [-I]",
        "ring-count N": "entries of a dirty ring, a power of two that this KVM takes;"
        f" default {default.ring_count} [-c]",
        "phys-offset GPA": "where the test memory begins; default: at the top [-p]",
        "test-mem SIZE": "test memory in bytes, or with a unit: K, M, G or T (1024, its square, ...), whole pages;"
        " 3 pages are added; default 1G",
        "seed N": "decides what is written and when it is collected, 0 or more; default: a new one",
        "soak S": "run random operation sequences for so many seconds in each log mode, up to a week (test_sequences.py)",
        "kvm-device PATH": f"this host's KVM; default {DEFAULT_DEVICE}",
        "results DIR": "where to put result files; default results/<kernel>-<time>",
        "resume DIR": "go on with the run whose results are in DIR, with its options, behind the tests that ended",
    }
    for words, text in texts.items():
        name, metavar = words.split()
        group.addoption(f"--{name}", metavar=metavar, help=text)
    flags = {
        "full": "every combination of these; default: every pair of values",
        "thorough": "the long form of each test that has one",
        "require-kvm": "fail where a test on KVM would skip, whatever the reason",
        "no-known-bugs": "known kernel bugs (known_bugs.toml) are plain failures",
        "emit-c": "print an operation sequence that fails as a C program, too (test_sequences.py)",
        "ktap": "print the results as KTAP, the kernel's format, and nothing else on standard output (docs/kselftest.md)",
    }
    for name, text in flags.items():
        group.addoption(f"--{name}", action="store_true", help=text)
    group.addoption("--resumed", action="store_true", help=argparse.SUPPRESS)  # how --resume starts the run
    if not pluginmanager.hasplugin("xdist") and (
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD" in os.environ or not find_spec("xdist")
    ):
        # Only this method accepts a lowercase letter as -n; xdist calls it too.
        group._addoption("-n", action=_NoWorkers, help="(xdist is not loaded)")
    add_kernel_options(parser.getgroup("kernel", "KVM dirty-page tracking: another kernel, booted in QEMU"))


def check_options(config: pytest.Config) -> None:
    """Check the options as far as possible without KVM."""
    option = config.option
    texts = {
        "--kernel": (option.kernel, "kernel"),
        "--qemu": (option.qemu, "program"),
        "--cpu-model": (option.cpu_model, "CPU model"),
        "--kvm-device": (option.kvm_device, "device"),
        "--results": (option.results, "folder"),
        **{name: (path, "file") for name, path in _files(option).items()},
    }
    for name, (text, what) in texts.items():
        if text == "":
            raise pytest.UsageError(f"{name}: '' names no {what}")
    if option.kernel is None and (unused := other_kernel_options(option)):
        raise pytest.UsageError(
            f"{', '.join(unused)}: only for tests in another kernel (--kernel NAME, or make check-kernel)"
        )
    if option.kernel not in (None, AUTO) and option.kvm_device is not None:
        raise pytest.UsageError(
            "--kvm-device: is this host's KVM, and the tests run in another kernel (--kernel), with its own"
        )
    if option.ktap and (other := next((word for name, word in _NO_KTAP.items() if getattr(option, name)), None)):
        raise pytest.UsageError(f"--ktap: {other} needs standard output for something else")
    workers = getattr(option, "numprocesses", None)
    if isinstance(workers, int) and not 0 <= workers <= _MOST_WORKERS:
        raise pytest.UsageError(f"-n: {workers} is out of range, it must be from 0 to {_MOST_WORKERS}")
    numbers = machine_numbers(option)
    if option.kernel is not None and option.kvm_params:
        # Imported here: the other kernel loads this file too, and each import costs emulated time.
        from runner.modules import parse_parameters

        try:
            parse_parameters(option.kvm_params)
        except CannotTest as error:
            raise pytest.UsageError(f"--kvm-params: {error}") from None
    settings = settings_of(option)
    check_values(settings, vcpus_of(option)[-1])
    soak_of(option)
    dimensions_of(option)
    if option.kernel is not None and option.test_mem is not None:
        memory = numbers["vm_memory"]
        limit = Limit(f"the machine has {memory} MiB", memory * MIB, "a larger --vm-memory")
        check_memory(settings, vcpus_of(option)[-1], 1, [limit])
    if not only_shows(option):
        results = RESULTS if option.results is None else seen_from(config, option.results)
        check_folder("--results", results)
        taken = () if option.results is None else (results, *(results / name for name in FILES_OF_A_RUN))
        for name, path in _files(option).items():
            if path is not None:
                if seen_from(config, path) in taken:
                    raise pytest.UsageError(f"{name}: {path} is what the run's own results are written to (--results)")
                check_file(name, seen_from(config, path))


def _files(option: Any) -> dict[str, str | None]:
    """The files that pytest itself will write, by option; its plugins for them may be disabled."""
    return {"--junitxml": getattr(option, "xmlpath", None), "--log-file": getattr(option, "log_file", None)}


def seen_from(config: pytest.Config, path: str) -> Path:
    """A path of the user, relative to the folder in which the command runs."""
    return config.invocation_params.dir / Path(path).expanduser()


def only_shows(option: Any) -> bool:
    """Whether an option has pytest show something and run no test."""
    return any(getattr(option, name, None) for name in _ONLY_SHOW)


def dimensions_of(option: Any) -> dict[str, tuple[Any, ...]]:
    """The selected values of each dimension of the matrix."""
    dimensions: dict[str, tuple[Any, ...]] = {
        name: DEFAULTS[name]
        if (text := getattr(option, name)) is None
        else parse_names(option_name(name), text, values)
        for name, values in DIMENSIONS.items()
    }
    dimensions["vcpus"] = vcpus_of(option)
    return dimensions


def vcpus_of(option: Any) -> tuple[int, ...]:
    """The selected numbers of vCPUs."""
    return DEFAULT_VCPUS if option.vcpus is None else (parse_number("--vcpus", option.vcpus, 1),)


def soak_of(option: Any) -> int | None:
    """For how many seconds to run random operation sequences in each log mode; None for their usual number."""
    return None if option.soak is None else parse_number("--soak", option.soak, 1, LONGEST)


def settings_of(option: Any) -> Settings:
    """The settings of the run."""
    given = {
        name: parse(option_name(name), text)
        for name, parse in SETTING_PARSERS.items()
        if (text := getattr(option, name)) is not None
    }
    return Settings(kvm_device=option.kvm_device or DEFAULT_DEVICE, **given)
