"""A hard budget of entries per head: memory over a long generated text, and quality, next to eviction at the same bytes.

    python scripts/budget_stream.py runs/late4-hf --tokens 10000 --output docs/results/late/budget.jsonl

The export with late merging runs with --max-entries N. The base model that was never retrofitted runs with fitted decisions
(policy gate, dropping and merging) under the same bound, and with StreamingLLM, H2O and TOVA whose budgets hold as many bytes
as N + window entries of late merging. All store bf16 in dense pages. Three measures, each one line of the output:

held-out    windows of held-out text: tokens after the prompt go through the cache one by one; perplexity, KL to the base.
generated   continuations of prompts by each method, up to the trained length; perplexity of that text under the base model.
stream      one text of --tokens generated tokens on a pool of exactly the bound (where there is one): pages, entries and
            preemptions along the way. It is longer than the model's positions: config.json of a copy allows them, and tokens
            keep their positions, which the model has not seen in training. So this is a measure of memory, not of quality.

A line that is in the output already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.stdlib import documents, split  # noqa: E402
from dmc import LLM, SamplingParams  # noqa: E402
from dmc.evaluation.measure import measure  # noqa: E402
from dmc.evaluation.provenance import commit, hardware, model_hash, versions  # noqa: E402
from dmc.evaluation.reference import Reference, reference  # noqa: E402
from dmc.evaluation.windows import Windows, cut_windows  # noqa: E402
from dmc.model import read_config  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TRAINED = 1024  # tokens of the sequences that the base model was trained on
POINTS = 20  # of the stream, at which memory is recorded


def main() -> None:
    """Wires only."""
    args = _arguments()
    torch.set_num_threads(1)
    try:
        settings = methods(args)
        known = _known(args.output)
        for name in args.only or settings:
            model, given = settings[name]
            for kind, run in (("held-out", held_out), ("generated", generated), ("stream", stream)):
                if (name, kind) in known or kind not in args.measures:
                    continue
                row = {"method": name, "measure": kind, **run(args, model, given), **_origin(model, given)}
                with args.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print({key: value for key, value in row.items() if not isinstance(value, list | dict)}, flush=True)
    except (ValueError, KeyError, OSError) as error:
        print(f"budget_stream: {error}", file=sys.stderr)
        sys.exit(2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="export with late merging")
    parser.add_argument("--base", type=Path, default=ROOT / "checkpoints/base", help="the uncompressed model (checkpoints/base)")
    parser.add_argument(
        "--decisions",
        type=Path,
        default=ROOT / "checkpoints/decisions/base.safetensors",
        help="fitted decisions of the base (checkpoints/decisions/base.safetensors)",
    )
    parser.add_argument("--max-entries", type=int, default=256, help="of each head behind the window (256)")
    parser.add_argument("--target-cr", type=float, default=3.0, help="of the fitted decisions at 1,024 tokens (3)")
    parser.add_argument("--tokens", type=int, default=10_000, help="of the stream (10000)")
    parser.add_argument("--bytes-per-head", type=int, help="of StreamingLLM, H2O and TOVA (what N + window entries take)")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="methods (all)")
    parser.add_argument(
        "--measures",
        nargs="+",
        default=["held-out", "generated", "stream"],
        choices=["held-out", "generated", "stream"],
        help="held-out generated stream (all)",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSONL; lines are added")
    return parser.parse_args()


def methods(args: argparse.Namespace) -> dict[str, tuple[Path, dict]]:
    """Model and settings of `LLM` of each method."""
    config, window = read_config(args.model), read_config(args.model).window
    if config.method != "dmc" or window is None:
        raise ValueError(f"{args.model} is not an export with late merging")
    entry, most = 4 * config.head_dim, args.max_entries
    held = (most + window) * entry + 8 * window  # bytes of a head: keys and values in bf16, two numbers per token of the ring
    suffix = "" if args.bytes_per_head is None else f", {args.bytes_per_head:,} bytes per head"
    held = held if args.bytes_per_head is None else args.bytes_per_head
    share, scored = held // (entry + 4), held // (entry + 8)  # entries that carry a position, or a position and a score
    bound = "" if most == 256 else f", N = {most}"
    gate = {"policy": "gate", "decisions": str(args.decisions), "target_cr": args.target_cr, "max_entries": most}
    return {
        "full": (args.base, {"policy": "full"}),
        f"late merging{bound}": (args.model, {"max_entries": most}),
        f"gate, merging{bound}": (args.base, gate | {"policy_settings": {"merge": True}}),
        f"gate, dropping{bound}": (args.base, gate),
        f"StreamingLLM{suffix}": (args.base, {"policy": "streaming", "policy_settings": {"sinks": 4, "recent": share - 4}}),
        f"H2O{suffix}": (args.base, {"policy": "h2o", "policy_settings": {"heavy": scored // 2, "recent": scored - scored // 2}}),
        f"TOVA{suffix}": (args.base, {"policy": "tova", "policy_settings": {"budget": scored}}),
    }


def _load(model: Path, given: dict, **more: object) -> LLM:
    return LLM(model, codec="dense", codec_settings={"dtype": "bf16"}, device="cpu", dtype="fp32", **given | more)


def held_out(args: argparse.Namespace, model: Path, given: dict) -> dict:
    """Perplexity and KL on held-out text, 8 windows of 512 + 512 tokens."""
    windows = _windows(args.base, prompt=512, scored=512, count=8)
    wanted: Reference = reference(args.base, windows, store=None)
    found = measure(_load(model, given, max_batch=8), windows, reference=wanted)
    return {
        "perplexity": found.perplexity,
        "base_perplexity": found.base_perplexity,
        "kl": found.kl,
        "kl_stderr": found.kl_stderr,
        "cr_end": found.cr,
        "held_bytes_end": found.held_bytes_end,
        "prompt": 512,
        "scored": 512,
        "windows": 8,
    }


def generated(args: argparse.Namespace, model: Path, given: dict) -> dict:
    """Perplexity under the base model of texts that the method generates: 16 prompts of 128 tokens, up to `TRAINED`."""
    windows = _windows(args.base, prompt=128, scored=1, count=16)
    prompts = windows.tokens[:, :128].tolist()
    params = [
        SamplingParams(max_tokens=TRAINED - 128, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(len(prompts))
    ]
    outputs = _load(model, given, max_batch=len(prompts)).generate(prompts, params)
    texts = [output.prompt_token_ids + output.token_ids for output in outputs]
    scores = LLM(args.base, policy="full", device="cpu", dtype="fp32").score(texts, prompt_tokens=128)
    logprobs = torch.stack([score.logprobs[127:] for score in scores]).double()
    later = logprobs[:, logprobs.shape[1] // 2 :]
    return {
        "perplexity_under_base": math.exp(-logprobs.mean()),
        "perplexity_under_base_second_half": math.exp(-later.mean()),
        "cr_end": sum(output.stats.cr for output in outputs) / len(outputs),
        "prompts": len(prompts),
        "prompt": 128,
        "new_tokens": TRAINED - 128,
        "temperature": 1.0,
    }


def stream(args: argparse.Namespace, model: Path, given: dict) -> dict:
    """Memory over one long text."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / model.name
        shutil.copytree(model, copy)
        config = json.loads((copy / "config.json").read_text())
        config["max_position_embeddings"] = args.tokens + TRAINED
        (copy / "config.json").write_text(json.dumps(config))
        if "decisions" in given:
            given = given | {"decisions": _for_model(given["decisions"], copy)}
        llm = _load(copy, given, max_batch=1)
        if llm.cache.policy.max_entries is not None:  # not a page more than admission reserves for any length
            memory = llm.cache.worst_pages(args.tokens + TRAINED) * llm.cache.page_bytes
            llm = _load(copy, given, max_batch=1, kv_memory=memory)
        prompt = _windows(args.base, prompt=128, scored=1, count=1).tokens[0, :128].tolist()
        return {"tokens": args.tokens, **_streamed(llm, prompt, args.tokens)}


def _streamed(llm: LLM, prompt: list[int], tokens: int) -> dict:
    engine, cache, points = llm.engine, llm.cache, []
    (sequence,) = llm.sequences(prompt, SamplingParams(max_tokens=tokens, temperature=1.0, seed=0, ignore_eos=True))
    engine.add(sequence)
    peak, recorded, started = 0, 0, time.perf_counter()
    while engine.busy:
        engine.step()
        peak = max(peak, cache.used_pages)
        count = len(sequence.tokens)
        if sequence.slot is not None and count >= recorded + max(1, tokens // POINTS):
            entries, recorded = llm.cache.entries(sequence.slot), count
            points.append(
                {
                    "tokens": count,
                    "pages": cache.used_pages,
                    "entries_mean": round(float(entries.double().mean()), 1),
                    "entries_max": int(entries.max()),
                    "held_bytes": sum(llm.cache.held(sequence.slot).values()),
                    "seconds": round(time.perf_counter() - started, 1),
                }
            )
    output = sequence.output()
    return {
        "finish_reason": output.finish_reason,
        "generated": len(output.token_ids),
        "preemptions": engine.preemptions,
        "pages_peak": peak,
        "pages_limit": cache.page_limit,
        "page_bytes": cache.page_bytes,
        "points": points,
    }


def _for_model(decisions: str, copy: Path):  # noqa: ANN202 - FittedDecisions
    """The decisions for the copy, whose fingerprint differs by the positions of its config alone."""
    from dataclasses import replace

    from dmc.fitted import FittedDecisions

    return replace(FittedDecisions.load(decisions), model=model_hash(copy))


def _windows(base: Path, *, prompt: int, scored: int, count: int) -> Windows:
    _, texts = split(documents(("guide",)))
    return cut_windows([text.text for text in texts], base, name="stdlib, held out", prompt=prompt, scored=scored, count=count)


def _known(path: Path) -> set[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["method"], row["measure"]) for row in rows}


def _origin(model: Path, given: dict) -> dict:
    settings = {name: Path(value).name if name == "decisions" else value for name, value in given.items()}
    return {
        "model": model.resolve().name,
        "model_hash": model_hash(model),
        "settings": settings,
        "hardware": hardware("cpu"),
        "commit": commit(),
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
    }


if __name__ == "__main__":
    main()
