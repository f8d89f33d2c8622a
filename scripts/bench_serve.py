"""Tokens a second of the engine and of `transformers.generate`, on the same model and prompts.

    python scripts/bench_serve.py DIR --contexts 512 2048 --batches 1 8 --new 64 --output docs/results/serve.json

Both generate greedily from prompts cut out of this project's own docs, of one length or, with ``--lengths unequal``, from a
quarter of the context up to the whole of it, which transformers pads on the left. Wall seconds and the
process's CPU seconds are both printed: on a machine that others use, the second compares and the first does not.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dmc import LLM, SamplingParams, pretrained
from dmc.engine.llm import DTYPES

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Runs every case and prints a table; writes JSON if asked to."""
    options = _options()
    torch.set_num_threads(options.threads)
    rows = []
    try:
        for context in options.contexts:
            for batch in options.batches:
                for kind in options.lengths if batch > 1 else ["equal"]:
                    rows += _case(options, context, batch, kind)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    _print(rows)
    if options.output:
        facts = {"model": Path(options.directory).name, "threads": options.threads, "machine": platform.processor() or
                 platform.machine(), "torch": torch.__version__, "new": options.new, "rows": rows}
        Path(options.output).write_text(json.dumps(facts, indent=1) + "\n")


def _case(options: argparse.Namespace, context: int, batch: int, kind: str) -> list[dict]:
    """One context, batch and kind of lengths: each engine, prompt alone (one new token) and the whole.

    The engines take turns, and the least time of each counts: a machine that others use is not as fast all the time.
    """
    prompts, engines = _prompts(options.directory, context, batch, kind), _engines(options)
    times = {name: [] for name, _ in engines}
    held_bytes = {}
    for _ in range(options.repeats):
        for name, load in engines:
            run, held = load()
            run(prompts, 2)  # warm: first touches of memory and code
            times[name].append((_timed(partial(run, prompts, 1)), _timed(partial(run, prompts, options.new))))
            held_bytes[name] = held()
            run = held = None
            gc.collect()
    made = batch * (options.new - 1)
    rows = []
    for name, pairs in times.items():
        prompt, whole = (min((pair[which] for pair in pairs), key=lambda pair: pair[1]) for which in (0, 1))
        rows.append({
            "engine": name, "context": context, "batch": batch, "lengths": kind,
            "wall_tokens_per_s": batch * options.new / whole[0], "cpu_tokens_per_s": batch * options.new / whole[1],
            "cpu_prompt_s": prompt[1], "cpu_decode_tokens_per_s": made / max(1e-9, whole[1] - prompt[1]),
            "held_bytes": held_bytes[name],
        })
    return rows


def _engines(options: argparse.Namespace) -> list[tuple[str, Callable]]:
    def ours(codec: str, dtype: str) -> Callable:
        def load() -> tuple[Callable, Callable]:
            llm = LLM(options.directory, codec=codec, max_batch=max(options.batches), device="cpu", dtype=dtype,
                      prefill_tokens=options.prefill_tokens, kv_memory="auto")  # as `dmc serve` has it
            last = []

            def run(prompts: list[list[int]], new: int) -> None:
                last[:] = llm.generate(prompts, SamplingParams(max_tokens=new, temperature=0, ignore_eos=True))

            return run, lambda: sum(output.stats.held_bytes for output in last)
        return load

    def theirs(dtype: str) -> tuple[Callable, Callable]:
        model = pretrained.load_model(options.directory, DTYPES[dtype])

        def run(prompts: list[list[int]], new: int) -> None:
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            with torch.no_grad():
                out = model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                                     pad_token_id=0)
            assert out.shape[1] == ids.shape[1] + new

        return run, lambda: None

    engines = [(f"transformers {dtype}", partial(theirs, dtype)) for dtype in options.dtypes]
    return engines + [(f"dmc {dtype} {codec}", ours(codec, dtype)) for dtype in options.dtypes for codec in options.codecs]


def _prompts(directory: str, context: int, batch: int, kind: str) -> list[list[int]]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    tokens = pretrained.load_tokenizer(directory)(text)["input_ids"]
    tokens *= -(-context * batch // len(tokens))
    least = context if kind == "equal" else context // 4
    lengths = [least + (context - least) * i // max(1, batch - 1) for i in range(batch)]
    return [tokens[i * context : i * context + length] for i, length in enumerate(lengths)]


def _timed(what: Callable) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    what()
    return time.perf_counter() - wall, time.process_time() - cpu


def _print(rows: list[dict]) -> None:
    print("| context | batch | lengths | engine | tokens / s (wall) | tokens / CPU s | prompt, CPU s | decode, tokens / CPU s | "
          "of transformers |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        alike = [other for other in rows if all(other[name] == row[name] for name in ("context", "batch", "lengths"))]
        base = max(other["cpu_tokens_per_s"] for other in alike if other["engine"].startswith("transformers"))
        print(f"| {row['context']} | {row['batch']} | {row['lengths']} | {row['engine']} | {row['wall_tokens_per_s']:.2f} | "
              f"{row['cpu_tokens_per_s']:.2f} | {row['cpu_prompt_s']:.2f} | {row['cpu_decode_tokens_per_s']:.2f} | "
              f"{row['cpu_tokens_per_s'] / base:.2f} x |")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="Hugging Face directory of a model")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048], help="tokens of a prompt")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at a time")
    parser.add_argument("--lengths", nargs="+", default=["equal", "unequal"], choices=["equal", "unequal"], help="of prompts")
    parser.add_argument("--codecs", nargs="+", default=["dense", "int8", "tcq"], help="of ours")
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=["fp32", "bf16"],
                        help="of the arithmetic, of all engines; ours are held against the faster of theirs")
    parser.add_argument("--new", type=int, default=64, help="tokens generated after each prompt")
    parser.add_argument("--repeats", type=int, default=2, help="of each measurement, in turns; the least CPU time counts")
    parser.add_argument("--prefill-tokens", type=int, default=512, help="of ours")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--output", help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
