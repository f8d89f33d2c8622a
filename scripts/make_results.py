"""Fills tables of docs/ from the data files of docs/results.

    python scripts/make_results.py            write the tables
    python scripts/make_results.py --check    say which pages are not current, and exit 1

A table stands in a page between `<!-- table: NAME WORDS -->` and `<!-- end -->`. What is between is written by this script: edit
the data or the mark, then run it again. NAME is `rows`, whose mark says the columns (scripts/results_rows.py), or one of
scripts/results_tables.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.results_rows import rows  # noqa: E402
from scripts.results_tables import RESULTS, TABLES  # noqa: E402

_BLOCK = re.compile(r"^<!-- table:(?P<mark>.*?)-->\n(?P<body>.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)


def filled(page: str, text: str) -> str:
    """The page's text with its tables as the data have them.

    Raises:
        ValueError: if a table is unknown or its data cannot be read; one sentence that names the page.
    """

    def table(found: re.Match[str]) -> str:
        name, _, words = found["mark"].strip().partition(" ")
        if name not in ("rows", *TABLES):
            raise ValueError(f"{page}: unknown table {name!r}; known: rows, {', '.join(TABLES)}")
        try:
            body = rows(words, RESULTS) if name == "rows" else TABLES[name](*words.split())
        except (OSError, LookupError, ArithmeticError, TypeError, ValueError, StopIteration) as error:
            first = found["mark"].strip().splitlines()[0]
            raise ValueError(f"{page}: table {first!r}: {type(error).__name__}: {error}") from error
        return f"<!-- table:{found['mark']}-->\n\n{body}\n\n<!-- end -->"

    opened = len(re.findall(r"^<!-- table:", text, re.MULTILINE))
    text, closed = _BLOCK.subn(table, text)
    if opened != closed:
        raise ValueError(f"{page}: {opened} tables begin with '<!-- table: ... -->' and {closed} of them end with '<!-- end -->'")
    return text


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    try:
        pages = {path: filled(path.name, path.read_text()) for path in sorted(RESULTS.parent.rglob("*.md"))}
    except ValueError as error:
        sys.exit(f"make_results: {error}")
    stale = [path.name for path, made in pages.items() if made != path.read_text()]
    for path, made in pages.items():
        if path.name in stale and not check:
            path.write_text(made)
    print(f"{'not current' if check else 'written'}: {', '.join(stale)}" if stale else "all tables are current")
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
