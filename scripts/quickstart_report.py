"""The quickstart's second half: exports, held-out evaluation on the serving engine, table and figures.

    python scripts/quickstart_report.py runs/quickstart

Reads RUNS/retrofit and RUNS/control (written by train.py), and RUNS/late-eviction, RUNS/dms and RUNS/merge-at-once where they
are (with `scripts/quickstart.sh --compare`). Writes the exports RUNS/{cr4,control}-hf (and cr2-hf, cr3-hf of a run with a ramp),
results.json, table.md, loss.png, heads.png and segments.html. Every row is scored on the same held-out sequences, each
within one document; rows are shared among as many processes as there are cores, two at most.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from dmc import LLM, pretrained
from dmc.analysis.decisions import decisions
from dmc.analysis.plots import plot_heads, plot_training
from dmc.analysis.segments import segments_html
from dmc.extras import needed_by_script, required
from dmc.families import read_shape
from dmc.model import Decoder

with needed_by_script("the report"):
    from checkpoints.convert import load_hf_state
    from checkpoints.export_hf import export, export_plain
    from checkpoints.model_card import plain_card
    from data import tokens as token_files
    from data.batches import Sequences

CONTROL = "control (same tokens, no compression)"
COMPARED = {  # runs of as many tokens by other methods
    "late-eviction": "late eviction",
    "dms": "DMS",
    "merge-at-once": "DMC, merging at once",
}
SEGMENT_TOKENS = 400
ON_TOP = {  # name in the table: codec and its settings
    "TCQ, 4 bit": ("tcq", {"bits": 4}),
    "GEAR, 4 bit (published recipe)": ("gear", {"bits": 4, "backbone": "kcvt", "rank": 4, "outliers": 0.02}),
}


def main() -> None:
    """Export, score, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder with the runs retrofit and control")
    parser.add_argument("--context", type=int, default=0, help="tokens of a scored sequence (as in training)")
    parser.add_argument("--sequences", type=int, default=0, help="held-out sequences (as in training)")
    parser.add_argument("--all-budgets", action="store_true", help="evicting caches also with a share of the tokens as budget")
    args = parser.parse_args()
    try:
        required("the report", "matplotlib")
        report(args.runs, args.context, args.sequences, args.all_budgets)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def report(runs: Path, context: int, sequences: int, all_budgets: bool) -> None:
    """Everything that follows the two training runs."""
    started = time.perf_counter()
    disable_progress_bar()
    for name in ("retrofit", "control"):
        if not (runs / name / "checkpoints" / "final").is_dir():
            raise ValueError(f"{runs / name} holds no finished run: train it first (scripts/quickstart.sh does)")
    settings = json.loads((runs / "retrofit" / "config.json").read_text())
    base, window, init = settings["run"]["model"], settings["dmc"]["window"], settings["dmc"].get("init")
    method, target = settings["dmc"]["method"].upper(), settings["dmc"]["target_cr"]
    if method == "DMC" and window is not None:
        method = "DMC, late merging"
    context = context or settings["data"]["sequence_length"]
    held_out = _held_out(settings, context, sequences or settings["log"]["eval_sequences"])
    exports = {name: _export(runs / "retrofit", name, runs / f"{name}-hf") for name in _ratios(runs, settings)}
    last = exports[f"cr{target:g}"]

    jobs = [("base", 1.0, _prefilled, base, held_out)]
    jobs.append((CONTROL, 1.0, _prefilled, _export(runs / "control", "final", runs / "control-hf"), held_out))
    jobs += [(f"{method} CR {name[2:]}", float(name[2:]), _prefilled, path, held_out) for name, path in exports.items()]
    for name, label in COMPARED.items():
        if (runs / name / "checkpoints" / "final").is_dir():
            path = _export(runs / name, "final", runs / f"{name}-hf")
            jobs.append((f"{label}, CR {target:g}", target, _prefilled, path, held_out))
    for codec, (name, how) in ON_TOP.items():
        jobs.append((f"{method} CR {target:g} + {codec}", target, _decoded, last, held_out, name, how))
    if init:
        how = {"decisions": init, "target_cr": target}
        jobs.append((f"base + fitted decisions, nothing trained, CR {target:g}", target, _evicting, base, held_out, "gate", how))
    with _pool() as pool:
        rows = _rows(pool, jobs)
        final = next(row for row in rows if row["name"] == f"{method} CR {target:g}")
        entries = max(8, math.ceil(context / final["measured_cr"]))
        rows += _rows(
            pool,
            [
                (name, target, _evicting, base, held_out, policy, budget)
                for name, policy, budget in _budgets(entries, final["measured_cr"] if all_budgets else None)
            ],
        )

    results = {
        "rows": rows,
        "context": context,
        "sequences": len(held_out),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "commit": _commit(),
        "held_out_hash": _meta(runs)["held_out_hash"],
        "model_hash": _meta(runs)["model_hash"],
        "seconds": round(time.perf_counter() - started, 1),
    }
    table = _table(rows, context)
    (runs / "table.md").write_text(table)
    _draw(runs, base, last, final, held_out[0])
    (runs / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table)


# ------------------------------------------------------------------------------------------------ rows


def _prefilled(path: str | Path, held_out: list[list[int]]) -> dict:
    """Scored as a prompt: full-precision entries, held in bf16."""
    engine = LLM(path, codec="dense", codec_settings={"dtype": "bf16"})
    return _scored(engine.score(held_out, prompt_tokens=len(held_out[0])))


def _decoded(path: str | Path, held_out: list[list[int]], codec: str, settings: dict) -> dict:
    """Scored token by token through a cache that encodes its pages."""
    return _scored(LLM(path, codec=codec, codec_settings=settings).score(held_out, prompt_tokens=1))


def _scored(scores: list) -> dict:
    cached = sum(s.stats.cached_tokens for s in scores)
    entries = sum(int(s.stats.entries.sum()) for s in scores) / scores[0].stats.entries.numel()
    return {
        "perplexity": math.exp(-torch.cat([s.logprobs for s in scores]).double().mean().item()),
        "measured_cr": cached / entries,
        "bytes_per_token": sum(s.stats.held_bytes for s in scores) / cached,
        "bytes_ratio": sum(s.stats.dense_bytes for s in scores) / sum(s.stats.held_bytes for s in scores),
        "heads": (cached / torch.stack([s.stats.entries for s in scores]).sum(0)).tolist(),
    }


def _evicting(base: str, held_out: list[list[int]], policy: str, settings: dict) -> dict:
    """The base model scored token by token through a cache that really drops entries."""
    dense = dict(codec="dense", codec_settings={"dtype": "bf16"})
    return _scored(LLM(base, policy=policy, policy_settings=settings, **dense).score(held_out, prompt_tokens=1))


def _budgets(entries: int, cr: float | None) -> list[tuple[str, str, dict]]:
    """(name of a row, policy, settings) of caches that hold as many entries as the retrofit at the end, which is the kinder
    budget; with its CR also at every token."""
    half = entries // 2
    at_the_end = {
        "streaming": dict(sinks=4, recent=entries - 4),
        "h2o": dict(heavy=half, recent=entries - half),
        "tova": dict(budget=entries),
    }
    rows = []
    for policy, name in (("streaming", "StreamingLLM"), ("h2o", "H2O"), ("tova", "TOVA")):
        if cr is not None:
            rows.append((f"base + {name}, as many entries at every token", policy, {"share": 1 / cr}))
        rows.append((f"base + {name}, as many at the end", policy, at_the_end[policy]))
    return rows


def _pool() -> ProcessPoolExecutor:
    """A process for each core, two at most; the rows of a model this small use one thread."""
    workers = min(2, os.cpu_count() or 1)
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))


def _rows(pool: ProcessPoolExecutor, jobs: list[tuple]) -> list[dict]:
    """Rows in order, of (name, target CR, function, its arguments)."""
    pending = [pool.submit(function, *arguments) for _, _, function, *arguments in jobs]
    rows = []
    for (name, target, *_), result in zip(jobs, pending, strict=True):
        rows.append({"name": name, "target_cr": target, **result.result()})
        print(f"  {name}: perplexity {rows[-1]['perplexity']:.4f}, CR {rows[-1]['measured_cr']:.3f}", flush=True)
    return rows


def _table(rows: list[dict], context: int) -> str:
    control = next(row["perplexity"] for row in rows if row["name"] == CONTROL)
    lines = [
        f"Held-out text, context {context}. Bytes per token: keys and values of one token over all layers, everything held.",
        "",
        "| row | target CR | measured CR | perplexity | / control | / base | bytes per token | dense bf16 / held |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = rows[0]["perplexity"]
    for r in rows:
        cells = [
            r["name"],
            f"{r['target_cr']:g}",
            f"{r['measured_cr']:.2f}",
            f"{r['perplexity']:.3f}",
            f"{r['perplexity'] / control:.3f}",
            f"{r['perplexity'] / base:.3f}",
            f"{r['bytes_per_token']:.0f}",
            f"{r['bytes_ratio']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ files


def _held_out(settings: dict, context: int, sequences: int) -> list[list[int]]:
    data, model = settings["data"], settings["run"]["model"]
    tokenizer = token_files.load_tokenizer(model, read_shape(model).vocab_size)
    _, corpus = token_files.corpora(data["text"], data["held_out"], tokenizer, data["cache"], data.get("bos", "auto"))
    batch = Sequences(corpus, context).within_documents(sequences)
    return torch.cat([batch.tokens, batch.labels[:, -1:]], dim=1).tolist()


def _ratios(runs: Path, settings: dict) -> list[str]:
    """The run's checkpoints at integer ratios: cr2, cr3, ..., and the end of the hold under the target's name."""
    target = settings["dmc"]["target_cr"]
    passed = [f"cr{n}" for n in range(2, math.ceil(target))]
    return [name for name in passed if (runs / "retrofit" / "checkpoints" / name).is_dir()] + [f"cr{target:g}"]


def _export(run: Path, name: str, out: Path) -> Path:
    folder = run / "checkpoints"
    names = [p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    integers = sorted((n for n in names if n.startswith("cr")), key=lambda n: int(n[2:]))
    checkpoint = folder / ("final" if name not in names or name == (integers or [""])[-1] else name)
    tensors, meta = load_hf_state(checkpoint)
    shutil.rmtree(out, ignore_errors=True)
    common = dict(out=out, tokenizer_dir=meta["tokenizer_dir"], dtype=torch.float32)
    if not meta["compressed"]:
        return export_plain(tensors, meta["hf_config"], card=plain_card(out.name, meta), **common)
    keys = ("method", "window", "looks_ahead", "decision", "offset", "gain", "target_cr", "measured_cr")
    card = {"step": meta["step"], **meta["results"]}
    return export(tensors, meta["hf_config"], card=card, **{key: meta[key] for key in keys}, **common)


def _draw(runs: Path, base: str, model: Path, final: dict, text: list[int]) -> None:
    plot_training(runs / "retrofit" / "metrics.jsonl", runs / "loss.png", control_jsonl=runs / "control" / "metrics.jsonl")
    plot_heads(final["heads"], runs / "heads.png")
    llama = Decoder.load(model, dtype=torch.float32)
    if llama.config.method != "dmc":
        return  # no segments: nothing merges
    shown = torch.tensor(text[:SEGMENT_TOKENS])
    tokenizer = pretrained.load_tokenizer(base)
    pieces: list[str] = [tokenizer.decode([token]) for token in shown.tolist()]
    segments_html(pieces, decisions(llama, shown), runs / "segments.html")


def _meta(runs: Path) -> dict:
    return json.loads((runs / "retrofit" / "checkpoints" / "final" / "meta.json").read_text())


def _commit() -> str:
    run: Callable = subprocess.run
    done = run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
