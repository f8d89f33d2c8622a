"""CPU time of whole runs by two checkouts of this project, in turns on one machine.

    git worktree add /tmp/before COMMIT
    python scripts/bench_commits.py /tmp/before . --models DIR ... --batches 1 8 --threads 1 2 --output docs/results/NAME.json

One process per checkout; while one runs, the other waits. Prompts are cut out of docs/ and continued greedily. The least
CPU time of the repeats counts, of all threads together; it changes less than seconds of the clock on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}  # threads that spin while they wait would count as work


def main() -> None:
    """Prints a table, and writes JSON if asked to."""
    options = _options()
    checkouts = [Path(each).resolve() for each in options.checkouts]
    rows = []
    for model in options.models:
        workers = [_Worker(checkout, model, options) for checkout in checkouts]
        for codec in options.codecs:
            for threads in options.threads:
                for batch in options.batches:
                    case = {"model": Path(model).name, "codec": codec, "threads": threads, "batch": batch}
                    times = [[worker.ask(case) for worker in workers] for _ in range(options.repeats)]
                    rows.append(case | {name: [min(turn[i][name] for turn in times) for i in range(2)] for name in times[0][0]})
                    print(json.dumps(rows[-1]), flush=True)
        for worker in workers:
            worker.end()
    _print(rows)
    if options.output:
        facts = {
            "command": " ".join(["python", *sys.argv]),
            "commits": [_commit(each) for each in checkouts],
            "machine": _machine(),
            "context": options.context,
            "new": options.new,
            "dtype": options.dtype,
            "repeats": options.repeats,
            "rows": rows,
        }
        Path(options.output).write_text(json.dumps(facts, indent=1) + "\n")


class _Worker:
    """A process that measures with the code of one checkout."""

    def __init__(self, checkout: Path, model: str, options: argparse.Namespace) -> None:
        command = [
            sys.executable,
            __file__,
            "--worker",
            "--models",
            model,
            "--context",
            str(options.context),
            "--new",
            str(options.new),
            "--dtype",
            options.dtype,
        ]
        self._process = subprocess.Popen(
            command,
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": str(checkout)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, case: dict) -> dict:
        """Seconds of CPU of a case: the prompt, the whole run; and ms of CPU of a decode step."""
        print(json.dumps(case), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a measuring process ended with {self._process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def _work(options: argparse.Namespace) -> None:
    """Measures the cases that come on standard input, one JSON object a line."""
    import torch

    from dmc import LLM, SamplingParams, pretrained

    directory = options.models[0]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    tokens = pretrained.load_tokenizer(directory)(text)["input_ids"]
    llm, loaded = None, None
    params = SamplingParams(max_tokens=options.new, temperature=0, ignore_eos=True)
    for line in sys.stdin:
        case = json.loads(line)
        torch.set_num_threads(case["threads"])
        if loaded != case["codec"]:
            llm, loaded = LLM(directory, codec=case["codec"], max_batch=64, device="cpu", dtype=options.dtype), case["codec"]
            llm.generate([tokens[:9]], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))  # warm
        sequences = [
            sequence
            for i in range(case["batch"])
            for sequence in llm.sequences(tokens[i * options.context : (i + 1) * options.context], params)
        ]
        for sequence in sequences:
            llm.engine.add(sequence)
        started, first, steps = time.process_time(), None, 0
        while llm.engine.busy:
            llm.engine.step()
            if first is None and all(sequence.tokens for sequence in sequences):
                first = time.process_time()
            elif first is not None:
                steps += 1
        ended = time.process_time()
        step = 1e3 * (ended - first) / steps
        print(json.dumps({"prompt_s": first - started, "step_ms": step, "whole_s": ended - started}), flush=True)


def _print(rows: list[dict]) -> None:
    print("| model | codec | threads | batch | prompt, CPU s | decode step, CPU ms | whole run, CPU s | whole run, change |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        figures = [
            " → ".join(f"{value:.{digits}f}" for value in row[name])
            for name, digits in (("prompt_s", 2), ("step_ms", 1), ("whole_s", 2))
        ]
        change = row["whole_s"][1] / row["whole_s"][0] - 1
        case = [str(row[name]) for name in ("model", "codec", "threads", "batch")]
        print("| " + " | ".join([*case, *figures, f"{change:+.0%}"]) + " |")


def _commit(checkout: Path) -> str:
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, text=True).strip()


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkouts", nargs="*", help="before and after: two directories of this repository")
    parser.add_argument("--models", nargs="+", required=True, help="Hugging Face directories")
    parser.add_argument("--codecs", nargs="+", default=["dense"], help="of the cache")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at a time")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="of torch")
    parser.add_argument("--context", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens generated after each prompt")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of the arithmetic")
    parser.add_argument("--repeats", type=int, default=2, help="of each measurement, in turns")
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options)
        sys.exit(0)
    if len(options.checkouts) != 2:
        parser.error("two checkouts are needed: before and after")
    if options.new < 2 or options.context < 1 or options.repeats < 1 or min(*options.batches, *options.threads, 1) < 1:
        parser.error("--new must be at least 2, the other numbers at least 1: a decode step follows the first token")
    for missing in (path for path in [*options.checkouts, *options.models] if not Path(path).is_dir()):
        parser.error(f"{missing} is not a directory")
    return options


if __name__ == "__main__":
    main()
