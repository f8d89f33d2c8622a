"""A table of docs/results whose columns the page itself defines; scripts/make_results.py puts it into the page.

    <!-- table: rows serve/readers.json
    codec := {codec}
    whole run, CPU s := {whole_s[0]:.2f} → {whole_s[1]:.2f}
    -->

One line of the table for each row of the file. A column is its head and, after `:=`, the text of an f-string. Its names are the
fields of the row, the row itself (`row`), all rows of the table (`rows`), the fields of the file (`file`), those of other files
(`load("dms/training.json")`), and `FUNCTIONS`.

After the file's name may stand a Python expression for the rows, over the same names: `[r for r in rows if r.batch == 1]`. It
ends before the first line with a `:=`. The rows of a JSONL file are its lines, those of a JSON file its `rows`. An object's
fields can be written as attributes; null is shown as –.

Pages are evaluated like code: read a page before you run it, as you would read a script.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.reference_text import table

_ERROR = "\u00a0±\u00a0"  # a value and its error stay in one line


class Fields(dict):
    """An object of JSON whose fields are attributes too."""

    def __getattr__(self, name: str) -> Any:
        """The field."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no field {name!r}; there are {', '.join(self)}") from None


class Missing:
    """The null of JSON in a cell: – in every format; false."""

    def __format__(self, form: str) -> str:
        """A dash."""
        return "–"

    def __bool__(self) -> bool:
        """False."""
        return False


def ratio(share: float) -> str:
    """A share of the bytes as 1/x."""
    return f"1/{1 / share:.1f}"


def loss(value: float, error: float | None = None) -> str:
    """A KL, with its standard error if there is one."""
    digits = 4 if value < 0.1 else 3
    shorter = f"{value:.{digits}f}" if value >= 5e-4 else f"{value:.1e}"
    if error is None:
        return shorter
    return f"{shorter}{_ERROR}{error:.{digits}f}" if value >= 5e-4 else f"{shorter}{_ERROR}{error:.0e}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The mean of several runs, with the least and the most of them."""
    mean, least, most = (f"{value:.{digits}f}" for value in (statistics.fmean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})" if len(values) > 1 else mean


def quartiles(of: dict, digits: int = 2, factor: float = 1) -> str:
    """The median with the quartiles of a measurement of `scripts/bench_train.py`."""
    middle, low, high = (f"{factor * of[name]:.{digits}f}" for name in ("median", "quartile_1", "quartile_3"))
    return f"{middle} ({low}-{high})"


def limits(values: Sequence[float], digits: int = 3) -> str:
    """The least and the most of several values; one number if they are equal as shown."""
    ends = dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values)))
    return " to ".join(ends)


def at(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at `x` on straight lines, in logarithms of both, through the points; beyond them on the nearest line."""
    pairs = list(itertools.pairwise(sorted(points)))
    (low, first), (high, last) = next((pair for pair in pairs if x <= pair[1][0]), pairs[-1])
    return first * (last / first) ** (math.log(x / low) / math.log(high / low))


FUNCTIONS: dict[str, Callable] = {
    "loss": loss,
    "ratio": ratio,
    "spread": spread,
    "quartiles": quartiles,
    "limits": limits,
    "at": at,
    "median": statistics.median,
    "mean": statistics.fmean,
}


def rows(mark: str, folder: Path) -> str:
    """The table of a mark, in Markdown.

    Args:
        mark: text of the comment after `table: rows`.
        folder: docs/results; the file is named below it.

    Raises:
        OSError: if there is no such file.
        ValueError: if the mark has no columns or selects no rows, or one of its expressions fails.
    """
    lines = mark.strip().splitlines()
    begin = next((number for number, line in enumerate(lines) if " := " in f" {line}"), len(lines))
    file, _, chosen = " ".join(map(str.strip, lines[:begin])).partition(" ")
    data = load(file, folder)
    columns = [tuple(part.strip() for part in f" {line}".split(" := ", 1)) for line in lines[begin:]]
    if not columns or any(len(column) != 2 for column in columns):
        raise ValueError("below the file and its expression every line is a column, 'head := text', and there is at least one")
    names = FUNCTIONS | {"load": lambda name: load(name, folder), "file": data} | data
    found = _evaluate(chosen or "rows", names)
    if not found:
        raise ValueError(f"{chosen or 'rows'!r} selects no rows")
    heads, templates = zip(*columns, strict=True)
    return table(
        heads,
        (
            [
                _evaluate(
                    f"f'''{template}'''", names | {"rows": found, "row": row} | (row if isinstance(row, dict) else {})
                ).replace(" ± ", _ERROR)
                for template in templates
            ]
            for row in found
        ),
    )


def load(file: str, folder: Path) -> Fields:
    """The fields of a data file; those of a JSONL file are its `rows`."""
    text = (folder / file).read_text()
    return _read({"rows": [json.loads(line) for line in text.splitlines()]} if file.endswith(".jsonl") else json.loads(text))


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return Fields({name: _read(each) for name, each in value.items()})
    if isinstance(value, list):
        return [_read(each) for each in value]
    return Missing() if value is None else value


def _evaluate(expression: str, names: dict) -> Any:
    try:
        return eval(expression, dict(names))  # a copy: eval adds __builtins__
    except Exception as error:
        raise ValueError(f"{expression}: {type(error).__name__}: {error}") from error
