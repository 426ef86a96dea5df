# SPDX-License-Identifier: GPL-2.0-only
"""Compares the ctypes definitions of KVM's uAPI with the installed ``<linux/kvm.h>``, by means of the C compiler."""

import ctypes
import shutil
import subprocess
from typing import Any

import pytest

from kvm_util import uapi
from kvm_util.arch.x86_64 import uapi as x86_uapi

NAMES = vars(uapi) | vars(x86_uapi)
CONSTANTS = {name: value for name, value in NAMES.items() if name.startswith("KVM") and name.isupper()}
STRUCTS = {
    name: value
    for name, value in NAMES.items()
    if name.startswith("kvm_") and isinstance(value, type) and issubclass(value, ctypes.Structure)
}


def offsets(struct: Any) -> dict[str, int]:
    """Offsets of the fields that the header has too; of kvm_run's union also those of its members, as in ``io.port``."""
    found = {}
    for name, kind, *_ in struct._fields_:
        start = getattr(struct, name).offset
        if name == "_exit":
            for member, member_kind in kind._fields_:
                found[member] = start + getattr(kind, member).offset
                for inner, *_ in getattr(member_kind, "_fields_", ()):
                    found[f"{member}.{inner}"] = found[member] + getattr(member_kind, inner).offset
        elif not name.startswith("_"):
            found[name] = start
    return {name: offset for name, offset in found.items() if not name.startswith("pad")}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Values of constants, sizes of structures and offsets of fields by name, without what this header lacks."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc (apt install gcc libc6-dev)")
    lines = ["#include <stdio.h>", "#include <stddef.h>", "#include <linux/kvm.h>", "int main(void) {"]
    for name in CONSTANTS:
        lines += [f"#ifdef {name}", f'printf("{name} %lld\\n", (long long){name});', "#endif"]
    for name, struct in STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        lines += [f'printf("{name}.{field} %zu\\n", offsetof(struct {name}, {field}));' for field in offsets(struct)]
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
def test_constant_matches_header(header: dict[str, int], name: str) -> None:
    """Each capability, flag, exit reason and ioctl number has the value of the installed header."""
    if name not in header:
        pytest.skip(f"this machine's <linux/kvm.h> is older than {name}")
    assert header[name] == CONSTANTS[name]


@pytest.mark.parametrize("name", STRUCTS)
def test_struct_layout_matches_header(header: dict[str, int], name: str) -> None:
    """Each structure has the size and the field offsets of the installed header."""
    struct = STRUCTS[name]
    ours = {name: ctypes.sizeof(struct)} | {f"{name}.{field}": offset for field, offset in offsets(struct).items()}
    assert ours == {key: header[key] for key in ours}


def test_compared_names_are_complete() -> None:
    """The comparison with the header covers the ioctls, structures and nested fields that the suite uses most."""
    assert {"KVM_RUN", "KVM_GET_DIRTY_LOG", "KVM_RESET_DIRTY_RINGS", "KVM_DIRTY_LOG_PAGE_OFFSET"} <= set(CONSTANTS)
    assert {"kvm_run", "kvm_dirty_gfn", "kvm_sregs", "kvm_cpuid_entry2"} <= set(STRUCTS)
    assert "io.data_offset" in offsets(STRUCTS["kvm_run"])
