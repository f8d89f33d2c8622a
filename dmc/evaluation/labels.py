"""Labels at points of a figure that cover neither each other nor the points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_SIDES = ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
_NEAREST, _FARTHEST, _STEP = 4, 64, 4  # points (1/72 inch) between a point of the figure and its label
_MARKER = 3  # half of a marker's side, points


def place(axis: Axes, labels: Sequence[tuple[float, float, str]], taken: Sequence[tuple[float, float]]) -> list[Annotation]:
    """Writes each label at the nearest free place around its point, with a thin line to it; the layout must be final.

    Args:
        axis: where to write, with its final limits.
        labels: (x, y, text) in data coordinates.
        taken: (x, y) of every marker, data coordinates.

    Returns:
        the labels. One that finds no free place is written where it would be nearest.
    """
    unit = axis.figure.dpi / 72
    frame = axis.get_window_extent()
    boxes = [_around(axis.transData.transform(at), _MARKER * unit) for at in taken]
    made = []
    for x, y, text in labels:
        label = axis.annotate(
            text,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=6,
            zorder=5,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#777777", "shrinkA": 0, "shrinkB": 2},
        )
        free = None
        for offset, anchor in _offsets():
            label.set(position=offset, ha=anchor[0], va=anchor[1])
            box = _text(label)
            if free is None:
                free = offset, anchor, box  # the nearest one, if all are taken
            if _inside(box, frame) and not any(box.overlaps(other) for other in boxes):
                free = offset, anchor, box
                break
        offset, anchor, box = free
        label.set(position=offset, ha=anchor[0], va=anchor[1])
        boxes.append(box)
        made.append(label)
    return made


def _offsets() -> Iterator[tuple[tuple[float, float], tuple[str, str]]]:
    """Offset in points and the side of the text that is there, nearest first."""
    horizontal, vertical = {1: "left", -1: "right", 0: "center"}, {1: "bottom", -1: "top", 0: "center"}
    for far in range(_NEAREST, _FARTHEST, _STEP):
        for right, up in _SIDES:
            yield (far * right, far * up), (horizontal[right], vertical[up])


def _text(label: Annotation) -> Bbox:
    """Position of the text, pixels, without the line to its point."""
    from matplotlib.text import Text

    renderer = label.figure.canvas.get_renderer()
    label.update_positions(renderer)
    return Text.get_window_extent(label, renderer)


def _around(centre: Sequence[float], half: float) -> Bbox:
    from matplotlib.transforms import Bbox

    x, y = centre
    return Bbox([[x - half, y - half], [x + half, y + half]])


def _inside(box: Bbox, frame: Bbox) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
