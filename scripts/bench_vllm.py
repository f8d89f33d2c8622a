"""An exported model in vLLM next to the model that it was made from: requests that fit, and seconds per step of decode.

    python scripts/bench_vllm.py BASE EXPORT --counts 1024 2048 --admit 512 --contexts 2048 --batches 1 4 --output FILE.json
    python scripts/bench_vllm.py BASE BASE --settings '{"policy": "gate", "decisions": "FILE", "target_cr": 4}' --counts 1024

Runs with the interpreter of integrations/vllm/make_env.sh. Both are served by vLLM in fp32 with one thread, each in a process of
its own. ``--counts`` prints vLLM's own count of requests of so many tokens in the KV memory, ``--admit`` sends more requests than
fit and prints how many generated at a time, and ``--contexts`` measures steps of decode: the engines alternate, and the median
of the steps of a process counts. Prompts are cut out of this project's docs. The output has a row for every process, and is
written after each.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def main() -> None:
    """Runs every case, each in a process of its own, and prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="directory of the model with a dense cache")
    parser.add_argument("export", help="directory of the retrofitted model")
    parser.add_argument("--counts", type=int, nargs="*", default=[], help="tokens of a request, to count")
    parser.add_argument("--admit", type=int, nargs="*", default=[], help="tokens of a request, to admit")
    parser.add_argument("--contexts", type=int, nargs="*", default=[], help="tokens of a request, to time")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="requests that decode together")
    parser.add_argument("--memory", type=int, default=64, help="MiB of KV memory in the count of requests")
    parser.add_argument("--new", type=int, default=32, help="generated tokens per request")
    parser.add_argument("--repeats", type=int, default=3, help="processes per engine and batch")
    parser.add_argument("--settings", type=_object, help="dmc of additional_config, for EXPORT: JSON")
    parser.add_argument("--output", help="JSON file of the results")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(_case(json.loads(options.case))))
        return
    if options.new < 3 or options.repeats < 1 or min([1, *options.batches]) < 1:
        parser.error("--new must be at least 3, --repeats and --batches at least 1")
    if min([options.new + 1, *options.contexts]) <= options.new or min([17, *options.counts, *options.admit]) <= 16:
        parser.error(f"--contexts must be above --new {options.new}, --counts and --admit above 16")
    models = {"dense": options.base, "dmc": options.export}
    cases = []
    for kind, contexts in (("count", options.counts), ("admission", options.admit)):
        for context in contexts:
            cases += [
                {"kind": kind, "engine": name, "model": model, "context": context, "memory": options.memory}
                for name, model in models.items()
            ]
    for context in options.contexts:
        for batch in options.batches:
            case = {"kind": "decode", "context": context, "batch": batch, "new": options.new}
            cases += [case | {"engine": name, "model": model} for _ in range(options.repeats) for name, model in models.items()]
    for case in cases:
        if case["engine"] == "dmc" and options.settings is not None:
            case["settings"] = options.settings
    rows: list[dict] = []
    for case in cases:
        rows.append(_run(case))
        if options.output:
            _write(options, rows)


def _object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text} is not a JSON object")
    return value


def _write(options: argparse.Namespace, rows: list[dict]) -> None:
    import torch

    from dmc.evaluation.provenance import commit, hardware, versions

    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware("cuda" if torch.cuda.is_available() else "cpu"),
        "base": Path(options.base).name,
        "export": Path(options.export).name,
        "rows": rows,
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(facts, indent=1) + "\n")


def _run(case: dict) -> dict:
    """A case in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "", "", "--case", json.dumps(case)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    row = {name: value for name, value in case.items() if name not in ("model", "settings")}
    row |= json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def _case(case: dict) -> dict:
    from vllm import LLM, SamplingParams

    context, new, admission = case["context"], case.get("new", 16), case["kind"] != "decode"
    memory = case.get("memory", 1024) << 20
    llm = LLM(
        model=case["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=context,
        kv_cache_memory_bytes=memory,
        max_num_seqs=256 if admission else case["batch"],
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        block_size=None if case["engine"] == "dmc" else 32,
        seed=0,
        additional_config={"dmc": case["settings"]} if "settings" in case else {},
    )
    engine, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
    counted = _concurrency(engine, scheduler)
    if case["kind"] == "count":
        return {"concurrency": round(counted, 2)}
    batch = int(counted) + 3 if admission else case["batch"]
    text = "".join(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md")))
    tokens, length = llm.get_tokenizer().encode(text), context - new
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    for number in range(batch):
        start = number * 997 % max(1, len(tokens) - length)
        engine.add_request(str(number), {"prompt_token_ids": tokens[start : start + length]}, params)
    steps, most = [], 0
    while engine.has_unfinished_requests():
        wall, cpu = time.perf_counter(), time.process_time()
        engine.step()
        decoding = sum(request.num_computed_tokens >= length for request in scheduler.running)
        if decoding == batch == len(scheduler.running):
            steps.append((time.perf_counter() - wall, time.process_time() - cpu))
        most = max(most, decoding)
    figures = llm.collective_rpc("dmc_stats")[0] if case["engine"] == "dmc" else {}
    forced = {name: figures[name] for name in ("forced", "forced_in_prompts") if name in figures}
    if admission:
        return {"concurrency": round(counted, 2), "decoding": most} | forced
    walls, cpus = (sorted(part) for part in zip(*steps[1:], strict=True))
    middle = len(walls) // 2
    return {"steps": len(walls), "wall_ms": round(1e3 * walls[middle], 3), "cpu_ms": round(1e3 * cpus[middle], 3)} | forced


def _concurrency(engine: object, scheduler: object) -> float:
    """vLLM's count of requests of the largest length."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    return get_max_concurrency_for_kv_cache_config(engine.vllm_config, scheduler.kv_cache_config)


if __name__ == "__main__":
    main()
