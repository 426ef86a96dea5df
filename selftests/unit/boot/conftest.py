# SPDX-License-Identifier: GPL-2.0-only
"""The kernel that the tests here boot."""

import pytest

from runner.errors import CannotTest
from runner.kernel import Kernel, local_kernels
from runner.qemu import find_qemu


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """A local kernel that broken_kernel.py can break."""
    try:
        find_qemu(None, "tcg", ())
    except CannotTest as error:
        pytest.skip(str(error))
    # From 6.18 on the table of WARN()s has another format, which broken_kernel.py does not know.
    fit = [kernel for kernel in local_kernels() if kernel.release.startswith(("6.1.", "6.12."))]
    if not fit:
        pytest.skip("there is no local kernel 6.1 or 6.12 (make fetch)")
    return fit[0]
