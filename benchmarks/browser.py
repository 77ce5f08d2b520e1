"""A headless Chromium, driven over two pipes by its DevTools protocol, without any package."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
_READS, _WRITES = 3, 4  # --remote-debugging-pipe takes commands from one, and answers on the other


def find_chromium() -> str | None:
    """The path of a Chromium; None if none is installed."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """A browser of its own with one page, as a context manager.

    Attributes:
        events: What the browser sent besides answers: console messages, requests, errors.
    """

    def __init__(self, executable: str) -> None:
        self.events: list[dict[str, Any]] = []
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        self._profile = tempfile.TemporaryDirectory(prefix="page-", ignore_cleanup_errors=True)
        commands, self._to = os.pipe()
        self._from, answers = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"]
        shell = f'exec {_READS}<&{commands} {_WRITES}>&{answers}; exec "$0" "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, executable, *flags, "about:blank"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)

    def __enter__(self) -> Self:
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def send(self, method: str, **parameters: object) -> dict[str, Any]:
        """Send one command of the protocol; returns its result.

        Raises:
            RuntimeError: If the browser refuses it, or has exited.
        """
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") != number:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            else:
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._from, 1 << 16)
            if not data:
                raise RuntimeError("the browser has exited")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def look(self, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        """Set the window's size and the theme; below 600 pixels it is a phone.

        Args:
            width: In CSS pixels.
            height: In CSS pixels.
            dark: Whether the page sees the dark theme.
            scale: Device pixels in a CSS pixel.
        """
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[theme])

    def open(self, path: Path) -> None:
        """Open a file and wait, 10 s at most, until it is drawn."""
        self.send("Page.navigate", url=path.resolve().as_uri())
        for _ in range(200):
            if self.run("document.readyState") == "complete":
                break
            time.sleep(0.05)
        self.settle()

    def settle(self) -> None:
        """Wait for two frames: the second begins after the first was drawn."""
        self.run(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        )

    def run(self, script: str) -> Any:  # noqa: ANN401 (whatever the page has)
        """The value of a JavaScript expression in the page; a promise is awaited.

        Raises:
            RuntimeError: If it throws.
        """
        done = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(json.dumps(done["exceptionDetails"])[:500])
        return done["result"].get("value")

    def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of what the window shows, or of the whole page."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])

    def faults(self) -> list[str]:
        """What went wrong so far: exceptions, log entries, requests that leave the machine."""
        self.run("1")  # its answer comes after all events so far
        found = []
        for event in self.events:
            parameters = event.get("params", {})
            if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                found.append(json.dumps(parameters)[:400])
            elif event.get("method") == "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                found += [] if url.startswith(("file:", "data:", "about:")) else [url]
        return found
