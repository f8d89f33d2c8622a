"""`dmc inspect`: what a cache holds of texts; with --out a report on every layer and head of the model."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dmc.commands.common import add_model, add_prompts, codec_choice, load, ranks, read_prompts
from dmc.evaluation.spec import named
from dmc.extras import required

if TYPE_CHECKING:
    from dmc.analysis.inspection import Inspection
    from dmc.engine import LLM


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--max-tokens", type=int, default=1, help="tokens generated greedily after the text or window (1)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    report = parser.add_argument_group("report (--out: ranks, attention, compression and segments of every layer and head)")
    report.add_argument("--out", metavar="REPORT", help="directory to write: report.html, inspect.json, PNGs")
    report.add_argument("--windows", type=int, default=4, help="number of windows of the texts, evenly spaced (4)")
    report.add_argument("--window-tokens", type=int, default=1024, help="tokens per window (1024)")
    report.add_argument("--attention-tokens", type=int, default=512, help="first tokens of a window for attention's rank (512)")
    report.add_argument(
        "--recommend",
        action="store_true",
        help="divide the bytes of --codec among the layers by loss; writes layers.json, for --codec-layers",
    )
    report.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="SETTING=VALUE,...",
        help="setting and values to measure per layer (key_bits and value_bits, one less and more); may repeat",
    )
    report.add_argument("--precision", default="fp64", help="precision of the singular values: fp64 (default) or fp32")


def run(options: argparse.Namespace) -> None:
    """Prints what the cache holds; writes the report if one is asked for."""
    texts = read_prompts(options)
    vary = _vary(options)
    from dmc.engine import inspect

    if options.out is None:
        figures = inspect.report(load(options), texts, max_tokens=options.max_tokens)
    else:
        figures = _report(options, texts, vary)
    print(inspect.as_json(figures) if options.json else inspect.as_text(figures))


def _vary(options: argparse.Namespace) -> dict[str, list[float]] | None:
    if options.recommend and options.out is None:
        raise ValueError("--recommend writes into a report: give --out REPORT")
    if options.vary and not options.recommend:
        raise ValueError("--vary is for --recommend: give both or neither")
    found: dict[str, list] = {}
    for text in options.vary:
        setting, _, values = text.partition("=")
        read = [named(f"_:{setting}={value}")[1][setting] for value in values.split(",")] if setting and values else []
        if not read or not all(isinstance(value, int | float) for value in read):
            raise ValueError(f"--vary {text!r}: write SETTING=NUMBER,NUMBER,... such as key_bits=2,3,4")
        found[setting] = read
    return found or None


def _report(options: argparse.Namespace, texts: list[str], vary: dict[str, list[float]] | None) -> dict:
    from dmc.analysis import output, report
    from dmc.analysis.inspection import findings
    from dmc.analysis.suggested import verdict

    output.check_free(options.out)  # before minutes of measuring
    required("the report", "matplotlib")
    if ranks(options) != 1:
        raise ValueError("--out looks into the layers of a whole model: use --tensor-parallel 1")
    found = _inspect(options, texts, vary, load(options))
    with output.replaced(options.out) as directory:
        report.write(found, directory)
    if not options.json:
        said = findings(found) + ([verdict(found.recommendation)] if found.recommendation else [])
        print("\n".join(said), f"report: {Path(options.out) / 'report.html'}", "", sep="\n")
    return found.cache


def _inspect(options: argparse.Namespace, texts: list[str], vary: dict[str, list[float]] | None, llm: LLM) -> Inspection:
    from dmc.analysis import windows
    from dmc.analysis.inspection import Inspection
    from dmc.analysis.measure import measure
    from dmc.analysis.recommend import choices
    from dmc.engine import inspect

    positions = llm.model.config.positions
    if options.window_tokens + options.max_tokens > positions:
        raise ValueError(
            f"--window-tokens {options.window_tokens} and --max-tokens {options.max_tokens} are more than the model's "
            f"{positions} positions"
        )
    tokenizer = llm.tokenizer
    tokens = [tokenizer.inner(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
    chosen, others = windows.cut(tokens, options.window_tokens, options.windows, prefix=tokenizer.inner("").input_ids)
    if options.recommend:
        choices(*codec_choice(options), vary)  # what is wrong is said before anything is measured
    with _progress(len(chosen), "windows") as bar:
        measures, merges = measure(
            llm.model,
            llm.cache.policy,
            chosen,
            leading=options.attention_tokens,
            precision=options.precision,
            progress=bar.update,
        )
    cache = inspect.report(llm, chosen, max_tokens=options.max_tokens)
    recommendation = _recommend(options, llm, chosen, others, vary) if options.recommend else None
    pieces = tokenizer.pieces(chosen[0])
    return Inspection(_about(options, texts, tokens), measures, merges, pieces, cache, recommendation)


def _recommend(
    options: argparse.Namespace, llm: LLM, chosen: list[list[int]], others: list[list[int]], vary: dict[str, list[float]] | None
) -> dict:
    from dmc.analysis.recommend import choices, passes, recommend

    name, settings = codec_choice(options)
    count = min(len(chosen), len(others))
    held_out = [others[number * len(others) // count] for number in range(count)]
    total = passes(len(llm.model.layers), choices(name, settings, vary), bool(held_out))
    with _progress(total, "layers x settings") as bar:
        return recommend(llm.model, llm.cache, name, settings, chosen, held_out, vary=vary, progress=bar.update)


def _about(options: argparse.Namespace, texts: list[str], tokens: list[list[int]]) -> dict[str, object]:
    from dmc.evaluation.provenance import commit, model_hash, versions

    names = [*("--prompt" for _ in options.prompt), *(Path(name).name for name in options.prompt_file)]
    return {
        "model": options.shown,
        "model_hash": model_hash(options.directory),
        "texts": [
            {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()[:16], "tokens": len(own)}
            for name, text, own in zip(names, texts, tokens, strict=True)
        ],
        "precision": options.precision,
        "commit": commit(),
        "versions": versions(),
    }


def _progress(total: int, unit: str):  # noqa: ANN202 - tqdm is imported only here
    from tqdm import tqdm

    return tqdm(total=total, desc=unit, file=sys.stderr, disable=None)  # none where stderr is not a terminal
