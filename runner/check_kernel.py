# SPDX-License-Identifier: GPL-2.0-only
"""check_kernel.py KERNEL [options of pytest]: test a kernel, with an exit status as ``git bisect run`` wants it.

0: good; 1: bad; 125: it cannot be tested (it does not boot, has no KVM, is no kernel); 128: nothing can be tested like
this (wrong options, nothing selected), which ends a bisection; 130: interrupted.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_USAGE = "usage: check_kernel.py KERNEL [options of pytest]"
# pytest's own exit statuses that say nothing about the kernel (https://docs.pytest.org/en/stable/reference/exit-codes.html)
_STATUSES = {2: 130, 3: 128, 4: 128, 5: 128}


def main(arguments: list[str]) -> int:
    """Run pytest with the kernel that *arguments* name first."""
    if not arguments or not arguments[0] or arguments[0].startswith("-"):
        print(f"{_USAGE}: no kernel is named", file=sys.stderr)
        return 128
    kernel, *options = arguments
    if Path(kernel).exists():
        kernel = str(Path(kernel).absolute())  # seen from where the user is, not from the suite
    command = [sys.executable, "-m", "pytest", f"--kernel={kernel}", "-v", *options]
    try:
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
    except KeyboardInterrupt:
        return 130
    return _STATUSES.get(status, status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
