# SPDX-License-Identifier: GPL-2.0-only
"""The architecture of this machine, as the module ``kvm_util.arch.current``.

What differs between architectures lives in a package of this folder and in ``guest_code/<arch>/`` only; every package
offers the same names (those that ``lib/kvm_util/arch/x86_64/__init__.py`` lists).
"""

import platform

if platform.machine() != "x86_64":
    raise ImportError(f"no support for {platform.machine()} yet: this suite has guest code for x86_64 only")

from kvm_util.arch import x86_64 as current

__all__ = ["current"]
