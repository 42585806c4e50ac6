"""The report's page in a real browser: it is drawn, and on a phone nothing but tables scrolls.

Skipped where there is no Chromium: the page itself needs none.
"""

import html
import json
import re
import shutil
import subprocess

import made_up_runs
import numpy as np
import PIL.Image
import pytest

from experiments import report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
PHONE, DESKTOP = 390, 1280
METHODS = {
    name: [0.6, 0.61, 0.62]
    for name in ("erm", "lpa", "lpa+lpl", "manifold_mixup@input|hidden1|hidden2|hidden3")
}

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a report of made-up runs."""
    root = tmp_path_factory.mktemp("report")
    made_up_runs.write_many(root / "runs", METHODS)
    report.make([root / "runs"], root / "out", page=True)
    return root / "out" / "report.html"


@pytest.fixture
def browse(tmp_path):
    """(*arguments, file) -> what the browser prints."""

    def run(*arguments, file):
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", *arguments,
                   f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]  # fmt: skip
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True
        ).stdout

    return run


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_is_no_wider_than_the_screen_and_all_figures_show(page, browse, tmp_path, width):
    wrapper = tmp_path / "wrapper.html"
    # Of a window the browser does not go below 500 pixels; of a frame it does.
    wrapper.write_text(f"""<!doctype html><body><pre id="found"></pre>
<iframe width="{width}" height="800" srcdoc="{html.escape(page.read_text())}"></iframe><script>
onload = () => {{
  const inner = document.querySelector("iframe").contentDocument;
  found.textContent = JSON.stringify({{
    width: inner.documentElement.scrollWidth,
    visible: inner.documentElement.clientWidth,
    figures: [...inner.images].map(image => image.complete && image.naturalWidth),
    body: parseFloat(getComputedStyle(inner.body).fontSize),
    table: parseFloat(getComputedStyle(inner.querySelector("td")).fontSize),
  }});
}};</script>""")
    printed = browse("--dump-dom", "--virtual-time-budget=5000", file=wrapper)
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', printed)[1]))
    assert found["width"] <= found["visible"] <= width
    assert len(found["figures"]) >= 2 and all(width > 100 for width in found["figures"])
    assert found["body"] >= 16 and found["table"] >= 14


def test_a_screenshot_shows_the_table_and_a_figure(page, browse, tmp_path):
    shot = tmp_path / "shot.png"
    browse(f"--screenshot={shot}", f"--window-size={DESKTOP},1600", file=page)
    with PIL.Image.open(shot) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[1] == DESKTOP
    for half in np.array_split(pixels[:1400], 2):
        dark = np.mean(half < 100)
        assert 0.002 < dark < 0.5, "blank, or not as it should be"
