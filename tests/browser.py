"""A headless Chromium for tests, spoken to through chromedriver's WebDriver protocol: JSON over localhost, the standard library only."""

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)"

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--force-device-scale-factor=1",
    # No name resolves, so that whatever a page asks of the network fails.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id, fixed by the WebDriver standard
_SECONDS = 60.0


class Browser:
    """One window, from `with` to the end of it. Downloads land in `downloads`.

    Args:
        width: of the window, in CSS pixels.
        height: likewise.
        scheme: "light" or "dark", what the page is told that the person prefers.
    """

    def __init__(self, *, width: int = 1280, height: int = 1000, scheme: str = "light") -> None:
        self.width, self.height, self.scheme = width, height, scheme

    def __enter__(self) -> "Browser":
        self._folder = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        self.downloads = Path(self._folder.name) / "downloads"
        self.downloads.mkdir()
        self._driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        found = None
        while found is None:  # chromedriver says on which port it listens, or ends
            line = self._driver.stdout.readline()
            if not line:
                raise RuntimeError(f"chromedriver ended with {self._driver.wait()} before it listened")
            found = re.search(r"started successfully on port (\d+)", line)
        self._root = f"http://127.0.0.1:{found[1]}/session"
        options = {
            "binary": CHROMIUM,
            "args": [*_FLAGS, f"--window-size={self.width},{self.height}", f"--user-data-dir={self._folder.name}/profile"],
            "prefs": {"download.default_directory": str(self.downloads)},
        }
        logs = {"browser": "ALL", "performance": "ALL"}
        try:
            made = self._ask("", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logs}}})
        except BaseException:
            self._stop()
            raise
        self._root += "/" + made["sessionId"]
        # A window is not narrower than 500 pixels; a page can be told otherwise.
        self.command(
            "Emulation.setDeviceMetricsOverride", width=self.width, height=self.height, deviceScaleFactor=1, mobile=self.width < 600
        )
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": self.scheme}])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._ask("", None, method="DELETE")
        finally:
            self._stop()

    def _stop(self) -> None:
        self._driver.terminate()
        self._driver.wait(timeout=_SECONDS)
        self._driver.stdout.close()
        self._folder.cleanup()

    def _ask(self, path: str, body: dict | None = None, *, method: str = "POST"):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_SECONDS) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"chromedriver {path}: {json.load(error)['value']['message'].splitlines()[0]}") from error

    def command(self, name: str, **parameters):
        """A command of the DevTools protocol."""
        return self._ask("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def open(self, path: Path) -> None:
        """Load a local file, with the network cut."""
        self._ask("/url", {"url": "about:blank"})
        self._ask("/chromium/network_conditions", {"network_conditions": {"offline": True, "latency": 0, "throughput": 0}})
        self.requested()  # what the browser's own first page asked for
        self._ask("/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments):
        """What a function body `return`s; a promise is waited for."""
        return self._ask("/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> list[str]:
        """Ids of the elements that a CSS selector matches."""
        return [found[_ELEMENT] for found in self._ask("/elements", {"using": "css selector", "value": selector})]

    def click(self, element: str, *, x: float, y: float) -> None:
        """A real click of the mouse at shares of an element's width and height."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", {_ELEMENT: element})
        box = self.run("const b = arguments[0].getBoundingClientRect(); return [b.left, b.top, b.width, b.height]", {_ELEMENT: element})
        left, top = round(box[0] + x * box[2]), round(box[1] + y * box[3])
        move = {"type": "pointerMove", "duration": 0, "origin": "viewport", "x": left, "y": top}
        press = [move, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._ask("/actions", {"actions": [{"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": press}]})

    def press(self, element: str) -> None:
        """Click an element in the middle."""
        self._ask(f"/element/{element}/click", {})

    def keys(self, element: str, text: str) -> None:
        """Focus an element and type; \\ue012 to \\ue015 are the arrows left, up, right, down."""
        self._ask(f"/element/{element}/value", {"text": text})

    def downloaded(self, name: str) -> Path:
        """A file that the page has saved, once it is complete."""
        path, deadline = self.downloads / name, time.monotonic() + _SECONDS
        while not path.exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} was not saved; there are {sorted(found.name for found in self.downloads.iterdir())}")
            time.sleep(0.05)
        return path

    def console(self) -> list[str]:
        """Errors of the page since the last call. Chromium itself notes there, without a network, that it is slow."""
        return [entry["message"] for entry in self._ask("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def requested(self) -> list[str]:
        """Addresses asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self._ask("/se/log", {"type": "performance"})]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Save what the window shows, or the whole page, as PNG."""
        shot = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
