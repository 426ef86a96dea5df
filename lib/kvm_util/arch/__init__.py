# SPDX-License-Identifier: GPL-2.0-only
"""The architecture of this machine, as the module ``kvm_util.arch.current``.

Architecture-specific code is confined to the packages of this folder and to ``guest_code/<arch>/``. Every package offers the
names in ``__all__`` of ``lib/kvm_util/arch/x86_64/__init__.py``. On other machines ``current`` is
:mod:`kvm_util.arch.unsupported`, so that what needs no KVM, such as judging a saved run, works there too.
"""

import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING or platform.machine() == "x86_64":
    from kvm_util.arch import x86_64 as current
else:
    from kvm_util.arch import unsupported as current

__all__ = ["current"]
