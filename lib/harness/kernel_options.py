# SPDX-License-Identifier: GPL-2.0-only
"""The command line of a run in another kernel: the options of the host, and those that pytest gets in the kernel."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from harness.selection import parse_number
from runner import ROOT

# The suite's tests of itself, which run in a kernel only if they are named
OWN_TESTS = "selftests/unit/"
AUTO = "auto"  # --kernel: a local kernel, if this host's KVM cannot be used
ACCELERATORS = ("auto", "tcg", "kvm")

LONGEST = 7 * 24 * 3600  # seconds
# Options with a number: default, minimum, maximum, unit, help
_MACHINE_OPTIONS: dict[str, tuple[int, int, int | None, str, str]] = {
    "vm_memory": (3072, 256, None, "MIB", "memory of the machine, at least 256"),
    "vm_cpus": (2, 1, None, "N", "its CPUs"),
    "time_limit": (300, 1, LONGEST, "S", "the kernel hangs if the machine sends no message for so long"),
}
_MACHINE_TEXTS = ("qemu", "accel", "cpu_model", "append")
_TEXT_OPTIONS = ("kvm_params", *_MACHINE_TEXTS)
# pytest's own options that the session in the kernel gets as well: those that select tests, and others
_EXPRESSIONS = {"keyword": "-k", "markexpr": "-m"}
_LISTS = {"deselect": "--deselect", "ignore": "--ignore", "ignore_glob": "--ignore-glob"}
_PYTEST_OPTIONS = {"tbstyle": "--tb", "maxfail": "--maxfail"}
_PYTEST_FLAGS = {"showlocals": "--showlocals", "runxfail": "--runxfail", "fulltrace": "--full-trace"}
# Those that cannot work there
_UNSUPPORTED = {
    "collectonly": "--collect-only", "usepdb": "--pdb", "trace": "--trace",
    "lf": "--lf", "failedfirst": "--ff", "newfirst": "--nf", "stepwise": "--stepwise",
    "setuponly": "--setup-only", "setupplan": "--setup-plan", "setupshow": "--setup-show",
}  # fmt: skip


def option_name(field: str) -> str:
    """The command line's name of an option: ``--log-mode`` for ``log_mode``."""
    return f"--{field.replace('_', '-')}"


MACHINE_OPTIONS = tuple(map(option_name, (*_MACHINE_OPTIONS, *_MACHINE_TEXTS)))


def add_kernel_options(group: pytest.OptionGroup) -> None:
    """Add the options that name and describe another kernel to run in."""
    group.addoption(
        "--kernel",
        metavar="KERNEL",
        help="run the tests in this kernel: bzImage, build tree, .deb, unpacked package, installed release, debian:6.12;"
        f" {AUTO}: in a local one if this host has no usable KVM",
    )
    group.addoption("--kvm-params", metavar="PARAMS", help="of its KVM modules, such as 'kvm.tdp_mmu=0 kvm_amd.npt=0'")
    for name, (default, _, _, unit, text) in _MACHINE_OPTIONS.items():
        group.addoption(option_name(name), metavar=unit, help=f"{text}; default {default}")
    group.addoption(
        "--accel", choices=ACCELERATORS, help="QEMU's accelerator; default: kvm where it can be nested, else tcg"
    )
    group.addoption(
        "--qemu", metavar="PATH", help="the QEMU to use; default: this host's if it is known to be sound, else Debian's"
    )
    group.addoption("--cpu-model", metavar="MODEL", help="as QEMU's -cpu takes it; default: the one known to work")
    group.addoption("--append", metavar="TEXT", help="more of the kernel's command line")


def machine_numbers(option: Any) -> dict[str, int]:
    """The values of the options of the machine that have a number, by name.

    :raises SelectionError: one is no number, or out of its range
    """
    return {
        name: default if (text := getattr(option, name)) is None else parse_number(option_name(name), text, low, high)
        for name, (default, low, high, _, _) in _MACHINE_OPTIONS.items()
    }


def for_another_kernel(option: Any) -> list[str]:
    """The names of the given options that only another kernel uses."""
    return [option_name(name) for name in (*_TEXT_OPTIONS, *_MACHINE_OPTIONS) if getattr(option, name)]


def options_given(option: Any, names: Iterable[str]) -> list[str]:
    """The options among *names* that have a value, as words of a command line."""
    given = {name: getattr(option, name) for name in names}
    return [f"{option_name(name)}={value}" for name, value in given.items() if value is not None]


def flags_given(option: Any, names: Iterable[str]) -> list[str]:
    """The flags among *names* that are set, as words of a command line."""
    return [option_name(name) for name in names if getattr(option, name)]


def kernel_options(option: Any, image: Path) -> list[str]:
    """The options that reproduce the kernel and the machine of this run, as words of a command line.

    :param image: the kernel that ``auto`` stands for
    """
    kernel = image if option.kernel == AUTO else option.kernel
    given = {name: getattr(option, name) for name in (*_TEXT_OPTIONS, *_MACHINE_OPTIONS)}
    return [f"--kernel={kernel}", *(f"{option_name(name)}={value}" for name, value in given.items() if value)]


def options_in_kernel(option: Any, names: Iterable[str], flags: Iterable[str]) -> list[str]:
    """The options of this run that the session in the kernel gets, as words of a command line.

    :param names: the suite's options with a value
    :param flags: those without
    """
    words = [*options_given(option, names), *flags_given(option, flags), *selection_options(option)]
    words += [f"{word}={value}" for name, word in _PYTEST_OPTIONS.items() if (value := getattr(option, name))]
    return words + [word for name, word in _PYTEST_FLAGS.items() if getattr(option, name)]


def selection_options(option: Any) -> list[str]:
    """The options of pytest's own that select tests, as words of a command line."""
    words = [
        word for name, letter in _EXPRESSIONS.items() if (text := getattr(option, name)) for word in (letter, text)
    ]
    return words + [f"{word}={value}" for name, word in _LISTS.items() for value in getattr(option, name) or []]


def split_tests(config: pytest.Config) -> tuple[list[str], list[str]]:
    """Split the tests of the command line into those that run in the kernel and those that run on this host.

    With ``--kernel auto`` the suite's tests of itself run on this host; with a named kernel they run in that one if they are
    named too, and not at all otherwise.

    :raises pytest.UsageError: a test is not in this suite, or an option cannot be used with another kernel
    """
    for name, word in _UNSUPPORTED.items():
        if config.getoption(name, None):
            raise pytest.UsageError(f"{word} cannot be used where the tests run in another kernel (--kernel)")
    stay = config.option.kernel == AUTO
    # On the command line, or as pytest's setting testpaths, which `make run` gives
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
