# SPDX-License-Identifier: GPL-2.0-only
"""Finding, fetching, packing and booting kernels, and talking to them.

The programs of this folder are started without pytest, whose pytest.ini has the folders of the suite's packages.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if str(ROOT / "lib") not in sys.path:
    sys.path.insert(1, str(ROOT / "lib"))
