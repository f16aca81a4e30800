"""Headless Chromium, driven through ChromeDriver by the WebDriver protocol, which is HTTP."""

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

# Those that WebDriver calls by characters of their own.
SHIFT, CONTROL, TAB, ENTER, ESCAPE = "\ue008", "\ue009", "\ue004", "\ue007", "\ue00c"
# Nothing connects of its own accord, and Chromium's sandbox does not work for root.
_FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"),
    *("disable-background-networking", "disable-component-update", "window-size=900,700"),
)


class Browser:
    """A session of a browser."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def call(self, command: str, **fields: Any) -> Any:
        """The value of a WebDriver command."""
        answer = self._http.post(command, json=fields)
        assert answer.is_success, answer.text
        return answer.json()["value"]

    def run(self, script: str, *args: Any) -> Any:
        """What a function body in JavaScript returns."""
        return self.call("execute/sync", script=script, args=args)

    def press(self, keys: str, hold: str = "") -> None:
        """Press and release keys one after the other, while another may be held."""
        key = lambda kind, value: {"type": kind, "value": value}
        presses = [key(kind, value) for value in keys for kind in ("keyDown", "keyUp")]
        if hold:
            presses = [key("keyDown", hold), *presses, key("keyUp", hold)]
        self.call("actions", actions=[{"type": "key", "id": "keyboard", "actions": presses}])

    def prefer(self, scheme: str) -> None:
        """Choose the system's colours: 'light' or 'dark'."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        params = {"features": features}
        self.call("goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params=params)

    def console(self) -> list[Any]:
        """The messages of the console since the last call."""
        return self.call("se/log", type="browser")


@contextlib.contextmanager
def start(directory: Path) -> Iterator[Browser]:
    """A browser that keeps its files in a directory."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        raise FileNotFoundError("Chromium is missing; apt-get install chromium chromium-driver")
    args = [f"--{flag}" for flag in (*_FLAGS, f"user-data-dir={directory}")]
    wanted = {
        "goog:chromeOptions": {"binary": chromium, "args": args},
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    with (
        subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.terminate)
        assert process.stdout
        ports = (re.search(r"started successfully on port (\d+)", line) for line in process.stdout)
        [port] = next(filter(None, ports)).groups()
        url = f"http://127.0.0.1:{port}/session"
        answer = httpx.post(url, json={"capabilities": {"alwaysMatch": wanted}}, timeout=60)
        assert answer.is_success, answer.text
        url += "/" + answer.json()["value"]["sessionId"]
        http = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        stack.callback(http.delete, "")
        yield Browser(http)
