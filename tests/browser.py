"""A headless Chromium for tests of pages, spoken to over a pipe: no driver and no port."""

import base64
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def found() -> str | None:
    """The path of a Chromium, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclasses.dataclass
class Browser:
    """One tab. Everything that the page writes to the console, or asks of a network, is kept."""

    write: Any
    read: Any
    session: str = ""
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    console: list[str] = dataclasses.field(default_factory=list)
    asked: list[str] = dataclasses.field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the DevTools protocol."""
        number = next(self.numbers)
        message = dict(id=number, method=method, params=parameters) | (
            dict(sessionId=self.session) if self.session else {}
        )
        self.write.write(json.dumps(message).encode() + b"\0")
        self.write.flush()
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def open(self, page: Path, width: int, height: int, scheme: str) -> None:
        """Shows a file at a size in CSS pixels, in the colours light or dark."""
        self.console.clear()
        self.asked.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
        self.call("Page.navigate", url=page.absolute().as_uri())
        self.js("new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', done))")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, path: Path, height: int = 0) -> None:
        """A PNG of the whole page, or of so many pixels of its top."""
        size = self.js("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = dict(x=0, y=0, width=size[0], height=min(height or size[1], size[1]), scale=1)
        data = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _next(self) -> dict[str, Any]:
        data = b""
        while not data.endswith(b"\0"):
            byte = self.read.read(1)
            assert byte, "the browser is gone"
            data += byte
        answer = json.loads(data[:-1])
        parameters = answer.get("params", {})
        match answer.get("method"):
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.console.append(json.dumps(parameters)[:500])
            case "Log.entryAdded":
                self.console.append(json.dumps(parameters["entry"])[:500])
            case "Network.requestWillBeSent":
                self.asked.append(parameters["request"]["url"])
        return answer


@contextlib.contextmanager
def browser(path: str) -> Iterator[Browser]:
    """A browser with one empty tab."""
    here, theirs = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
                 "--remote-debugging-pipe", f"--user-data-dir={home}", "about:blank"]  # fmt: skip

        def pipes() -> None:  # the browser reads from 3 and writes to 4
            os.dup2(here[0], 60)
            os.dup2(theirs[1], 61)
            os.dup2(60, 3)
            os.dup2(61, 4)

        process = subprocess.Popen(
            [path, *flags], preexec_fn=pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(here[0])
        os.close(theirs[1])
        with open(here[1], "wb") as write, open(theirs[0], "rb") as read:
            try:
                tab = Browser(write, read)
                target = next(t for t in tab.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
                attached = tab.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
                tab.session = attached["sessionId"]
                for part in ("Page", "Runtime", "Log", "Network"):
                    tab.call(f"{part}.enable")
                yield tab
            finally:
                process.kill()
                process.wait()
