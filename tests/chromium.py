"""Chromium without a screen, driven over two pipes by its debugging protocol: no package needed."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Chromium:
    """One page. `events` has what the browser told: console messages, errors, requests."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 900, scheme: str = "light"):
        (reads, self._out), (self._in, writes) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (reads, writes)]
        command = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--mute-audio",
                   "--no-first-run", "--disable-background-networking", "--disable-extensions",
                   f"--user-data-dir={profile}", "--remote-debugging-pipe",
                   "about:blank"]  # fmt: skip
        # It reads 3 and writes 4. Not sh, which may know files of one digit only.
        shell = ["bash", "-c", 'exec "${@:3}" 3<&"$1" 4>&"$2"', "bash", *map(str, theirs), *command]
        self._process = subprocess.Popen(
            shell, pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for fd in (reads, writes, *theirs):
            os.close(fd)
        self._buffer, self._count, self.events, self._session = b"", 0, [], None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.look(width, height, scheme)

    def look(self, width: int, height: int = 844, scheme: str = "light") -> None:
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=phone)  # fmt: skip
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def call(self, method: str, **params) -> dict:
        self._count += 1
        told = {"id": self._count, "method": method, "params": params}
        if self._session:
            told["sessionId"] = self._session
        os.write(self._out, json.dumps(told).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def _message(self) -> dict:
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], 30)[0], "Chromium has said nothing for 30 s"
            part = os.read(self._in, 1 << 20)
            assert part, "Chromium ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> float:
        """Seconds until the page was loaded, its script included."""
        self.events.clear()
        self.call("Page.navigate", url="about:blank")  # else another #hash would load nothing
        self._loaded()
        self.events.clear()
        start = time.perf_counter()
        self.call("Page.navigate", url=url)
        self._loaded()
        self.js("0")
        return time.perf_counter() - start

    def _loaded(self) -> None:
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def js(self, expression: str):
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                         awaitPromise=True, userGesture=True)  # fmt: skip
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, expression: str, seconds: float = 10.0) -> bool:
        """Whether it becomes true: what the browser tells a page itself comes a frame later."""
        deadline = time.perf_counter() + seconds
        while not (found := self.js(expression)) and time.perf_counter() < deadline:
            time.sleep(0.02)
        return bool(found)

    def click(self, selector: str, across: float = 0.5) -> None:
        """With the pointer, where the first such element is: it has to be in sight. across: how far
        from its left edge, as a share of its width."""
        here = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{here}.scrollIntoView({{block: 'center'}})")
        box = self.js(f"(({{x, y, width, height}}) => [x + width * {across}, y + height / 2])"
                      f"({here}.getBoundingClientRect())")  # fmt: skip
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left",
                      clickCount=1)  # fmt: skip

    def key(self, key: str, shift: bool = False) -> None:
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, "Enter": 13}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=codes.get(key, 0), modifiers=8 * shift)  # fmt: skip

    def problems(self) -> list[str]:
        """Console messages and errors."""
        wanted = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event) for event in self.events if event.get("method") in wanted]

    def requests(self) -> list[str]:
        """What was asked for, but for what is in the page itself."""
        sent = [event["params"]["request"]["url"] for event in self.events
                if event.get("method") == "Network.requestWillBeSent"]  # fmt: skip
        return [url for url in sent if not url.startswith("data:")]

    def close(self) -> None:
        os.close(self._out)
        self._process.terminate()
        self._process.wait(30)
        os.close(self._in)
