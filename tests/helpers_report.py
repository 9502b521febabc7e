"""What the tests of the report share: a parser that checks nesting, evidence made from weights, a browser."""

import base64
import json
import os
import select
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wnq.analysis import LayerStats, ModelEvidence, Profile, error_stats, profile
from wnq.normalized import Normalized
from wnq.normalizers import max_abs
from wnq.quantizer import Uniform

VOID = {"meta", "link", "input", "br", "hr", "img"}
EVIL = "<script>alert('x')</script>$x_{1}$"


class Page(HTMLParser):
    """Checks nesting while it collects tags, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self) -> str:
        """The text, with single spaces."""
        return " ".join(self.text.split())


def tailed(*shape: int, seed: int = 0, df: float = 4.0) -> torch.Tensor:
    """Weights with a tail."""
    return torch.from_numpy(0.05 * np.random.default_rng(seed).standard_t(df, shape)).float()


def evidence(
    name: str,
    weights: dict[str, torch.Tensor],
    *,
    own: int | None = None,
    bits: tuple[int, ...] = (2, 3, 4, 8),
    summary: dict[str, object] | None = None,
) -> ModelEvidence:
    """Evidence of a model with these weights; ``own``: trained by wnq at so many bits."""
    stats: list[LayerStats] = []
    histograms, levels, profiles = {}, {}, dict[str, Profile]()
    for layer, weight in weights.items():
        found, histograms[layer], profiles[layer] = profile(weight, bits=bits)
        columns: dict[str, object] = {}
        if own is not None and not found.nonfinite:
            codes = Normalized(max_abs, Uniform(own)).quantize(weight)
            columns = {"method": "wnq", "bits": own, **vars(error_stats(weight, codes))}
            levels[layer] = (codes.codebook / found.rms).tolist()
        numbers = {key: value for key, value in vars(found).items() if key not in ("peak", "nan", "infinite")}
        stats.append(LayerStats(layer, "Linear", tuple(weight.shape), **numbers, **columns))
    return ModelEvidence(name, stats, histograms, levels, summary or {}, profiles)


class Browser:
    """Headless Chromium, spoken to through a pipe: real keys, exact widths, light and dark. Skips where there is none."""

    def __init__(self, folder: Path) -> None:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if chromium is None:
            pytest.skip("Chromium is not installed: the page is opened in it to see that it works")
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += " --disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
        theirs, self._to = os.pipe()
        self._from, answers = os.pipe()

        def place() -> None:  # Chromium reads its third and writes its fourth file
            os.dup2(theirs, 103)
            os.dup2(answers, 104)
            os.dup2(103, 3, inheritable=True)
            os.dup2(104, 4, inheritable=True)

        self._process = subprocess.Popen(
            [chromium, *flags.split(), f"--user-data-dir={folder / 'profile'}", "about:blank"],
            preexec_fn=place,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(answers)
        self._answers = os.fdopen(self._from, "rb")
        self._rest, self._number = b"", 0
        self._session: str | None = None
        self.complaints: list[str] = []
        """What the console said, and errors of scripts."""
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()
        os.close(self._to)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], 120)
            assert ready, "Chromium does not answer"
            piece = os.read(self._answers.fileno(), 1 << 20)
            assert piece, "Chromium ended"
            self._rest += piece
        text, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(text)
        if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(message["params"])[:500])
        self._loaded |= message.get("method") == "Page.loadEventFired"
        return message

    def show(self, page: Path, *, width: int, scheme: str = "light") -> None:
        """Open a file from disk at a width, in a reader's choice of light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._loaded = False
        self.call("Page.navigate", url=page.as_uri())
        while not self._loaded:
            self._next()

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press a key and let it go."""
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        named = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **named, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def screenshot(self) -> bytes:
        """Return a PNG of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
