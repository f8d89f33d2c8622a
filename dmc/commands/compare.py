"""`dmc compare`: paired differences between caches that were measured on the same samples."""

from __future__ import annotations

import argparse
import json

from dmc.commands.common import check_output, write_whole


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.add_argument(
        "reports",
        nargs="+",
        metavar="REPORT",
        help="reports of dmc eval --json, or folders (or results.jsonl) of dmc frontier, whose rows are caches",
    )
    parser.add_argument(
        "--to",
        metavar="NAME",
        help="which one the others are compared with: a report's name without .json, or 'POLICY x CODEC' of a row (the first)",
    )
    parser.add_argument(
        "--across-models",
        action="store_true",
        help="also compare different models, such as a retrofit and its base, on equal samples",
    )
    parser.add_argument("--json", metavar="OUT", help="file for the differences")


def run(options: argparse.Namespace) -> None:
    """Prints the differences, and writes them if asked to.

    Raises:
        ValueError: if reports cannot be read or their samples are not the same; one sentence.
    """
    from dmc.evaluation.compare import as_rows, as_text, compare, read_entries

    check_output("--json", options.json)
    entries = read_entries(options.reports)
    differences = compare(entries, options.to, across_models=options.across_models)
    to = options.to or entries[0].label
    print(as_text(differences, to))
    if options.json:
        write_whole(options.json, json.dumps({"schema": 1, "to": to, "differences": as_rows(differences)}, indent=1) + "\n")
