"""Texts cut into windows of one length, on which a model is measured."""

from __future__ import annotations

from collections.abc import Sequence


def cut(texts: Sequence[Sequence[int]], length: int, count: int, *, prefix: Sequence[int] = ()) -> tuple[list, list]:
    """Windows spread evenly over texts, and others between them that no measurement has seen.

    Args:
        texts: token ids of each, without the special tokens that a text begins with.
        length: tokens of a window, the prefix counted; what is left at the end of a text is not used.
        count: windows at most.
        prefix: special tokens with which every window begins, as every text would.

    Returns:
        ``(windows, others)``, lists of ``length`` token ids; there may be no others.

    Raises:
        ValueError: if count is below 1, a window has no room for text, or no text is long enough for one.
    """
    if count < 1:
        raise ValueError(f"windows must be at least 1, got {count}")
    room = length - len(prefix)
    if room < 2:
        raise ValueError(f"a window of {length} tokens is too short; give it at least {len(prefix) + 2}")
    pieces = [[*prefix, *text[start : start + room]] for text in texts for start in range(0, len(text) - room + 1, room)]
    if not pieces:
        longest = max((len(text) for text in texts), default=0) + len(prefix)
        raise ValueError(
            f"no text has the {length} tokens of a window: the longest has {longest}; give more text or a smaller window"
        )
    count = min(count, len(pieces))
    chosen = {number * len(pieces) // count for number in range(count)}
    parts: tuple[list, list] = [], []
    for number, piece in enumerate(pieces):
        parts[number not in chosen].append(piece)
    return parts
