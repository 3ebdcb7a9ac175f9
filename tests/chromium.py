"""Headless Chromium over its debugging pipe: what a page logged, fetched and drew, at any width and colour scheme.

No driver and no websocket library: the protocol is JSON lines that end in NUL, on file descriptors 3 (in) and 4 (out).
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Moves our two pipes to descriptors 3 and 4, by way of high numbers so that neither overwrites the other.
LAUNCH = (
    "import fcntl, os, sys; r, w = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 50) for n in sys.argv[1:3]); "
    "os.dup2(r, 3); os.dup2(w, 4); os.close(r); os.close(w); os.execvp(sys.argv[3], sys.argv[3:])"
)


def find():
    """Path of the first Chromium on PATH, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of one browser; ``events`` holds what the protocol reported since the last ``open``."""

    def __init__(self, read, write):
        self.read, self.write, self.buffer, self.last, self.session, self.events = read, write, b"", 0, None, []

    def _message(self, deadline):
        while b"\0" not in self.buffer:
            if not select.select([self.read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser did not answer in time")
            chunk = os.read(self.read, 1 << 20)
            if not chunk:
                raise ConnectionError("the browser closed its pipe")
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(line)

    def call(self, method, timeout=180.0, **params):
        """The result of one protocol method; events that arrive before it are kept."""
        self.last += 1
        request = {"id": self.last, "method": method, "params": params}
        if self.session:
            request["sessionId"] = self.session
        data = json.dumps(request).encode() + b"\0"
        while data:
            data = data[os.write(self.write, data) :]
        deadline = time.monotonic() + timeout
        while True:
            message = self._message(deadline)
            if message.get("id") == self.last:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            if "method" in message:
                self.events.append(message)

    def start(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, url, width=1400, height=900, dark=False):
        """Load a page and wait until it is loaded and has had a moment to misbehave."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.scheme(dark)
        self.events.clear()
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + 180
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            message = self._message(deadline)
            if "method" in message:
                self.events.append(message)
        self.run("new Promise(done => setTimeout(() => requestAnimationFrame(() => done(1)), 300))")

    def scheme(self, dark):
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def run(self, script):
        """Value of a JavaScript expression (awaited)."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def complaints(self):
        """Uncaught exceptions, console warnings and errors, and what the browser logged (failed loads)."""
        found = []
        for event in self.events:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"])))
            if event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(str([arg.get("value", arg.get("description")) for arg in params["args"]]))
            if event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
        return found

    def requests(self):
        """URLs that the page asked for, data: and blob: aside, as these are the page itself."""
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]

    def screenshot(self, path, full=True):
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=full)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path):
        made = self.call("Page.printToPDF", printBackground=False, preferCSSPageSize=True)
        Path(path).write_bytes(base64.b64decode(made["data"]))


@contextmanager
def launched(executable, profile):
    """A running browser with a fresh profile; it is gone when the block ends."""
    child_read, write = os.pipe()
    read, child_write = os.pipe()
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--remote-debugging-pipe",
    ]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            LAUNCH,
            str(child_read),
            str(child_write),
            executable,
            *flags,
            f"--user-data-dir={profile}",
        ],
        pass_fds=(child_read, child_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(child_read)
    os.close(child_write)
    browser = Browser(read, write)
    try:
        browser.start()
        yield browser
        browser.session = None
        browser.call("Browser.close")
    finally:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(read)
        os.close(write)
