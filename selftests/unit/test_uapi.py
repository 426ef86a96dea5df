# SPDX-License-Identifier: GPL-2.0-only
"""Compares the ctypes definitions of KVM's uAPI with the installed ``<linux/kvm.h>``, by means of the C compiler."""

import ctypes
import shutil
import subprocess
from typing import Any

import pytest

from kvm_util import uapi
from kvm_util.arch.x86_64 import uapi as x86_uapi

MODULES = (uapi, x86_uapi)
CONSTANTS = {
    name: value
    for module in MODULES
    for name, value in vars(module).items()
    if name.startswith("KVM") and name.isupper()
}
STRUCTS = {
    name: value
    for module in MODULES
    for name, value in vars(module).items()
    if name.startswith("kvm_") and isinstance(value, type) and issubclass(value, ctypes.Structure)
}


def exit_fields(struct: Any) -> dict[str, Any]:
    """The members of kvm_run's anonymous union, by name."""
    return dict(dict(struct._fields_)["_exit"]._fields_)


def fields(struct: type[ctypes.Structure]) -> list[str]:
    """The fields that the header has too; members of kvm_run's union also with their fields, as in ``io.port``."""
    names = []
    for field in struct._fields_:
        name = field[0]
        if name == "_exit":
            for inner in exit_fields(struct):
                names.append(inner)
                names += [f"{inner}.{member[0]}" for member in getattr(exit_fields(struct)[inner], "_fields_", ())]
        elif not name.startswith(("_", "padding", "pad")):
            names.append(name)
    return [name for name in names if not name.startswith("padding")]


def offset(struct: Any, path: str) -> int:
    if path in {name for name, *_ in struct._fields_}:
        return int(getattr(struct, path).offset)
    first, _, rest = path.partition(".")
    start = int(struct._exit.offset) + int(getattr(dict(struct._fields_)["_exit"], first).offset)
    inner = exit_fields(struct)[first]
    return start + (int(getattr(inner, rest).offset) if rest else 0)


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int | None]:
    """Values of constants, sizes of structures and offsets of fields by name, without what this header lacks."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc (apt install gcc libc6-dev)")
    lines = ["#include <stdio.h>", "#include <stddef.h>", "#include <linux/kvm.h>", "int main(void) {"]
    for name in CONSTANTS:
        lines += [f"#ifdef {name}", f'printf("{name} %lld\\n", (long long){name});', "#endif"]
    for name, struct in STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        lines += [f'printf("{name}.{field} %zu\\n", offsetof(struct {name}, {field}));' for field in fields(struct)]
    folder = tmp_path_factory.mktemp("uapi")
    source, program = folder / "dump.c", folder / "dump"
    source.write_text("\n".join([*lines, "return 0; }"]))
    compiled = subprocess.run(["gcc", "-o", program, source], capture_output=True, text=True, check=False)
    if "linux/kvm.h: No such file" in compiled.stderr:
        pytest.skip("no <linux/kvm.h> (apt install linux-libc-dev)")
    assert compiled.returncode == 0, compiled.stderr
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant_matches_header(header: dict[str, int | None], name: str) -> None:
    """Each capability, flag, exit reason and ioctl number has the value of the installed header."""
    if name not in header:
        pytest.skip(f"this machine's <linux/kvm.h> is older than {name}")
    assert header[name] == CONSTANTS[name]


@pytest.mark.parametrize("name", STRUCTS)
def test_struct_layout_matches_header(header: dict[str, int | None], name: str) -> None:
    """Each structure has the size and the field offsets of the installed header."""
    struct = STRUCTS[name]
    ours = {name: ctypes.sizeof(struct)} | {f"{name}.{field}": offset(struct, field) for field in fields(struct)}
    assert ours == {key: header[key] for key in ours}


def test_compared_names_are_complete() -> None:
    """The comparison with the header covers the ioctls, structures and nested fields that the suite uses most."""
    assert {"KVM_RUN", "KVM_GET_DIRTY_LOG", "KVM_RESET_DIRTY_RINGS", "KVM_DIRTY_LOG_PAGE_OFFSET"} <= set(CONSTANTS)
    assert {"kvm_run", "kvm_dirty_gfn", "kvm_sregs", "kvm_cpuid_entry2"} <= set(STRUCTS)
    assert "io.data_offset" in fields(STRUCTS["kvm_run"])


def test_wrong_constant_is_detected(header: dict[str, int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant with a wrong value fails the comparison with the header."""
    monkeypatch.setitem(CONSTANTS, "KVM_RUN", CONSTANTS["KVM_RUN"] + 1)
    with pytest.raises(AssertionError):
        test_constant_matches_header(header, "KVM_RUN")
