"""`dmc inspect`."""

from __future__ import annotations

import argparse

from dmc.commands.common import add_model, add_prompts, load, read_prompts


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--max-tokens", type=int, default=1, help="generated greedily after the text (1)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(options: argparse.Namespace) -> None:
    """Prints what the cache holds."""
    prompts = read_prompts(options)
    from dmc.engine import inspect

    report = inspect.report(load(options), prompts, max_tokens=options.max_tokens)
    print(inspect.as_json(report) if options.json else inspect.as_text(report))
