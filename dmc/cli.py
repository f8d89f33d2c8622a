"""The console command `dmc`.

    dmc generate DIR --prompt "def read(" --codec gear --bits 4 --max-tokens 64

Wrong use ends with one sentence on stderr and exit code 2. A command is a line in `COMMANDS`: its help, a function
that adds its flags to a parser, and one that runs it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_CODEC_FLAGS = ("bits", "backbone", "group", "rank", "outliers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name (those of the process if None) and returns the exit code."""
    parser, commands = _parsers()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = commands[options.command].flags()
        parser.error(f"unknown argument {unknown[0]} for {options.command}; its flags: {', '.join(known)}")
    try:
        COMMANDS[options.command][2](options)
    except (ValueError, OSError) as error:
        print(f"dmc {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="Hugging Face directory: an export of this project, or a Llama")
    text = parser.add_argument_group("prompts (at least one; several run as a batch)")
    text.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may repeat")
    text.add_argument("--prompt-file", action="append", default=[], metavar="FILE", help="file to continue; - is stdin")
    cache = parser.add_argument_group("cache")
    cache.add_argument("--policy", default="dmc", help="which entries exist: dmc (default) or full")
    cache.add_argument("--codec", default="dense", help="how full pages are stored: dense (default) or gear")
    cache.add_argument("--bits", type=int, help="gear: 2, 3, 4 (default) or 8")
    cache.add_argument("--backbone", help="gear: kivi (default), kcvt or token")
    cache.add_argument("--group", type=int, help="gear: values that share a scale (64)")
    cache.add_argument("--rank", type=int, help="gear: of the low-rank part (1; 0 for none)")
    cache.add_argument("--outliers", type=float, help="gear: share of each vector kept apart (0.02; 0 for none)")
    cache.add_argument("--page-size", type=int, help="entries of a page (the codec's own)")
    cache.add_argument("--sink-tokens", type=int, help="first entries that stay exact (4 for lossy codecs, else 0)")
    cache.add_argument("--window", type=int, default=0, help="newest entries that always stay exact (0)")
    cache.add_argument("--exact-dtype", help="fp32, bf16 or fp16, of entries outside encoded pages, and of dense ones")
    cache.add_argument("--kv-memory", type=_memory, metavar="BYTES", help="of the page pool, such as 512MiB (it grows)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, default=128, help="generated at most (128)")
    sampling.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (1.0)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="likeliest tokens up to this probability (1.0)")
    sampling.add_argument("--top-k", type=int, default=0, help="so many likeliest tokens (0: all)")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the output; may repeat")
    sampling.add_argument("--seed", type=int, help="of the draws (a new one each time)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="cpu, cuda:0, ... (a GPU if there is one)")
    machine.add_argument("--dtype", default="auto", help="fp32, bf16, fp16 (fp32 on the CPU, else the checkpoint's)")


def _generate(options: argparse.Namespace) -> None:
    from dmc.engine import LLM, SamplingParams, total_stats  # torch: not needed for --help

    prompts = options.prompt + [_read(name) for name in options.prompt_file]
    if not prompts:
        raise ValueError("nothing to continue: give --prompt TEXT or --prompt-file FILE")
    params = SamplingParams(
        max_tokens=options.max_tokens, temperature=options.temperature, top_p=options.top_p, top_k=options.top_k,
        stop=options.stop, seed=options.seed,
    )
    settings = {name: value for name in _CODEC_FLAGS if (value := getattr(options, name)) is not None}
    llm = LLM(
        options.directory, policy=options.policy, codec=options.codec, codec_settings=settings,
        kv_memory=options.kv_memory, page_size=options.page_size, sink_tokens=options.sink_tokens,
        window=options.window, exact_dtype=options.exact_dtype, dtype=options.dtype, device=options.device,
    )
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    stats = total_stats(outputs, time.perf_counter() - started)
    for number, output in enumerate(outputs, 1):
        if len(outputs) > 1:
            print(f"--- {number}")
        print(output.text)
    parts = ", ".join(f"{kind} {size:,}" for kind, size in stats.held.items())
    print(
        f"\n{stats.generated_tokens} tokens after {stats.prompt_tokens} of prompt in {stats.seconds:.2f} s: "
        f"{stats.tokens_per_second:.1f} tokens/s\n"
        f"measured CR {stats.cr:.2f} (tokens / entries)\n"
        f"held {stats.held_bytes:,} bytes ({parts}); dense bf16 {stats.dense_bytes:,} bytes: {stats.ratio:.2f} x"
    )


COMMANDS = {"generate": ("continue a text from a compressed cache", _add_generate, _generate)}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage text."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)

    def flags(self) -> list[str]:
        """Names of all flags."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog="dmc", description="Serve a Llama from a compressed KV cache.", allow_abbrev=False)
    choose = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    commands = {}
    for name, (summary, add, _) in COMMANDS.items():
        commands[name] = choose.add_parser(name, help=summary, description=f"{summary}.", allow_abbrev=False)
        add(commands[name])
    return parser, commands


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error


def _memory(text: str) -> int:
    number = text.rstrip("KMGiB")
    unit = text[len(number) :]
    if not number.isdigit() or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or a number with {', '.join(_UNITS)[2:]}")
    return int(number) * _UNITS[unit]


if __name__ == "__main__":
    sys.exit(main())
