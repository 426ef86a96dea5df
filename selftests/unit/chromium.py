# SPDX-License-Identifier: GPL-2.0-only
"""A headless Chromium without network that opens a file, controlled through a pipe with the Chrome DevTools Protocol."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
)  # fmt: skip
# The browser reads orders from file descriptor 3, and writes to 4.
_START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
# What a key of a keyboard sends besides its name
_KEYS: dict[str, dict[str, Any]] = {
    "Tab": {"windowsVirtualKeyCode": 9},
    "Enter": {"windowsVirtualKeyCode": 13, "text": "\r"},
}


class Page:
    """A page in the browser.

    :ivar events: the browser's events since the last file was opened, in order: method and parameters
    """

    def __init__(self, orders: int, answers: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._orders, self._answers = orders, answers
        self._received = b""
        self._number = 0
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        order = {"id": self._number, "method": method, "params": parameters} | self._session
        os.write(self._orders, json.dumps(order).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result

    def open(self, path: Path, width: int, dark: bool, fragment: str = "") -> None:
        """Load a file with the given width of the window in pixels, in the light or the dark scheme."""
        self.call("Page.navigate", url="about:blank")  # another fragment of the same file would load nothing
        self.events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        loader = self.call("Page.navigate", url=f"{path.as_uri()}#{fragment}")["loaderId"]
        loaded = {"loaderId": loader, "name": "load"}
        while not any(loaded.items() <= event["params"].items() for event in self.events):
            self._receive()

    def run(self, script: str) -> Any:
        """The value of an expression in JavaScript."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 10) -> None:
        """Wait until an expression in JavaScript is true; fails the test after *seconds*."""
        deadline = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < deadline, f"not within {seconds} s: {script}"

    def press(self, key: str) -> None:
        """Press a key and release it."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **_KEYS[key])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            data = os.read(self._answers, 1 << 16)
            assert data, "the browser has ended"
            self._received += data
        text, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a new browser, whose profile is in *folder*; the browser ends with the context."""
    assert PROGRAM is not None
    ends = [os.pipe(), os.pipe()]
    # Not 3 and 4 themselves, in either order
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ends[0][0], ends[1][1])]
    for end in (ends[0][0], ends[1][1]):
        os.close(end)
    orders, answers = ends[0][1], ends[1][0]
    command = [sys.executable, "-c", _START, *map(str, theirs), PROGRAM, *_OPTIONS, f"--user-data-dir={folder}"]
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(command, pass_fds=theirs, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    for end in theirs:
        os.close(end)
    try:
        yield Page(orders, answers)
    finally:
        os.close(orders)  # at which it ends
        os.close(answers)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
