"""A headless Chromium driven over a pipe in the DevTools protocol, for pages from disk and from this machine."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of one browser. `messages` collects console output, errors, and requests to other places."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._rest = send, receive, b""
        self._number, self._session = 0, None
        self.messages: list[str] = []
        self.origins = ("file:", "data:")
        """What a page may ask."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._receive], [], [], 60)[0], "the browser does not answer"
            read = os.read(self._receive, 1 << 20)
            assert read, "the browser has ended"
            self._rest += read
        text, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(text)
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.messages.append(json.dumps(message["params"]["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if message["params"]["type"] in ("error", "warning", "assert"):
                self.messages.append(json.dumps(message["params"]["args"]))
            case "Log.entryAdded":
                self.messages.append(json.dumps(message["params"]["entry"]))
            case "Network.requestWillBeSent" if not message["params"]["request"]["url"].startswith(self.origins):
                self.messages.append(f"requested {message['params']['request']['url']}")
        return message

    def open(self, page: Path | str, *, dark: bool = False, width: int = 1280, height: int = 900) -> None:
        """Open a file or an address, and wait until its script has drawn everything."""
        self.messages.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        # A file has another address than the page before.
        url = page if isinstance(page, str) else f"{page.resolve().as_uri()}?{self._number}"
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.documentElement?.dataset.drawn !== undefined")

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str, *, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.run(condition):
            assert time.monotonic() < deadline, f"{condition} never came true; {self.messages}"
            time.sleep(0.05)

    def point_at(self, selector: str) -> None:
        """Move the pointer to the middle of an element, scrolled into view."""
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")  # it has scrolled
        box = f"const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
        x, y = self.run(f"(() => {{ {box} return [b.x + b.width / 2, b.y + b.height / 2]; }})()")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x - 1, y=y - 1)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def hover(self, selector: str, *, until: str, timeout_s: float = 60) -> None:
        """Point at an element until a condition holds: a page that has just been drawn may still move."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.point_at(selector)
            try:
                return self.wait(until, timeout_s=1)
            except AssertionError:
                if time.monotonic() > deadline:
                    raise

    def screenshot(self, file: Path) -> None:
        """Save an image of the whole page."""
        height = self.run("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self.run("innerWidth"), "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser() -> Iterator[Browser]:
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage")
        command = [CHROMIUM, *flags, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        # The protocol uses descriptors 3 and 4.
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}', "bash", *command],
            pass_fds=(to_browser[0], from_browser[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Browser(to_browser[1], from_browser[0])
        finally:
            os.close(to_browser[1])  # ends the browser
            os.close(from_browser[0])
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
