"""Tokens per second of the engine and of others, on the same model and prompts: `transformers.generate`, vLLM, llama.cpp.

    python scripts/bench_serve.py DIR --contexts 512 2048 --batches 1 8 --new 64 --output serve.json
    python scripts/bench_serve.py DIR --engines dmc vllm llama.cpp --vllm-python build/vllm/bin/python \\
        --llama-python build/llama/bin/python --gguf FILE.gguf

All generate greedily from prompts cut out of this project's own docs, of one length or, with ``--lengths unequal``, from a
quarter of the context up to the whole of it, which transformers pads on the left. Wall seconds and the
process's CPU seconds are both printed: on a machine that others use, the second compares and the first does not. vLLM and
llama.cpp run in processes of interpreters that have them (integrations/vllm/make_env.sh; `pip install xllamacpp`).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dmc import LLM, SamplingParams, pretrained
from dmc.engine.llm import DTYPES
from dmc.evaluation.provenance import commit, hardware, versions

ROOT = Path(__file__).parents[1]
ENGINES = ("transformers", "dmc", "vllm", "vllm-eager", "llama.cpp")
PEER_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Engine:
    """An engine with the model loaded.

    Args:
        generate: runs prompts, lists of token ids, for so many new tokens.
        held: bytes of the cache after that; None: not known.
    """

    version: str | None = None

    def __init__(self, generate: Callable[[list[list[int]], int], object], held: Callable[[], int | None] = lambda: None) -> None:
        self.generate, self.held = generate, held

    def run(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        """Wall and CPU seconds of a run."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.generate(prompts, new)
        return time.perf_counter() - wall, time.process_time() - cpu

    def close(self) -> None:
        """Frees the model."""
        self.generate = self.held = None
        gc.collect()


class Peer(Engine):
    """An engine in a process of another interpreter (scripts/bench_peer.py).

    Raises:
        ValueError: if it does not start, ends early, or generates another number of tokens.
    """

    def __init__(self, python: str, *arguments: object, threads: int) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        try:
            self.process = subprocess.Popen(
                [python, str(ROOT / "scripts" / "bench_peer.py"), *map(str, arguments), "--threads", str(threads)],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
        except OSError as error:
            raise ValueError(f"{python} cannot be started: {error.strerror}") from None
        self.version = self._answer()["version"]
        self.held = lambda: None

    def run(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        """See `Engine.run`; of the other process."""
        with contextlib.suppress(BrokenPipeError):  # `_answer` says that it has ended
            self.process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
            self.process.stdin.flush()
        answer = self._answer()
        if answer["made"] != [new] * len(prompts):
            raise ValueError(f"{self.process.args[2]} did not generate {new} tokens for each prompt")
        return answer["wall"], answer["cpu"]

    def close(self) -> None:
        """Ends the process, by force if it takes a minute."""
        with contextlib.suppress(BrokenPipeError):  # of a process that has ended already
            self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"{' '.join(self.process.args[:3])} ended with code {self.process.wait(60)}; its messages are above")
        return json.loads(line)


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
        facts = {
            "command": shlex.join(["python", *sys.argv]),
            "commit": commit(),
            "hardware": hardware("cpu"),
            "versions": versions(),
            "model": Path(options.directory).name,
            "new": options.new,
            "rows": rows,
        }
        Path(options.output).write_text(json.dumps(facts, indent=1) + "\n")


def _case(options: argparse.Namespace, context: int, batch: int, kind: str) -> list[dict]:
    """One context, batch and kind of lengths: each engine, prompt alone (one new token) and the whole.

    The engines take turns, and the least time of each counts: a machine that others use is not as fast all the time.
    """
    prompts, engines = _prompts(options.directory, context, batch, kind), _engines(options)
    times = {name: [] for name, _ in engines}
    held_bytes, version = {}, {}
    for _ in range(options.repeats):
        for name, load in engines:
            engine = load(batch)
            try:
                engine.run(prompts, 2)  # warm: first touches of memory and code
                times[name].append((engine.run(prompts, 1), engine.run(prompts, options.new)))
                held_bytes[name], version[name] = engine.held(), engine.version
            finally:
                engine.close()
    made = batch * (options.new - 1)
    rows = []
    for name, pairs in times.items():
        prompt, whole = (min((pair[which] for pair in pairs), key=lambda pair: pair[1]) for which in (0, 1))
        rows.append(
            {
                "engine": name,
                "context": context,
                "batch": batch,
                "lengths": kind,
                "wall_tokens_per_s": batch * options.new / whole[0],
                "cpu_tokens_per_s": batch * options.new / whole[1],
                "cpu_prompt_s": prompt[1],
                "cpu_decode_tokens_per_s": made / max(1e-9, whole[1] - prompt[1]),
                "cpu_s": [[prompt[1], whole[1]] for prompt, whole in pairs],
                "held_bytes": held_bytes[name],
                "version": version[name],
            }
        )
    return rows


def _engines(options: argparse.Namespace) -> list[tuple[str, Callable[[int], Engine]]]:
    """Names of the engines, and what loads each for a batch."""

    def ours(codec: str, dtype: str, batch: int) -> Engine:
        llm = LLM(
            options.directory,
            codec=codec,
            max_batch=batch,
            device="cpu",
            dtype=dtype,
            prefill_tokens=options.prefill_tokens,
            kv_memory="auto",
        )  # as `dmc serve` has it
        last = []

        def generate(prompts: list[list[int]], new: int) -> None:
            last[:] = llm.generate(prompts, SamplingParams(max_tokens=new, temperature=0, ignore_eos=True))

        return Engine(generate, lambda: sum(output.stats.held_bytes for output in last))

    def transformers(dtype: str, _: int) -> Engine:
        model = pretrained.load_model(options.directory, DTYPES[dtype])

        def generate(prompts: list[list[int]], new: int) -> None:
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            with torch.no_grad():
                out = model.generate(
                    ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
                )
            assert out.shape[1] == ids.shape[1] + new

        return Engine(generate)

    def peer(python: str, name: str, model: str, dtype: str, batch: int) -> Engine:
        tokens = max(options.contexts) + options.new
        return Peer(
            python, name, model, "--batch", batch, "--tokens", tokens, "--dtype", PEER_DTYPES[dtype], threads=options.threads
        )

    engines: list[tuple[str, Callable[[int], Engine]]] = []
    for name in options.engines:
        if name == "llama.cpp":  # its arithmetic is that of the file
            load = partial(peer, options.llama_python, name, options.gguf, "fp32")
            engines.append((f"llama.cpp {Path(options.gguf).stem}", load))
        for dtype in options.dtypes if name != "llama.cpp" else ():
            if name == "dmc":
                engines += [(f"dmc {dtype} {codec}", partial(ours, codec, dtype)) for codec in options.codecs]
            elif name == "transformers":
                engines.append((f"transformers {dtype}", partial(transformers, dtype)))
            else:
                engines.append((f"{name} {dtype}", partial(peer, options.vllm_python, name, options.directory, dtype)))
    return engines


def _prompts(directory: str, context: int, batch: int, kind: str) -> list[list[int]]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    tokens = pretrained.load_tokenizer(directory)(text)["input_ids"]
    tokens *= -(-context * batch // len(tokens))
    least = context if kind == "equal" else context // 4
    lengths = [least + (context - least) * i // max(1, batch - 1) for i in range(batch)]
    return [tokens[i * context : i * context + length] for i, length in enumerate(lengths)]


def _print(rows: list[dict]) -> None:
    first = rows[0]["engine"].split()[0]
    print(
        "| context | batch | lengths | engine | tokens / s (wall) | tokens / CPU s | prompt, CPU s | decode, tokens / CPU s | "
        f"of {first} |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        alike = [other for other in rows if all(other[name] == row[name] for name in ("context", "batch", "lengths"))]
        base = max(other["cpu_tokens_per_s"] for other in alike if other["engine"].startswith(first))
        print(
            f"| {row['context']} | {row['batch']} | {row['lengths']} | {row['engine']} | {row['wall_tokens_per_s']:.2f} | "
            f"{row['cpu_tokens_per_s']:.2f} | {row['cpu_prompt_s']:.2f} | {row['cpu_decode_tokens_per_s']:.2f} | "
            f"{row['cpu_tokens_per_s'] / base:.2f} x |"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="Hugging Face directory of a model")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["transformers", "dmc"],
        choices=ENGINES,
        help="vllm: compiled, as it starts; vllm-eager: with enforce_eager. Ratios are to the first one",
    )
    parser.add_argument("--vllm-python", help="interpreter that has vLLM, of integrations/vllm/make_env.sh")
    parser.add_argument("--llama-python", help="interpreter that has xllamacpp")
    parser.add_argument("--gguf", help="file of the same weights for llama.cpp, such as scripts/gguf_fp32.py writes")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048], help="tokens of a prompt")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at a time")
    parser.add_argument("--lengths", nargs="+", default=["equal", "unequal"], choices=["equal", "unequal"], help="of prompts")
    parser.add_argument("--codecs", nargs="+", default=["dense", "int8", "tcq"], help="of ours")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["fp32"],
        choices=["fp32", "bf16"],
        help="of the arithmetic, of all engines but llama.cpp; ratios are to the faster of the first engine",
    )
    parser.add_argument("--new", type=int, default=64, help="tokens generated after each prompt")
    parser.add_argument("--repeats", type=int, default=2, help="of each measurement, in turns; the least CPU time counts")
    parser.add_argument("--prefill-tokens", type=int, default=512, help="of ours")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    needs = {"vllm": ("vllm_python",), "vllm-eager": ("vllm_python",), "llama.cpp": ("llama_python", "gguf")}
    for engine in options.engines:
        for name in needs.get(engine, ()):
            if not getattr(options, name):
                parser.error(f"--engines {engine} needs --{name.replace('_', '-')}")
    return options


if __name__ == "__main__":
    main()
