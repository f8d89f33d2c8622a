"""Colours of methods that have no style, and labels of logarithmic axes."""

import itertools
import math

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgb

from dmc.evaluation.styles import _COLOURS, STYLES, label_decades, style


def lab(colour):
    """CIE L*a*b* (D65) of a colour in sRGB, from the standard's formulas."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_an_unknown_method_looks_like_no_known_one():
    known = [colour for colour, _ in STYLES.values()]
    for own, other in [*itertools.product(_COLOURS, known), *itertools.combinations(_COLOURS, 2)]:
        assert math.dist(lab(own), lab(other)) > 30, (own, other)
    assert style("my policy") == style("my policy") and style("my policy")[0] in _COLOURS


@pytest.mark.parametrize("values", [[0.031, 0.072], [0.011, 0.024], [0.004, 0.3], [0.2, 30]])
def test_a_logarithmic_axis_has_several_labels(values):
    """matplotlib labels whole decades alone: of the first two ranges none."""
    figure, axis = plt.subplots()
    axis.set_yscale("log")
    axis.plot([1, 2], values)
    label_decades(axis.yaxis)
    figure.canvas.draw()
    low, high = axis.get_ylim()
    ticks = zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
    found = {value: label.get_text() for value, label in ticks if low <= value <= high}
    assert len(found) >= 3 and all(float(text) == pytest.approx(value) for value, text in found.items())
    plt.close(figure)
