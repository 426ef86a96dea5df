# SPDX-License-Identifier: GPL-2.0-only
"""python -m runner.fetch KERNEL ...: put Debian's QEMU and the kernels into build/, for runs without a network.

Exit status: 0 when all are there, 125 when one cannot be fetched, 128 when none is named like this, 130 when interrupted.
"""

import sys

from runner.emulator import debian_emulator
from runner.errors import CANNOT_TEST, CannotTest
from runner.kernel import find_kernel
from runner.store import BUILD, say, shown


def main(kernels: list[str]) -> int:
    """Fetch what is missing: first the kernels, whose names may be wrong."""
    if not all(kernels) or any(name.startswith("-") for name in kernels):
        say("usage: python -m runner.fetch KERNEL ..., such as debian:6.12")
        return 128
    try:
        for name in kernels:
            kernel = find_kernel(name)
            say(f"kernel {kernel.release} is in {shown(kernel.image.parent)}")
        emulator = debian_emulator("KVM may not be usable")
        say(f"QEMU {emulator.version} is in {emulator.origin}")
    except CannotTest as error:
        say(f"cannot fetch: {error}")
        return CANNOT_TEST
    except OSError as error:
        say(f"cannot fetch: {error.filename or BUILD}: {error.strerror}")
        return CANNOT_TEST
    except KeyboardInterrupt:
        say("interrupted: incomplete downloads are not kept")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
