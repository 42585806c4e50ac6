"""The report's page in a real browser: it is drawn, and on a phone nothing but tables scrolls.

Skipped where there is no Chromium: the page itself needs none.
"""

import numpy as np
import pytest

from experiments import report
from tests.helpers import browser, made_up_runs

METHODS = {
    name: [0.6, 0.61, 0.62]
    for name in ("erm", "lpa", "lpa+lpl", "manifold_mixup@input|hidden1|hidden2|hidden3")
}

pytestmark = browser.needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a report of made-up runs."""
    root = tmp_path_factory.mktemp("report")
    made_up_runs.write_many(root / "runs", METHODS)
    report.make([root / "runs"], root / "out", page=True)
    return root / "out" / "report.html"


@pytest.mark.parametrize("width", [browser.PHONE, browser.DESKTOP])
def test_the_page_is_no_wider_than_the_screen_and_all_figures_show(page, tmp_path, width):
    found = browser.facts(page, tmp_path, width)
    assert found["width"] <= found["visible"] <= width
    assert len(found["figures"]) >= 2 and all(width > 100 for width in found["figures"])
    assert found["body"] >= 16 and found["table"] >= 14


@pytest.mark.parametrize("width", [browser.PHONE, browser.DESKTOP])
def test_a_screenshot_shows_the_heading_the_table_and_a_figure(page, tmp_path, width):
    wrapper = browser.framed(page, tmp_path, width)
    pixels = browser.screenshot(wrapper, tmp_path, max(width, 500), 800)[:, :width]
    heading, rest = np.split(pixels, [120])
    for part in (heading, rest):
        assert 0.002 < np.mean(part < 100) < 0.3, "blank, or not as it should be"
    # Bars are blue, the cells of a table's head and first column soft grey: many shades.
    assert len(np.unique(rest)) > 20
