"""Texts of a figure that overlap or leave the canvas."""

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text


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
