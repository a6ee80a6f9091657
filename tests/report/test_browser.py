"""The page in a real browser, at the width of a desk and of a phone: nothing on the console, every chart drawn, nothing wider than the
page, text large enough to read. Skipped where there is no Chromium, but for the size of the page of a large run."""

import json
import re
import shutil
import subprocess

import pytest
from report import large
from report.test_report import write_run

from moejax.report import page, runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.slow
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
]  # fmt: skip
LOOK = """<script>addEventListener('load', () => setTimeout(() => {
  const box = e => e.getBoundingClientRect();
  const all = s => [...document.querySelectorAll(s)];
  const seen = {
    loaded: performance.timing.loadEventEnd - performance.timing.navigationStart, width: innerWidth,
    page: document.documentElement.scrollWidth, figures: all('figure').length,
    drawn: all('figure svg').filter(e => box(e).width > 100).length,
    text: Math.min(...all('figure svg text').filter(e => e.textContent.trim()).map(e => box(e).height)),
  };
  document.title = JSON.stringify(seen);
}, 0))</script>"""
SMALLEST = 8.0
"""Pixels of the height of the smallest text of a chart: tick labels of 7 points on a phone."""


def seen(folder, text, width, dark=False):
    """What LOOK found of a page at a width, and the lines of its console."""
    file = folder / f"look{width}.html"
    file.write_text(text.replace("</body>", LOOK + "</body>"))
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [
        CHROMIUM,
        *OPTIONS,
        *scheme,
        f"--user-data-dir={folder}/profile{width}",
        f"--window-size={width},900",
        "--dump-dom",
    ]
    done = subprocess.run([*command, f"file://{file}"], capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]
    return json.loads(title), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of two small runs, and one of a large one."""
    folder = tmp_path_factory.mktemp("pages")
    pair = [
        write_run(folder / "sparse", "sparse", bits=2.5, seconds=0.5),
        write_run(folder / "dense", "dense", bits=3.0, seconds=0.25, sparse=False),
    ]
    return {
        "small": page.html(runs.load_all(pair)),
        "large": page.html(runs.load_all([large.write(folder / "large")])),
    }


@in_browser
@pytest.mark.parametrize("width", [1280, 500])
@pytest.mark.parametrize("which", ["small", "large"])
def test_in_a_browser(pages, which, width, tmp_path):
    found, console = seen(tmp_path, pages[which], width, dark=width == 500)
    print(which, found)
    assert not console
    assert found["width"] == width
    assert found["figures"] == found["drawn"] >= 4
    assert found["page"] <= width
    assert found["text"] >= SMALLEST


@in_browser
def test_a_console_error_would_be_seen(tmp_path):
    _, console = seen(tmp_path, "<title></title><body><script>nothing.at(all)</script></body>", 800)
    assert len(console) == 1


def test_a_large_run_stays_small(pages):
    """10,000 steps, 48 layers, 128 experts: under 5 MB, nothing loaded."""
    assert len(pages["large"].encode()) < 5e6
    assert not re.search(r'(src|href)="(https?:)?//', pages["large"])
