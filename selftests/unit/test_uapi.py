# SPDX-License-Identifier: GPL-2.0-only
"""The ctypes mirror of the kernel's ABI, against this machine's ``<linux/kvm.h>`` through the C compiler."""

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
    """The members of kvm_run's anonymous union, with their types."""
    return dict(dict(struct._fields_)["_exit"]._fields_)


def fields(struct: type[ctypes.Structure]) -> list[str]:
    """The fields that the header has under the same name; nested ones with a dot."""
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
    """Every name's value, size or offset as the compiler sees it; None for a name that this header does not have yet."""
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
def test_constant(header: dict[str, int | None], name: str) -> None:
    """Capabilities, flags, exit reasons and ioctl numbers."""
    if name not in header:
        pytest.skip(f"this machine's <linux/kvm.h> is older than {name}")
    assert header[name] == CONSTANTS[name]


@pytest.mark.parametrize("name", STRUCTS)
def test_struct(header: dict[str, int | None], name: str) -> None:
    """Size and offsets."""
    struct = STRUCTS[name]
    ours = {name: ctypes.sizeof(struct)} | {f"{name}.{field}": offset(struct, field) for field in fields(struct)}
    assert ours == {key: header[key] for key in ours}


def test_the_mirror_is_not_empty() -> None:
    """The tables above are made by looking; they must have found what the suite lives on."""
    assert {"KVM_RUN", "KVM_GET_DIRTY_LOG", "KVM_RESET_DIRTY_RINGS", "KVM_DIRTY_LOG_PAGE_OFFSET"} <= set(CONSTANTS)
    assert {"kvm_run", "kvm_dirty_gfn", "kvm_sregs", "kvm_cpuid_entry2"} <= set(STRUCTS)
    assert "io.data_offset" in fields(STRUCTS["kvm_run"])


def test_header_names_are_compared_by_value(header: dict[str, int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong number in the mirror is noticed."""
    monkeypatch.setitem(CONSTANTS, "KVM_RUN", CONSTANTS["KVM_RUN"] + 1)
    with pytest.raises(AssertionError):
        test_constant(header, "KVM_RUN")
