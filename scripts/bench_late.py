"""Decode steps of late merging against merging at once, at equal entries: one CPU thread, steps in turns.

    python scripts/bench_late.py runs/late4-hf --output docs/results/late/decode.json

The directory is an export with late merging that was decided late. Its counterpart that merges at once has the same weights
without the window and without the look-ahead, and an offset (found by bisection) with which both hold the same number of
entries after the prompt. Both models then decode the same tokens, one step of the one and one step of the other in turn. The
ratio is that of the medians of CPU time, which other work on the machine disturbs less than the wall clock; that of the wall
clock is given as well. Prints one line per codec and batch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dmc import LLM  # noqa: E402
from dmc.engine.runner import Chunk  # noqa: E402
from dmc.evaluation.provenance import commit, hardware, model_hash, versions  # noqa: E402
from dmc.evaluation.sequences import read_sequences  # noqa: E402

CASES = (("dense", 1), ("dense", 8), ("int8", 1), ("tcq-4bit", 1), ("tcq-4bit", 8))


def main() -> None:
    """Wires only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="export with late merging, decided late")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens before the first step (1024)")
    parser.add_argument("--steps", type=int, default=256, help="timed steps of each model and case (256)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        result = measure(args.model, args.prompt, args.steps)
    except ValueError as error:
        print(f"bench_late: {error}", file=sys.stderr)
        sys.exit(2)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(model: Path, prompt: int, steps: int) -> dict:
    """Rows of all cases, and what they were made with.

    Raises:
        ValueError: if the model has no late merging or the text is too short.
    """
    text = read_sequences("stdlib", model, length=prompt + steps + 1, count=8).tokens
    rows, offsets = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for codec, batch in CASES:
            once = Path(folder) / str(batch)
            if batch not in offsets:
                offsets[batch] = at_once(model, once, text[:batch, :prompt].tolist())
            rows.append(case([model, once], codec, batch, text[:batch].tolist(), prompt, steps))
            print(json.dumps(rows[-1]), flush=True)
    return {
        "rows": rows,
        "prompt": prompt,
        "steps": steps,
        "offsets_at_once": offsets,
        "model_hash": model_hash(model),
        "threads": 1,
        "hardware": hardware("cpu"),
        "commit": commit(),
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
    }


def at_once(model: Path, out: Path, prompts: list[list[int]]) -> float:
    """Writes the counterpart that merges at once and holds as many entries of these prompts → its offset."""
    config = json.loads((model / "config.json").read_text())
    if config.get("dmc", {}).get("decide") != "late" or config["dmc"].get("method", "dmc") != "dmc":
        raise ValueError(f"{model} is not an export with late merging that was decided late")
    shutil.copytree(model, out)
    heads, weights = config["num_key_value_heads"], load_file(model / "model.safetensors")
    for name in [name for name in weights if ".decision." in name]:
        weights[name] = weights[name][: 2 * heads].contiguous()
    for name in [name for name in weights if name.endswith("decision.bias")]:
        del weights[name]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    wanted, (low, high) = _entries(model, prompts), (-40.0, 40.0)
    for _ in range(14):
        middle = (low + high) / 2
        config["dmc"] = {key: config["dmc"][key] for key in ("decision", "target_cr", "measured_cr")} | {"offset": middle}
        (out / "config.json").write_text(json.dumps(config))
        low, high = (low, middle) if _entries(out, prompts) > wanted else (middle, high)
    return middle


def _entries(model: Path, prompts: list[list[int]]) -> int:
    llm = LLM(model, device="cpu", dtype="fp32", max_batch=len(prompts))
    return sum(int(llm.cache.entries(slot).sum()) for slot in _filled(llm, prompts))


def _filled(llm: LLM, prompts: list[list[int]]) -> list[int]:
    slots = []
    for tokens in prompts:
        prompt = llm.cache.prompt()
        for start in range(0, len(tokens), 512):
            llm.engine.runner.step([], [], [], [Chunk(prompt, tokens[start : start + 512])])
        slots.append(llm.cache.load(prompt))
    return slots


def case(models: list[Path], codec: str, batch: int, texts: list[list[int]], prompt: int, steps: int) -> dict:
    """Median milliseconds of CPU of a step (model and logits) of late merging and of merging at once, in turns."""
    llms = [LLM(model, codec=codec, device="cpu", dtype="fp32", max_batch=batch) for model in models]
    slots = [_filled(llm, [text[:prompt] for text in texts]) for llm in llms]
    before = [_mean_entries(*pair) for pair in zip(llms, slots, strict=True)]
    taken, wall = ([[], []] for _ in range(2))
    for step in range(steps):
        position = prompt + step
        tokens = [text[position] for text in texts]
        for which in (0, 1) if step % 2 else (1, 0):
            runner, started, clock = llms[which].engine.runner, time.process_time(), time.perf_counter()
            runner.logits(runner.step(slots[which], tokens, [position] * batch)[0])
            taken[which].append((time.process_time() - started) * 1e3)
            wall[which].append((time.perf_counter() - clock) * 1e3)
    after = [_mean_entries(*pair) for pair in zip(llms, slots, strict=True)]
    late, once, late_wall, once_wall = (statistics.median(each[8:]) for each in (*taken, *wall))  # the first steps warm up
    quarters = [[round(x, 4) for x in statistics.quantiles(each[8:], n=4)[::2]] for each in taken]
    return {
        "codec": codec,
        "batch": batch,
        "late_ms": round(late, 4),
        "at_once_ms": round(once, 4),
        "ratio": round(late / once, 4),
        "ratio_wall": round(late_wall / once_wall, 4),
        "quarters_ms": quarters,
        "entries_before": before,
        "entries_after": after,
    }


def _mean_entries(llm: LLM, slots: list[int]) -> float:
    """Per head."""
    return round(sum(float(llm.cache.entries(slot).double().mean()) for slot in slots) / len(slots), 1)


if __name__ == "__main__":
    main()
