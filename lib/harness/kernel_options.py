# SPDX-License-Identifier: GPL-2.0-only
"""Options for running the tests in another kernel, and the command line of the session in that kernel."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from harness.selection import parse_number
from runner import ROOT

# The suite's tests of itself; they run in another kernel only if they are named on the command line
OWN_TESTS = "selftests/unit/"
# --kernel auto: run in a local kernel if this host has no usable KVM
AUTO = "auto"
ACCELERATORS = ("auto", "tcg", "kvm")

LONGEST = 7 * 24 * 3600  # seconds
VM_MEMORY = 3072  # MiB of a machine, by default
# Options with a number: default, minimum, maximum, unit, help; 0 stands for a number that the run chooses
_MACHINE_OPTIONS: dict[str, tuple[int, int, int | None, str, str]] = {
    "vm_memory": (VM_MEMORY, 256, None, "MIB", "memory of the machine, at least 256"),
    "vm_cpus": (2, 1, None, "N", "its CPUs; under emulation 1 for tests without threads"),
    "machines": (0, 1, 64, "N", "how many of them share the tests"),
    "time_limit": (300, 1, LONGEST, "S", "seconds without a message after which the kernel counts as hung"),
}
_MACHINE_TEXTS = ("qemu", "accel", "cpu_model", "append")
_TEXT_OPTIONS = ("kvm_params", *_MACHINE_TEXTS)
# pytest's own options to pass on to the session in the kernel: those that select tests, and others
_EXPRESSIONS = {"keyword": "-k", "markexpr": "-m"}
_LISTS = {"deselect": "--deselect", "ignore": "--ignore", "ignore_glob": "--ignore-glob"}
_PYTEST_OPTIONS = {"tbstyle": "--tb", "maxfail": "--maxfail"}
_PYTEST_FLAGS = {"showlocals": "--showlocals", "runxfail": "--runxfail", "fulltrace": "--full-trace"}
# pytest's own options that cannot be used there
_UNSUPPORTED = {
    "collectonly": "--collect-only", "usepdb": "--pdb", "trace": "--trace",
    "lf": "--lf", "failedfirst": "--ff", "newfirst": "--nf", "stepwise": "--stepwise",
    "setuponly": "--setup-only", "setupplan": "--setup-plan", "setupshow": "--setup-show",
}  # fmt: skip


def option_name(field: str) -> str:
    """An option's name on the command line: ``--log-mode`` for ``log_mode``."""
    return f"--{field.replace('_', '-')}"


MACHINE_OPTIONS = tuple(map(option_name, (*_MACHINE_OPTIONS, *_MACHINE_TEXTS)))


def add_kernel_options(group: pytest.OptionGroup) -> None:
    """Add the options that name and describe another kernel to run in."""
    group.addoption(
        "--kernel",
        metavar="KERNEL",
        help="run the tests in this kernel: bzImage, build tree, .deb, unpacked package, installed release, debian:6.12;"
        f" {AUTO}: a local kernel, if this host has no usable KVM",
    )
    group.addoption(
        "--kvm-params", metavar="PARAMS", help="parameters of its KVM modules, such as 'kvm.tdp_mmu=0 kvm_amd.npt=0'"
    )
    for name, (default, _, _, unit, text) in _MACHINE_OPTIONS.items():
        usual = default or "as many as CPUs, memory and tests allow"
        group.addoption(option_name(name), metavar=unit, help=f"{text}; default {usual}")
    group.addoption(
        "--accel", choices=ACCELERATORS, help="QEMU's accelerator; default: kvm where it can be nested, else tcg"
    )
    group.addoption(
        "--qemu", metavar="PATH", help="the QEMU to use; default: this host's if it is known to be sound, else Debian's"
    )
    group.addoption("--cpu-model", metavar="MODEL", help="CPU model for QEMU's -cpu; default: the one known to work")
    group.addoption("--gcov", action="store_true", help="keep GCOV's counters of its KVM (docs/coverage.md)")
    group.addoption("--append", metavar="TEXT", help="parameters to append to the kernel's command line")


def machine_numbers(option: Any) -> dict[str, int]:
    """The values of the machine's numeric options, by name; the default of an option that is not given.

    :raises pytest.UsageError: a value is not a number, or out of range
    """
    return {
        name: default if (text := getattr(option, name)) is None else parse_number(option_name(name), text, low, high)
        for name, (default, low, high, _, _) in _MACHINE_OPTIONS.items()
    }


def other_kernel_options(option: Any) -> list[str]:
    """The given options that need --kernel, as named on the command line; an empty value counts as not given."""
    return [option_name(name) for name in (*_TEXT_OPTIONS, *_MACHINE_OPTIONS, "gcov") if getattr(option, name)]


def options_given(option: Any, names: Iterable[str]) -> list[str]:
    """The named options that have a value, as words of a command line."""
    given = {name: getattr(option, name) for name in names}
    return [f"{option_name(name)}={value}" for name, value in given.items() if value is not None]


def flags_given(option: Any, names: Iterable[str]) -> list[str]:
    """The named flags that are set, as words of a command line."""
    return [option_name(name) for name in names if getattr(option, name)]


def kernel_options(option: Any, image: Path) -> list[str]:
    """The options to run pytest in the same kernel and machine again, as words of a command line; the CPUs are left out.

    :param image: the kernel that --kernel auto has chosen
    """
    kernel = image if option.kernel == AUTO else option.kernel
    given = {name: getattr(option, name) for name in (*_TEXT_OPTIONS, *_MACHINE_OPTIONS) if name != "vm_cpus"}
    return [f"--kernel={kernel}", *(f"{option_name(name)}={value}" for name, value in given.items() if value)]


def options_in_kernel(option: Any, names: Iterable[str], flags: Iterable[str]) -> list[str]:
    """The options for the session in the kernel, as words of a command line.

    :param names: names of the suite's options that take a value
    :param flags: names of those that take none
    """
    words = [*options_given(option, names), *flags_given(option, flags), *selection_options(option)]
    words += [f"{word}={value}" for name, word in _PYTEST_OPTIONS.items() if (value := getattr(option, name))]
    return words + [word for name, word in _PYTEST_FLAGS.items() if getattr(option, name)]


def selection_options(option: Any) -> list[str]:
    """Pytest's own options that select tests, as words of a command line."""
    words = [
        word for name, letter in _EXPRESSIONS.items() if (text := getattr(option, name)) for word in (letter, text)
    ]
    return words + [f"{word}={value}" for name, word in _LISTS.items() for value in getattr(option, name) or []]


def split_tests(config: pytest.Config) -> tuple[list[str], list[str]]:
    """Split the selected tests into those for the other kernel and those for this host.

    The suite's tests of itself run on this host with ``--kernel auto``. With a named kernel they run there if the command
    line names them, else not at all.

    :returns: arguments for the session in the kernel, and for the one here
    :raises pytest.UsageError: a path is outside the suite, or an option cannot be used with --kernel
    """
    for name, word in _UNSUPPORTED.items():
        if config.getoption(name, None):
            raise pytest.UsageError(f"{word} cannot be used where the tests run in another kernel (--kernel)")
    stay = config.option.kernel == AUTO
    # Whether tests are named on the command line or in pytest's setting testpaths, which `make run` passes
    named = config.args_source is not pytest.Config.ArgsSource.INVOCATION_DIR
    there: list[str] = []
    here: list[str] = []
    for argument in config.args if named else [str(ROOT / "selftests")]:
        path, separator, name = argument.partition("::")
        try:
            inside = (config.invocation_params.dir / path).resolve().relative_to(ROOT)
        except ValueError:
            raise pytest.UsageError(f"{path} is not part of this suite, so it cannot run in another kernel") from None
        if stay and inside.is_relative_to(OWN_TESTS):
            here.append(f"{ROOT / inside}{separator}{name}")
            continue
        there.append(f"{inside}{separator}{name}")
        if Path(OWN_TESTS).is_relative_to(inside):
            there.append(f"--ignore={OWN_TESTS}")
            here += [str(ROOT / OWN_TESTS)] if stay else []
    return there, here
