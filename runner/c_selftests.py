# SPDX-License-Identifier: GPL-2.0-only
"""python -m runner.c_selftests PORT FOLDER: run the programs of FOLDER, then send KVM's counters to PORT."""

import json
import os
import subprocess
import sys

from runner.gcov_counters import kvm_counters

TIME_LIMIT = 60  # seconds of each program


def main(port: str, folder: str) -> None:
    """Run the programs of *folder*, and send what became of each, and the counters, to *port*."""
    with open(port, "w") as messages:

        def send(**message: object) -> None:
            messages.write(json.dumps(message) + "\n")
            messages.flush()

        for name in sorted(os.listdir(folder)):
            try:
                ended: object = subprocess.run(
                    [os.path.join(folder, name)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=TIME_LIMIT,
                ).returncode
            except subprocess.TimeoutExpired:
                ended = "time limit"
            send(ran=[name, ended])
        for counters in kvm_counters():
            send(gcov=counters)


if __name__ == "__main__":
    sys.stdin.readline()
    main(*sys.argv[1:])
