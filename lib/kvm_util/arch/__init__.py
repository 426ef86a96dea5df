# SPDX-License-Identifier: GPL-2.0-only
"""The architecture of this machine, as the module ``kvm_util.arch.current``.

What differs between architectures lives in a package of this folder and in ``guest_code/<arch>/`` only; every package
offers the same names (those that ``lib/kvm_util/arch/x86_64/__init__.py`` lists). On a machine without a package
``current`` is :mod:`kvm_util.arch.unsupported`: what needs no KVM, such as judging a saved run, works there too.
"""

import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING or platform.machine() == "x86_64":
    from kvm_util.arch import x86_64 as current
else:
    from kvm_util.arch import unsupported as current

__all__ = ["current"]
