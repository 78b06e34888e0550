"""A headless Chromium for tests: find it, start it, and drive its pages over the DevTools protocol. Standard library only.

The browser talks over a pipe (``--remote-debugging-pipe``: messages end with a zero byte), so it opens no port and needs no
driver of its own version. https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
VARIABLE = "RAGGED_SERVE_CHROMIUM"
"""Path of another one."""
PATIENCE = 120.0
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--metrics-recording-only",
    "--mute-audio",
    "--password-store=basic",
)
# The browser wants its pipe as descriptors 3 and 4.
_START = (
    "import fcntl, os, sys\n"
    "ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]\n"
    "for fd, end in zip((3, 4), ends): os.dup2(end, fd)\n"
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)
_KEYS = {
    "Tab": ("Tab", 9, ""),
    "Enter": ("Enter", 13, "\r"),
    " ": ("Space", 32, " "),
    "Escape": ("Escape", 27, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
}

Json = dict[str, Any]


def find() -> str | None:
    """Path of a Chromium or Chrome on this machine."""
    named = os.environ.get(VARIABLE)
    if named:
        return named
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


class Chromium:
    """Use as a context manager. ``directory``: for its profile; it writes nowhere else."""

    def __init__(self, path: str, directory: Path) -> None:
        to_browser, self._write_end = os.pipe()
        self._read_end, from_browser = os.pipe()
        flags = [*FLAGS, f"--user-data-dir={directory / 'profile'}"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # it refuses to start as root with one
        command = [sys.executable, "-c", _START, str(to_browser), str(from_browser), path, *flags]
        self._log = (directory / "chromium.log").open("wb")
        environ = {
            **os.environ,
            "HOME": str(directory),
            "XDG_CONFIG_HOME": str(directory),
            "XDG_CACHE_HOME": str(directory),
        }
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environ,
            pass_fds=(to_browser, from_browser),
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._answers: dict[int, Future[Json]] = {}
        self._pages: dict[str, Page] = {}
        self._thread = threading.Thread(target=self._read, name="chromium", daemon=True)
        self._thread.start()

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *failure: object) -> None:
        with contextlib.suppress(Exception):
            self.call("Browser.close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(20)
        os.close(self._write_end)
        os.close(self._read_end)
        self._log.close()

    def page(self, width: int = 1200, height: int = 900, *, is_phone: bool = False, scale: float = 1.0) -> Page:
        """A new page of its own window, in CSS pixels."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=is_phone
        )
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        return page

    def call(self, method: str, session: str | None = None, **params: Any) -> Json:
        number = next(self._numbers)
        message: Json = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        answer: Future[Json] = Future()
        data = json.dumps(message).encode() + b"\0"
        with self._lock:
            self._answers[number] = answer
            while data:
                data = data[os.write(self._write_end, data) :]
        return answer.result(PATIENCE)

    def _read(self) -> None:
        rest = b""
        with contextlib.suppress(OSError):
            while data := os.read(self._read_end, 1 << 16):
                *messages, rest = (rest + data).split(b"\0")
                for message in messages:
                    self._take(json.loads(message))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionError("the browser has ended"))

    def _take(self, message: Json) -> None:
        if "id" in message:
            answer = self._answers.pop(message["id"])
            if "error" in message:
                answer.set_exception(RuntimeError(message["error"]["message"]))
            else:
                answer.set_result(message["result"])
        elif (page := self._pages.get(message.get("sessionId", ""))) is not None:
            page.take(message["method"], message["params"])


class Page:
    def __init__(self, browser: Chromium, session: str, target: str) -> None:
        self.troubles: list[str] = []
        """What the console shows of warnings, errors, refused loads and uncaught exceptions."""
        self.urls: list[str] = []
        """Of all requests."""
        self._browser = browser
        self._session = session
        self._target = target
        self._loads = 0

    def take(self, method: str, params: Json) -> None:
        """An event; on the reader's thread."""
        if method == "Network.requestWillBeSent":
            self.urls.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.troubles.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.troubles.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.troubles.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Page.loadEventFired":
            self._loads += 1

    def call(self, method: str, **params: Any) -> Json:
        return self._browser.call(method, self._session, **params)

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def goto(self, url: str) -> None:
        """Returns when it has loaded."""
        before = self._loads
        answer = self.call("Page.navigate", url=url)
        assert "errorText" not in answer, answer["errorText"]
        deadline = time.monotonic() + PATIENCE
        while self._loads == before:
            assert time.monotonic() < deadline, f"{url} never loaded"
            time.sleep(0.01)

    def js(self, expression: str) -> Any:
        """The value of an expression, or of its promise."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = PATIENCE) -> Any:
        """Until the expression is true. Returns its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}; {self.troubles}"
            time.sleep(0.02)
        return value

    def media(self, **features: str) -> None:
        """For example prefers_color_scheme="dark"."""
        told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=told)

    def press(self, key: str, *, shift: bool = False) -> None:
        code, number, text = _KEYS[key]
        event: Json = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        x, y = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """As PNG. ``whole``: the page to its end, not only what the window shows."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
