"""Figures in tests: texts that overlap or leave the canvas; figures that are made but not drawn."""

import contextlib
import itertools

import matplotlib.pyplot as plt
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation, Text

from experiments.reporting import style


def problems(figure):
    """Texts that overlap or leave the canvas, in words."""
    boxes, draw = [], Text.draw

    def recorded(text, renderer):
        if text.get_text().strip() and text.get_visible():
            boxes.append((text.get_text(), text.get_window_extent(renderer)))
        draw(text, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", recorded)
        patch.setattr(Annotation, "draw", lambda text, r: recorded(text, r))
        FigureCanvasAgg(figure).draw()
    assert boxes
    width, height = figure.bbox.width, figure.bbox.height
    outside = [
        f"{name!r} leaves the canvas" for name, box in boxes
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]  # fmt: skip
    both = [
        f"{a!r} overlaps {b!r}" for (a, one), (b, two) in itertools.combinations(boxes, 2)
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 1.5
        and min(one.y1, two.y1) - max(one.y0, two.y0) > 1.5
    ]  # fmt: skip
    return outside + both


@contextlib.contextmanager
def undrawn():
    """Within the block, a figure's file lists its texts, lines and bars: drawing takes long."""

    def save(figure, path):
        assert figure.axes
        found = {
            "texts": [text.get_text() for text in figure.findobj(Text)],
            "lines": [line.get_xydata().tolist() for line in figure.findobj(Line2D)],
            "bars": [bar.get_bbox().bounds for bar in figure.findobj(Rectangle)],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<svg/> {found}", encoding="utf-8")
        plt.close(figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "save", save)
        yield
