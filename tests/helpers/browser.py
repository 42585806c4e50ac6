"""A page in a headless Chromium, where there is one."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
PHONE, DESKTOP = 390, 1280

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium")


def browse(folder, *arguments, file):
    """What the browser prints; its profile stands in `folder`."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", *arguments,
               f"--user-data-dir={folder / 'profile'}", file.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def framed(page, folder, width, inside=""):
    """A file that shows the page `width` pixels wide: a window cannot be below 500."""
    wrapper = folder / f"wrapper_{width}.html"
    wrapper.write_text(f"""<!doctype html><body style="margin: 0"><pre id="found"></pre>
<iframe width="{width}" height="800" srcdoc="{html.escape(page.read_text())}"></iframe><script>
onload = () => {{
  const inner = document.querySelector("iframe").contentDocument;
  {inside}
}};</script>""")
    return wrapper


def facts(page, folder, width):
    """How wide the page is on a screen of that width, sizes of its text and of its figures."""
    wrapper = framed(page, folder, width, """found.textContent = JSON.stringify({
    width: inner.documentElement.scrollWidth,
    visible: inner.documentElement.clientWidth,
    figures: [...inner.images].map(image => image.complete && image.naturalWidth),
    body: parseFloat(getComputedStyle(inner.body).fontSize),
    table: parseFloat(getComputedStyle(inner.querySelector("td")).fontSize),
  });""")  # fmt: skip
    printed = browse(folder, "--dump-dom", "--virtual-time-budget=8000", file=wrapper)
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', printed)[1]))


def screenshot(file, folder, width, height):
    """Its pixels in grey, [height, width]."""
    shot = folder / "shot.png"
    size = (f"--window-size={width},{height}", "--force-device-scale-factor=1")
    browse(folder, f"--screenshot={shot}", "--virtual-time-budget=8000", *size, file=file)
    with PIL.Image.open(shot) as image:
        return np.asarray(image.convert("L"))
