# SPDX-License-Identifier: GPL-2.0-only
"""standalone_session.py FOLDER [options of pytest]: pytest in the unpacked file; paths of options are seen from FOLDER."""

import os
import sys

from runner import ROOT
from runner.suite_pytest import make_absolute, run

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    options = make_absolute(sys.argv[2:])
    os.chdir(ROOT)
    sys.exit(run(options))
