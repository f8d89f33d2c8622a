"""Tables of docs/results from their data files; scripts/make_results.py puts them into the pages.

Each function of `TABLES` takes words from the page and returns Markdown. Files are named below docs/results.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dmc.evaluation.paired import difference, settled  # noqa: E402
from dmc.evaluation.pareto import front, leader  # noqa: E402
from dmc.evaluation.report import ahead, point  # noqa: E402
from dmc.evaluation.styles import POLICIES, STYLES, method  # noqa: E402
from scripts.reference_text import table  # noqa: E402
from scripts.results_rows import loss, ratio  # noqa: E402

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
BUDGETS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
NAMES = {"base": "small base model", "smollm2-135m": "SmolLM2-135M-Instruct (4-bit GGUF, dequantised)"}


def read(*names: str) -> list[dict]:
    """Rows of JSONL files below docs/results that have a result."""
    lines = [line for name in names for line in (RESULTS / name).read_text().splitlines()]
    return [row for row in map(json.loads, lines) if "result" in row or "row" in row]


def competitor(row: dict) -> str:
    """The method of a frontier row; a model that was changed in another way competes under its own name."""
    return method(row) or row["model"]


def shown(row: dict) -> str:
    """What the row is, in few words: the model where it is not the base, the policy's setting, the codec."""
    name = row["model"] if row["result"]["model_hash"] != row["result"]["base_hash"] else ""
    policy = "" if row["policy"] in ("full", "dmc", "dms") else f"`{_policy(row['policy'])}`"
    return " ".join(part for part in (name and f"`{name}`", policy, f"`{row['codec']}`") if part)


def _policy(spec: str) -> str:
    name, _, settings = spec.partition(":")
    kept = [one for one in settings.split(",") if one and not one.startswith("decisions=")]
    return f"{name}:{','.join(kept)}" if kept else name


def frontier(*files: str) -> str:
    """Rows that no other beats in bytes and KL at once, by rising KL."""
    rows = read(*files)
    best = [rows[i] for i in front([point(row) for row in rows])][::-1]
    return table(
        ("held", "method", "row", "CR", "KL, nats/token", "perplexity", "same token"),
        (
            (
                ratio(row["result"]["share"]),
                competitor(row),
                shown(row),
                f"{row['result']['cr']:.2f}",
                loss(row["result"]["kl"], row["result"]["kl_stderr"]),
                f"{row['result']['perplexity']:.3f}",
                f"{row['result']['agreement']:.1%}",
            )
            for row in best
        ),
    )


def budgets(*files: str) -> str:
    """The lowest KL of each method within each of `BUDGETS`: the lowest of all in bold, the second one in italics."""
    best = _best(read(*files))
    names = [*(name for name in STYLES if name in best), *(name for name in best if name not in STYLES)]
    columns = []
    for budget in BUDGETS:
        column = {name: row["result"]["kl"] for name in names if (row := _within(best[name], budget))}
        order = sorted(column, key=column.__getitem__)
        marks = {name: mark for name, mark in zip(order, ("**", "*"), strict=False)}
        columns.append({name: f"{marks.get(name, '')}{loss(value)}{marks.get(name, '')}" for name, value in column.items()})
    head = ("method", *(f"at most 1/{1 / budget:g}" for budget in BUDGETS))
    return table(head, ((name, *(column.get(name, "–") for column in columns)) for name in names))


def leaders(*files: str) -> str:
    """The best two methods of each base model within each of `BUDGETS`, and their difference, paired over the windows."""
    rows, lines = read(*files), []
    for base in dict.fromkeys(row["result"]["base"] for row in rows):
        best = _best([row for row in rows if row["result"]["base"] == base])
        for budget in BUDGETS:
            order = sorted((row for of in best.values() if (row := _within(of, budget))), key=lambda row: row["result"]["kl"])
            if order:
                cells = [f"{competitor(row)}: {shown(row)}, **{loss(row['result']['kl'])}**" for row in order[:2]]
                apart = _paired(*order[:2]) if len(order) > 1 else "–"
                lines.append((NAMES.get(base, base), f"1/{1 / budget:g}", *cells, *["–"] * (2 - len(cells)), apart))
    return table(("model", "bytes, at most", "lowest KL", "second method", "difference"), lines)


def kept(*files: str) -> str:
    """KL of evicting policies over shares of the tokens, dense bf16; in bold the lowest of each share."""
    cells: dict[str, dict[str, dict]] = {}
    for row in read(*files):
        policy, _, settings = row["policy"].partition(":")
        if settings.startswith("share=") and row["codec"] == "dense:dtype=bf16" and method(row):
            cells.setdefault(POLICIES.get(policy, policy), {})[settings.removeprefix("share=")] = row["result"]
    shares = sorted({share for of in cells.values() for share in of}, key=float, reverse=True)
    least = {share: min(of[share]["kl"] for of in cells.values() if share in of) for share in shares}
    bold = lambda share, one: f"**{one['kl']:.3f}**" if one["kl"] == least[share] else f"{one['kl']:.3f}"  # noqa: E731
    order = sorted(cells, key=lambda name: statistics.fmean(math.log(one["kl"]) for one in cells[name].values()))
    head = ("policy", *(f"1/{1 / float(share):g}" for share in shares))
    return table(
        head, ((name, *(bold(share, cells[name][share]) if share in cells[name] else "–" for share in shares)) for name in order)
    )


def suite(file: str, *kinds: str) -> str:
    """What each cache wrote out, by kind: share of the answers found, with its standard error over the samples.

    CR is tokens / entries of these samples, and the bytes are their mean.

    Raises:
        ValueError: if a row has several lengths.
    """
    lines = []
    for row in read(file):
        if len(row["retrieval"]["settings"]["lengths"]) > 1:
            raise ValueError(f"{row['row']} has several lengths: a table shows one")
        cells = {cell["kind"]: cell for cell in row["retrieval"]["cells"]}
        of = [one for one in row["retrieval"]["samples"] if one["kind"] in kinds]
        held, dense = (statistics.fmean(one[name] for one in of) for name in ("held_bytes", "dense_bytes"))
        cr = sum(one["tokens"] for one in of) / sum(one["entries"] for one in of)
        found = (_found(cells[kind]) for kind in kinds)
        lines.append((row["row"], f"{cr:.2f}", f"{held / 1e6:.1f}", ratio(held / dense), *found))
    return table(("row", "CR", "MB", "of dense bf16", *kinds), lines)


def retrieval(*files: str) -> str:
    """Per file (one length each) the two policies that write out most answers within each of `BUDGETS`; differences are paired
    over the samples.

    A cache may be 3 % larger than the budget: budgets are settings in tokens, and pages are filled in parts.
    """
    lines = []
    for file in files:
        rows = read(file)
        full = next(row for row in rows if row["row"].startswith("full,"))["retrieval"]
        (length,) = {cell["length"] for cell in full["cells"]}
        for budget in BUDGETS:
            able = [row for row in rows if 1 / row["retrieval"]["all"]["byte_ratio"] <= 1.03 * budget]
            able.sort(key=lambda row: (-row["retrieval"]["all"]["found"], row["retrieval"]["all"]["held_bytes"]))
            order = list({row["policy"].split(":")[0]: row for row in reversed(able)}.values())[::-1]  # the best of each policy
            order = sorted(order, key=able.index)[:2]
            if order:
                of = [(row["row"], row["retrieval"]["all"]) for row in order]
                cells = [f"{name} ({ratio(1 / one['byte_ratio'])}), **{one['found']:.2f}**" for name, one in of]
                apart = _samples(*order) if len(order) > 1 else "–"
                found = f"{full['all']['found']:.2f}"
                lines.append((f"{length:,}", f"1/{1 / budget:g}", found, *cells, *["–"] * (2 - len(cells)), apart))
    return table(("tokens", "bytes, about", "full cache", "best", "second", "difference"), lines)


def _samples(best: dict, other: dict) -> str:
    pairs = list(zip(best["retrieval"]["samples"], other["retrieval"]["samples"], strict=True))
    if any((a["kind"], a["length"], a["answers"]) != (b["kind"], b["length"], b["answers"]) for a, b in pairs):
        return "other samples"
    by, error = difference([a["found"] for a, _ in pairs], [b["found"] for _, b in pairs])
    return f"{by:.2f} ± {error:.2f} (n {len(pairs)})" + ("" if settled(by, error) else ", not settled")


def _found(cell: dict) -> str:
    error = "" if cell["stderr"] is None else f" ± {cell['stderr']:.2f}"
    return f"{cell['found']:.2f}{error} ({cell['n']})"


def _best(rows: Sequence[dict]) -> dict[str, list[dict]]:
    by_method: dict[str, list[dict]] = {}
    for row in rows:
        by_method.setdefault(competitor(row), []).append(row)
    return by_method


def _within(rows: Sequence[dict], budget: float) -> dict | None:
    return leader(rows, [point(row) for row in rows], budget)


def _paired(best: dict, other: dict) -> str:
    found = ahead(best, other)
    if found is None:
        return "other windows"
    return f"{loss(*found)} (n {len(best['result']['kl_windows'])})" + ("" if settled(*found) else ", not settled")


def vllm(file: str) -> str:
    """CPU time of a step in vLLM: least and most of the processes, by batch (scripts/bench_vllm.py)."""
    rows = [row for row in json.loads((RESULTS / file).read_text())["rows"] if row["kind"] == "decode"]
    lines = []
    for context, batch in dict.fromkeys((row["context"], row["batch"]) for row in rows):
        here = [row for row in rows if (row["context"], row["batch"]) == (context, batch)]
        times = {name: sorted(row["cpu_ms"] for row in here if row["engine"] == name) for name in ("dense", "dmc")}
        spans = (f"{of[0]:.1f} to {of[-1]:.1f} ({len(of)})" for of in times.values())
        ours, dense = (statistics.median(times[name]) for name in ("dmc", "dense"))
        lines.append((f"{context:,}", str(batch), *spans, f"{ours / dense:.2f}"))
    return table(("tokens", "batch", "dense, ms", "DMC, ms", "DMC / dense, medians"), lines)


def vllm_requests(file: str) -> str:
    """Requests that vLLM counts in its KV memory (scripts/bench_vllm.py)."""
    rows = [row for row in json.loads((RESULTS / file).read_text())["rows"] if row["kind"] == "count"]
    lines = []
    for context in dict.fromkeys(row["context"] for row in rows):
        dense, ours = (
            next(row["concurrency"] for row in rows if (row["context"], row["engine"]) == (context, name))
            for name in ("dense", "dmc")
        )
        lines.append((f"{context:,}", f"{dense:.2f}", f"{ours:.2f}", f"{ours / dense:.2f}"))
    return table(("tokens per request", "dense", "DMC", "ratio"), lines)


TABLES: dict[str, Callable[..., str]] = {
    "frontier": frontier,
    "budgets": budgets,
    "leaders": leaders,
    "kept": kept,
    "suite": suite,
    "retrieval": retrieval,
    "vllm": vllm,
    "vllm-requests": vllm_requests,
}
