"""Opens a page in headless Chromium: what it says on its console, the page it makes of it, and how it lays it out."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)

# Runs inside the page, in a frame as wide as asked for: headless Chromium's own window is never under 500 px.
_MEASURE = """
<script>
addEventListener("load", () => {
  const charts = {};
  for (const figure of document.querySelectorAll("figure")) {
    charts[figure.id] = Array.from(figure.querySelectorAll("svg[role=img]"), (svg) => {
      const box = svg.getBoundingClientRect(), texts = Array.from(svg.querySelectorAll("text"));
      const rects = texts.map((text) => [text.textContent, text.getBoundingClientRect()]);
      const out = rects.filter(([, r]) => r.left < box.left - 3 || r.right > box.right + 3
                                       || r.top < box.top - 3 || r.bottom > box.bottom + 3);
      const scale = box.width / svg.viewBox.baseVal.width;
      return {width: box.width, height: box.height, clipped: out.map(([words]) => words),
              font: Math.min(...texts.map((t) => scale * parseFloat(getComputedStyle(t).fontSize)))};
    });
  }
  const answer = document.querySelector("h1").getBoundingClientRect();
  parent.postMessage({overflow: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
                      answer_bottom: answer.bottom, charts}, "*");
});
</script>
"""


@dataclass(frozen=True)
class Opened:
    """A page as the browser has it: its document after parsing, and the lines on its console."""

    dom: str
    console: list[str]


def find_chromium() -> str | None:
    """The browser's path; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason="no chromium, chromium-browser or google-chrome on this machine"
)


def open_page(
    page: Path, folder: Path, width: int = 1400, height: int = 1200, screenshot: Path | None = None
) -> Opened:
    """Open a file; `folder` is a scratch folder for the browser's profile."""
    run = _chromium(page, folder, f"--window-size={width},{height}", "--dump-dom")
    if screenshot is not None:
        _chromium(page, folder, f"--window-size={width},{height}", f"--screenshot={screenshot}")
    return Opened(run.stdout, re.findall(r":CONSOLE[:(]\d+\)?\] (.*)", run.stderr))


def layout(page: Path, folder: Path, width: int) -> dict[str, Any]:
    """How a page is laid out at a width: sideways overflow in pixels, and its charts' sizes, fonts and clipped texts.

    A copy is measured by a script of ours, for which the copy's content security policy is lifted.
    """
    text = page.read_text(encoding="utf-8")
    copy = folder / "measured.html"
    copy.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text) + _MEASURE, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(
        "<!doctype html><pre id=result></pre><script>addEventListener('message', (event) => {"
        "document.getElementById('result').textContent = JSON.stringify(event.data)})</script>"
        f"<iframe src='{copy.as_uri()}' style='border:0;width:{width}px;height:844px'></iframe>",
        encoding="utf-8",
    )
    run = _chromium(frame, folder, f"--window-size={width + 100},900", "--virtual-time-budget=3000", "--dump-dom")
    found = re.search(r'<pre id="result">(.+?)</pre>', run.stdout)
    assert found, f"the page did not report its layout: {run.stderr[-2000:]}"
    return json.loads(html.unescape(found[1]))


def charts(dom: str) -> dict[str, int]:
    """The figures of a page, and how many pictures with something drawn each of them has."""
    reader = _Charts()
    reader.feed(dom)
    return reader.found


class _Charts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}
        self.figure, self.picture, self.drawn = "", False, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "figure":
            self.figure = named.get("id") or ""
            self.found[self.figure] = 0
        elif tag == "svg":
            self.picture, self.drawn = named.get("role") == "img" and bool(named.get("aria-label")), 0
        elif tag in ("path", "use"):
            self.drawn += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "svg":
            # Axes alone are about ten paths; fewer is an empty picture.
            if self.figure:
                self.found[self.figure] += self.picture and self.drawn >= 10
            self.picture = False
        elif tag == "figure":
            self.figure = ""


def _chromium(page: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    browser = find_chromium()
    assert browser is not None
    return subprocess.run(
        [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
