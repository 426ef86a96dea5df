# SPDX-License-Identifier: GPL-2.0-only
"""What the tests run on: kernel, KVM's modules and their parameters, CPU."""

import os
from dataclasses import dataclass
from pathlib import Path

from lib.arch import current as arch
from lib.memory import available_memory

_MODULES = Path("/sys/module")


@dataclass(frozen=True)
class Host:
    """A host's facts, as reports show them and known bugs are matched against.

    :ivar backend: the vendor module that KVM runs on (``kvm_intel``, ``kvm_amd``, ``kvm_pvm`` ...); ``unknown`` without one
    :ivar parameters: ``module.parameter`` of kvm and the backend, with their values
    """

    kernel: str
    backend: str
    parameters: dict[str, str]
    cpu: str
    cpus: int
    memory: int

    @property
    def kernel_version(self) -> tuple[int, ...]:
        """The release's leading numbers, such as (6, 12, 117)."""
        return version_numbers(self.kernel)


def version_numbers(release: str) -> tuple[int, ...]:
    """The numbers that *release* begins with: (6, 12, 117) for ``6.12.117+deb12-amd64``."""
    numbers: list[int] = []
    for part in release.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def this_host() -> Host:
    """Look at the machine."""
    backend = next((path.name for path in sorted(_MODULES.glob("kvm_*")) if (path / "parameters").is_dir()), "unknown")
    parameters = {}
    for module in ("kvm", backend):
        for path in sorted((_MODULES / module / "parameters").glob("*")):
            if os.access(path, os.R_OK):
                parameters[f"{module}.{path.name}"] = path.read_text().strip()
    return Host(os.uname().release, backend, parameters, arch.cpu_model(), os.cpu_count() or 1, available_memory())
