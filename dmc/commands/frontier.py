"""`dmc frontier`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from dmc import hub
from dmc.evaluation.spec import named
from dmc.extras import required

if TYPE_CHECKING:
    from dmc.evaluation.grid import Choice
    from dmc.evaluation.windows import Windows

STDLIB = "stdlib"
_PLOT = "frontier.png"


@dataclass(frozen=True)
class Plan:
    """The grid to measure; each field is a key of the config file and a flag.

    Attributes:
        base: directory of the uncompressed model.
        models: directories of other models: retrofits of it, or the base after GQA up-training.
        text: a UTF-8 file; "stdlib": the standard library's held-out pages.
        prompt, scored, windows: tokens of each window that are prefilled and scored, and how many windows.
        policies, codecs: NAME[:SETTING=VALUE,...]; none: the registered ones that fit.
        budgets: of evicting policies, shares of the tokens.
        max_entries: hard budgets of policies with a window of recent tokens, each next to no bound; none: no bound alone.
        device, dtype: as in `dmc generate`.
    """

    base: str = "checkpoints/base"
    models: tuple[str, ...] = ()
    text: str = STDLIB
    prompt: int = 960
    scored: int = 64
    windows: int = 8
    policies: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ("1/2", "1/4", "1/8", "1/16")
    max_entries: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"


_HELP = {
    "base": "the uncompressed model (checkpoints/base)",
    "models": "other models, compared with the base: retrofits of it, or the base after GQA up-training",
    "text": "UTF-8 file; stdlib (default): the standard library's held-out pages",
    "prompt": "tokens of a window that are prefilled (960)",
    "scored": "tokens of a window that are fed one by one and scored (64)",
    "windows": "number of windows of the text (8)",
    "policies": "such as full h2o streaming:sinks=4,recent=252 (all registered ones)",
    "codecs": "such as int8 gear-4bit tcq:bits=2,page_size=32; also takes page_size, sink_tokens, window, exact_dtype (all "
    "registered ones)",
    "budgets": "shares of the tokens that evicting policies keep (1/2 1/4 1/8 1/16)",
    "max_entries": "hard budgets of late merging, dms and gate: maximum of entries per head behind the window (no bound)",
    "device": "cpu, cuda:0, ... (a GPU if there is one)",
    "dtype": "fp32, bf16, fp16 (fp32 on the CPU, else the checkpoint's)",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", type=Path, help="YAML file with the settings below, which flags override"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="results.jsonl, report.md and frontier.png; rows of results.jsonl are not measured again",
    )
    for field in fields(Plan):
        many = isinstance(field.default, tuple)
        kind = int if isinstance(field.default, int) else str
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, nargs="+" if many else None, help=_HELP[field.name])


def run(options: argparse.Namespace) -> int:
    """Measures, and writes the report after each row; 1 if a cell failed."""
    required("the plot", "matplotlib")
    plan = _plan(options)
    choices = {kind: _choices(getattr(plan, kind)) for kind in ("policies", "codecs")}
    budgets, most = [_share(text) for text in plan.budgets], [_count(text) for text in plan.max_entries]
    from dmc.engine.llm import resolve
    from dmc.evaluation import frontier, grid
    from dmc.evaluation.reference import check_fits
    from dmc.evaluation.report import measured
    from dmc.model import read_config

    base, models = hub.located(plan.base), [hub.located(model) for model in plan.models]
    cells = grid.cells([base, *models], budgets=budgets, max_entries=most, **choices)
    windows = _windows(plan)
    config = read_config(base)
    check_fits(windows, config.vocab_size, config.positions, base)
    resolve(plan.device, plan.dtype, config.dtype)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "plan.json").write_text(json.dumps(asdict(plan), indent=2) + "\n")
    rows = frontier.run(
        cells, windows, base, options.out, device=plan.device, dtype=plan.dtype, after=lambda rows: _write(rows, options.out)
    )
    _write(rows, options.out)
    if measured(rows):
        from dmc.evaluation.plot import plot_frontier

        plot_frontier(rows, options.out / _PLOT)
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"dmc frontier: {row['model']}, {row['policy']} x {row['codec']} failed: {row['error']}", file=sys.stderr)
    print(options.out / "report.md")
    return 1 if failed else 0


def _plan(options: argparse.Namespace) -> Plan:
    plan = Plan()
    if options.config:
        plan = _from_file(options.config)
    given = {field.name: value for field in fields(Plan) if (value := getattr(options, field.name)) is not None}
    return replace(plan, **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _from_file(path: Path) -> Plan:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    known = {field.name: field.default for field in fields(Plan)}
    if not isinstance(content, dict) or (wrong := [key for key in content if key not in known]):
        what = f"has no setting {wrong[0]}" if isinstance(content, dict) else "is not a table of settings"
        raise ValueError(f"{path} {what}; it can have: {', '.join(known)}")
    for key, value in content.items():
        if isinstance(known[key], tuple):
            if not isinstance(value, list) or not all(isinstance(part, str | int | float) for part in value):
                raise ValueError(f"{path}: {key} must be a list, such as [{', '.join(known[key]) or 'NAME, NAME:SETTING=VALUE'}]")
            content[key] = tuple(str(part) for part in value)
        elif type(value) is not type(known[key]):
            kind = "whole number" if isinstance(known[key], int) else "word"
            raise ValueError(f"{path}: {key} must be a {kind}, got {value!r}")
    return Plan(**content)


def _choices(texts: tuple[str, ...]) -> list[Choice] | None:
    from dmc.evaluation.grid import choose

    parsed = [named(text) for text in texts]
    return [choose(name, **settings) for name, settings in parsed] or None


def _share(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"budget {text!r} is not a share of the tokens: write it as 1/4 or 0.25") from None


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"max_entries {text!r} must be a whole number of entries, such as 256")
    return int(text)


def _windows(plan: Plan) -> Windows:
    from dmc.evaluation.windows import cut_windows, read_windows

    sizes = {"prompt": plan.prompt, "scored": plan.scored, "count": plan.windows}
    if plan.text != STDLIB:
        return read_windows(plan.text, plan.base, **sizes)
    try:
        from data.stdlib import documents, split
    except ModuleNotFoundError as error:
        raise ValueError("the text stdlib needs a checkout of the project (pip install -e .): give --text FILE") from error
    _, held_out = split(documents(("guide",)))
    return cut_windows([document.text for document in held_out], plan.base, name="stdlib, held out", **sizes)


def _write(rows: list[dict], out: Path) -> None:
    """The report, as soon as there is a row."""
    from dmc.evaluation.report import measured, report

    done = measured(rows)
    if not done:
        return
    command = shlex.join(["dmc", *sys.argv[1:]])
    text = report(rows, command=command, plot=_PLOT)
    (out / "report.md").write_text(text, encoding="utf-8")
