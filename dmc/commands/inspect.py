"""`dmc inspect`: what a cache holds of texts; with --out a report on every layer and head of the model."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dmc.commands.common import add_model, add_prompts, load, read_prompts

if TYPE_CHECKING:
    from dmc.analysis.inspection import Inspection
    from dmc.engine import LLM


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--max-tokens", type=int, default=1, help="generated greedily after the text or window (1)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    report = parser.add_argument_group("report (--out: ranks, attention, compression and segments of every layer and head)")
    report.add_argument("--out", metavar="REPORT", help="directory to write: report.html, inspect.json, PNGs")
    report.add_argument("--windows", type=int, default=4, help="pieces of the texts that are measured, spread evenly (4)")
    report.add_argument("--window-tokens", type=int, default=1024, help="of each piece (1024)")
    report.add_argument("--attention-tokens", type=int, default=512, help="first ones of a window for attention's rank (512)")
    report.add_argument("--precision", default="fp64", help="of the singular values: fp64 (default) or fp32")


def run(options: argparse.Namespace) -> None:
    """Prints what the cache holds; writes the report if one is asked for."""
    texts = read_prompts(options)
    from dmc.engine import inspect

    if options.out is None:
        figures = inspect.report(load(options), texts, max_tokens=options.max_tokens)
    else:
        figures = _report(options, texts)
    print(inspect.as_json(figures) if options.json else inspect.as_text(figures))


def _report(options: argparse.Namespace, texts: list[str]) -> dict:
    from dmc.analysis import output, report
    from dmc.analysis.inspection import findings

    output.check_free(options.out)  # before minutes of measuring
    found = _inspect(options, texts, load(options))
    with output.replaced(options.out) as directory:
        report.write(found, directory)
    if not options.json:
        print("\n".join(findings(found)), f"report: {Path(options.out) / 'report.html'}", "", sep="\n")
    return found.cache


def _inspect(options: argparse.Namespace, texts: list[str], llm: LLM) -> Inspection:
    from dmc.analysis import windows
    from dmc.analysis.inspection import Inspection
    from dmc.analysis.measure import measure
    from dmc.engine import inspect

    positions = llm.model.config.max_position_embeddings
    if options.window_tokens + options.max_tokens > positions:
        raise ValueError(
            f"--window-tokens {options.window_tokens} and --max-tokens {options.max_tokens} are more than the model's "
            f"{positions} positions"
        )
    tokenizer = llm.tokenizer
    tokens = [tokenizer.inner(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
    chosen, _ = windows.cut(tokens, options.window_tokens, options.windows, prefix=tokenizer.inner("").input_ids)
    with _progress(len(chosen)) as bar:
        measures, merges = measure(
            llm.model, llm.cache.policy, chosen, leading=options.attention_tokens, precision=options.precision,
            progress=bar.update,
        )
    cache = inspect.report(llm, chosen, max_tokens=options.max_tokens)
    return Inspection(_about(options, texts, tokens), measures, merges, [tokenizer.piece(token) for token in chosen[0]], cache)


def _about(options: argparse.Namespace, texts: list[str], tokens: list[list[int]]) -> dict[str, object]:
    names = [*("--prompt" for _ in options.prompt), *(Path(name).name for name in options.prompt_file)]
    facts = {
        "model": Path(options.directory).resolve().name,
        "config_sha256": hashlib.sha256((Path(options.directory) / "config.json").read_bytes()).hexdigest()[:16],
        "texts": [
            {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()[:16], "tokens": len(own)}
            for name, text, own in zip(names, texts, tokens, strict=True)
        ],
        "precision": options.precision,
    }
    commit = _commit()
    return facts | ({"commit": commit} if commit else {})


def _commit() -> str | None:
    """Of the checkout that runs, or None outside one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _progress(total: int):  # noqa: ANN202 - tqdm is imported only here
    from tqdm import tqdm

    return tqdm(total=total, desc="windows", file=sys.stderr, disable=None)  # none where stderr is no terminal
