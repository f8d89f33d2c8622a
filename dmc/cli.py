"""The console command `dmc`.

    dmc train --model DIR --target-cr 4 data.text=corpus.jsonl --output runs/mine
    dmc export runs/mine/checkpoints/final my-model-cr4
    dmc generate DIR --prompt "def read(" --codec tcq --bits 4 --max-tokens 64
    dmc serve DIR --codec tcq --kv-memory 2GiB
    dmc eval DIR --text text.txt --needle --codec gear-4bit --json figures.json
    dmc inspect DIR --prompt-file text.txt --codec tcq
    dmc calibrate DIR --text text.txt --out eigen.safetensors
    dmc frontier --out runs/frontier
    dmc compare full.json h2o.json
    dmc plot runs/frontier --out frontier.pdf --width paper

Wrong usage gives one sentence on stderr and exit code 2; a dead rank gives exit code 1. A command is a line in `COMMANDS`: its
help, a function that adds its flags to a parser, and one that runs it. A command of `PROGRAMS` parses its arguments itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from dmc import hub
from dmc.commands import calibrate, compare, frontier, inspect, plot
from dmc.commands import eval as evaluate
from dmc.commands.common import add_model, add_prompts, load, memory, read_prompts
from dmc.extras import needed_for

if TYPE_CHECKING:
    from dmc.engine import Stats


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name (those of the process if None) and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in PROGRAMS:
        return _program(*arguments)
    parser, commands = _parsers()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = commands[options.command].flags()
        parser.error(f"unknown argument {unknown[0]} for {options.command}; its flags: {', '.join(known)}")
    try:
        _locate(options)
        return COMMANDS[options.command][2](options) or 0
    except (ValueError, OSError) as error:
        if getattr(error, "__notes__", None):  # raised by the user's policy: its author needs the traceback
            raise
        print(f"dmc {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        from dmc.engine.ranks import RankFailed  # torch, which is loaded by now

        if not isinstance(error, RankFailed):
            raise
        print(f"dmc {options.command}: {error}", file=sys.stderr)
        return 1


def _locate(options: argparse.Namespace) -> None:
    """Directories in the place of names on the Hub; ``shown`` is how the model is called in outputs."""
    if getattr(options, "directory", None) is not None:
        options.shown = hub.shown(options.directory)
        options.directory = str(hub.located(options.directory))
    if getattr(options, "base", None) is not None:
        options.base = str(hub.located(options.base))


def _program(name: str, *arguments: str) -> int:
    try:
        run = PROGRAMS[name][1]()
    except ValueError as error:
        print(f"dmc {name}: {error}", file=sys.stderr)
        return 2
    return run(list(arguments)) or 0


def _train() -> Callable[[list[str]], int | None]:
    with needed_for("training"):
        from dmc.commands import train
    return train.main


def _export() -> Callable[[list[str]], int | None]:
    with needed_for("the export"):
        from dmc.commands import export
    return export.main


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_prompts(parser)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, default=128, help="maximum number of generated tokens (128)")
    sampling.add_argument("--temperature", type=float, default=1.0, help="0: always the most likely token (1.0)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="most likely tokens up to this total probability (1.0)")
    sampling.add_argument("--top-k", type=int, default=0, help="number of most likely tokens to sample from (0: all)")
    sampling.add_argument("--min-p", type=float, default=0.0, help="minimum probability, relative to the most likely token (0)")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeated tokens become less likely (1)")
    sampling.add_argument("--n", type=int, default=1, help="completions of each prompt (1)")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the output; may repeat")
    sampling.add_argument("--seed", type=int, help="random seed of the sampler (a new one each time)")


def _generate(options: argparse.Namespace) -> None:
    prompts = read_prompts(options)
    from dmc.engine import SamplingParams, total_stats

    params = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        n=options.n,
        stop=options.stop,
        seed=options.seed,
    )
    llm = load(options)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    stats = [output.stats for output in outputs if output.stats]
    for number, output in enumerate(outputs, 1):
        if len(outputs) > 1:
            print(f"--- {number}")
        print(output.text)
        if output.finish_reason == "memory":
            print(f"dmc generate: --kv-memory is too small for the rest of output {number}", file=sys.stderr)
    if stats:
        print(f"\n{_figures(total_stats(outputs, time.perf_counter() - started))}")


def _figures(stats: Stats) -> str:
    from dmc.engine.stats import HELD

    parts = ", ".join(f"{HELD[kind]} {size:,}" for kind, size in stats.held.items())
    return (
        f"{stats.generated_tokens} tokens after {stats.prompt_tokens} of prompt in {stats.seconds:.2f} s: "
        f"{stats.tokens_per_second:.1f} tokens/s\n"
        f"measured CR {stats.cr:.2f} (tokens / entries)\n"
        f"held {stats.held_bytes:,} bytes ({parts}); dense bf16 {stats.dense_bytes:,} bytes: {stats.ratio:.2f} x"
    )


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    server.add_argument("--port", type=int, default=8000, help="port to listen on (8000; 0: a free one)")
    server.add_argument("--name", help="name of the model in requests (the directory's)")
    server.add_argument("--api-key", help="key required by every route but /health (DMC_API_KEY of the environment, or none)")
    server.add_argument("--max-waiting", type=int, default=256, help="maximum of queued sequences; more get 429 (256)")
    server.add_argument("--default-max-tokens", type=int, default=512, help="max_tokens of chat requests that give none (512)")
    server.add_argument("--max-body", type=memory, default=1 << 20, metavar="BYTES", help="maximum size of a request body (1MiB)")
    server.add_argument("--head-timeout", type=float, default=20.0, help="seconds to receive the request headers (20)")
    server.add_argument("--body-timeout", type=float, default=30.0, help="seconds to receive the request body (30)")
    server.add_argument("--drain-timeout", type=float, default=30.0, help="seconds for running requests after SIGTERM (30)")
    server.add_argument("--stall-timeout", type=float, default=60.0, help="seconds without a step until /health returns 503 (60)")


def _serve(options: argparse.Namespace) -> int:
    with needed_for("the server"):
        from dmc.server import logs
        from dmc.server.run import serve
        from dmc.server.settings import Settings
    fields = (
        "host",
        "port",
        "max_waiting",
        "default_max_tokens",
        "max_body",
        "head_timeout",
        "body_timeout",
        "drain_timeout",
        "stall_timeout",
    )
    settings = Settings(
        name=options.name or options.shown,
        api_key=options.api_key or os.environ.get("DMC_API_KEY") or None,
        **{name: getattr(options, name) for name in fields},
    )
    logs.start()  # also for messages while the model is loaded
    return serve(load(options), settings)


PROGRAMS = {
    "train": ("retrofit or pretrain a model (train.py is the same for torchrun)", _train),
    "export": ("write a training checkpoint as a Hugging Face directory", _export),
}
COMMANDS = {
    "generate": ("continue a text from a compressed cache", _add_generate, _generate),
    "serve": ("answer OpenAI's HTTP interface from a compressed cache", _add_serve, _serve),
    "eval": ("perplexity, retrieval and tasks through a compressed cache", evaluate.add, evaluate.run),
    "calibrate": ("compute the bases of the eigen codec, or fitted decisions, on a text", calibrate.add, calibrate.run),
    "inspect": ("show what a compressed cache holds for a text, per layer and head", inspect.add, inspect.run),
    "frontier": ("measure policies x codecs x budgets on one text: table, plot and report", frontier.add, frontier.run),
    "compare": ("paired differences between caches that were measured on the same samples", compare.add, compare.run),
    "plot": ("draw what frontier measured: loss against bytes, a line for each method", plot.add, plot.run),
}


class _Parser(argparse.ArgumentParser):
    """Reports errors in one sentence, without the usage text."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)

    def flags(self) -> list[str]:
        """Names of all flags."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog="dmc", description="Compress the KV cache of a language model, and serve from it.", allow_abbrev=False)
    choose = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    commands = {}
    for name, (summary, _) in PROGRAMS.items():
        choose.add_parser(name, help=summary)  # for `dmc --help`
    for name, (summary, add, _) in COMMANDS.items():
        commands[name] = choose.add_parser(name, help=summary, description=f"{summary}.", allow_abbrev=False)
        add(commands[name])
    return parser, commands


if __name__ == "__main__":
    sys.exit(main())
