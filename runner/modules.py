# SPDX-License-Identifier: GPL-2.0-only
"""The modules of a kernel to boot, KVM's and others: files, the order to load them in, and the parameters they have."""

import difflib
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from runner.errors import CannotTest
from runner.kernel import Kernel, decompress_module


@dataclass(frozen=True)
class Module:
    """A module.

    :ivar optional: whether the kernel can be tested without it
    """

    name: str
    data: bytes
    depends: tuple[str, ...]
    parameters: frozenset[str]
    optional: bool = False

    @property
    def guest_path(self) -> str:
        """Its file in the initramfs."""
        return f"/modules/{self.name}.ko"

    def arguments(self, parameters: Mapping[str, str]) -> str:
        """What to load it with so that it has its own of *parameters*."""
        prefix = f"{self.name}."
        own = (item for item in parameters.items() if item[0].startswith(prefix))
        return " ".join(f"{name.removeprefix(prefix)}={value}" for name, value in own)


def parse_parameters(text: str) -> dict[str, str]:
    """Parse parameters as ``KVM_PARAMS`` has them: ``kvm.tdp_mmu=0 kvm_amd.npt=0``."""
    found: dict[str, str] = {}
    for word in text.split():
        match = re.fullmatch(r"([\w-]+)\.(\w+)=(\S*)", word)
        if not match:
            raise CannotTest(f"{word!r} is no parameter: write it as module.parameter=value, such as kvm_amd.npt=0")
        name = f"{match[1].replace('-', '_')}.{match[2]}"
        if found.get(name, match[3]) != match[3]:
            raise CannotTest(f"{name} is given twice: {found[name]} and {match[3]}")
        found[name] = match[3]
    return found


def kvm_modules(kernel: Kernel, vendor: str, extras: Iterable[str] = ()) -> list[Module]:
    """The modules to load for KVM in *kernel*, in this order; those that are built in are left out.

    :param extras: other modules, which are optional
    """
    files = {module_name(path): path for path in kernel.modules.rglob("*.ko*") if ".ko" in path.suffixes}
    built_in = _built_in(kernel.modules)
    loaded: dict[str, Module] = {}
    for name in ("kvm", vendor):
        if name not in files and name not in built_in:
            raise CannotTest(f"kernel {kernel.release} has no KVM to test: no module {name} under {kernel.modules}")
        _add(name, files, loaded)
    needed = set(loaded)
    for name in extras:
        if name not in built_in:
            _add(name, files, loaded)
    return [replace(module, optional=name not in needed) for name, module in loaded.items()]


def check_parameters(parameters: Mapping[str, str], modules: Iterable[Module], vendor: str) -> None:
    """Check that the modules have *parameters*: the kernel ignores a misspelt one.

    Modules of KVM that are not among *modules* are built in: their parameters are only checked in the booted kernel, like
    the values of all.
    """
    by_name = {module.name: module for module in modules}
    for full_name in parameters:
        name, _, parameter = full_name.partition(".")
        if name not in by_name:
            if name in ("kvm", vendor):
                continue
            raise CannotTest(f"KVM parameter {full_name}: no such module is loaded (there are kvm and {vendor})")
        known = by_name[name].parameters
        if parameter not in known:
            near = difflib.get_close_matches(parameter, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
            raise CannotTest(f"KVM parameter {full_name}: this kernel's {name} has no parameter {parameter} ({hint})")


def module_name(path: Path) -> str:
    """A module's name as the kernel shows it: ``kvm_amd`` for ``kvm-amd.ko.xz``."""
    return path.name.partition(".ko")[0].replace("-", "_")


def _add(name: str, files: Mapping[str, Path], loaded: dict[str, Module]) -> None:
    if name in loaded or name not in files:
        return  # without a file it is built in, or loading the module that depends on it fails
    module = _read(name, files[name])
    for other in module.depends:
        _add(other, files, loaded)
    loaded[name] = module


def _read(name: str, path: Path) -> Module:
    data = decompress_module(path)
    try:
        section = ELFFile(io.BytesIO(data)).get_section_by_name(".modinfo")
    except ELFError:
        section = None
    if section is None:
        raise CannotTest(f"{path} is not a kernel module: it has no .modinfo")
    fields = [field.decode(errors="replace").partition("=") for field in section.data().split(b"\0")]
    depends = [value for key, _, value in fields if key == "depends"]
    # parmtype: only parameters with a description have a parm
    parameters = frozenset(value.partition(":")[0] for key, _, value in fields if key == "parmtype")
    names = tuple(other.replace("-", "_") for value in depends for other in value.split(",") if other)
    return Module(name, data, names, parameters)


def _built_in(folder: Path) -> set[str]:
    path = folder / "modules.builtin"
    return {module_name(Path(line)) for line in path.read_text().splitlines()} if path.exists() else set()
