"""Markdown of `scripts/make_reference.py` and its parts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence


def escaped(text: str | None) -> str:
    """Help or a comment as Markdown: what would be markup is escaped, but code spans stay."""
    spans = re.split(r"(`[^`]*`)", (text or "").replace("%%", "%"))
    return "".join(span if span.startswith("`") else re.sub(r"([\\*_<])", r"\\\1", span) for span in spans)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; bars in cells are escaped."""
    lines = [tuple(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    first, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, "|" + "---|" * len(head), *rest])


def attributes(owner: type) -> dict[str, str]:
    """Names and meanings of the section "Attributes" of a class's docstring.

    Names that share a line (``a, b: text``) share its text, or have one part of it each if it has as many parts: ``a, b: x; y``.
    """
    text = re.search(r"Attributes:\n(.*?)(?=\n\S|\nRaises:|\nArgs:|\Z)", inspect.getdoc(owner) or "", re.DOTALL)
    groups: list[tuple[list[str], str]] = []
    for line in text[1].splitlines() if text else ():
        head = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if head:
            groups.append((head[1].split(", "), head[2]))
        elif line.strip():
            groups[-1] = groups[-1][0], f"{groups[-1][1]} {line.strip()}"
    found: dict[str, str] = {}
    for names, meaning in groups:
        meaning = meaning.rstrip(".").replace("``", "`")
        parts = meaning.split("; ")
        found |= zip(names, parts if len(parts) == len(names) else [meaning] * len(names), strict=True)
    return found
