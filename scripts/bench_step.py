"""CPU time of one decode step: the engine's model and cache next to `transformers`, over caches of a given length.

    python scripts/bench_step.py DIR --contexts 512 2048 --batches 1 8 --codecs dense tcq

The caches are filled with random entries, so no prompt is read and a case costs seconds; what a step does depends on
lengths alone. Steps of all engines take turns in one process and the least CPU time of each counts, so that a busy machine
changes little. With ``--lengths unequal`` the sequences have from a quarter of the context up to the whole of it, which
transformers pads on the left. ``--policies`` are held against the same transformers, which keeps all. No sampling, no
scheduler, no prompt: see bench_serve.py for those.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch

from dmc import pretrained
from dmc.cache import KVCache, Shape, codec, policy
from dmc.cache.reading.prompt import Layer
from dmc.commands.common import named
from dmc.engine.llm import DTYPES
from dmc.engine.runner import Runner
from dmc.model import Decoder

_TOKEN = 5  # that is fed; any will do


def main() -> None:
    """Runs every case and prints a table."""
    options = _options()
    torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    try:
        model, other = Decoder.load(options.directory, dtype=dtype), pretrained.load_model(options.directory, dtype)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("| context | batch | lengths | engine | step, CPU ms | of transformers | bytes held |")
    print("|---|---|---|---|---|---|---|")
    for context in options.contexts:
        for batch in options.batches:
            for kind in options.lengths if batch > 1 else ["equal"]:
                _case(options, model, other, _lengths(kind, context, batch), kind)


def _case(options: argparse.Namespace, model: Decoder, other: torch.nn.Module, lengths: list[int], kind: str) -> None:
    engines = {"transformers": _theirs(other, lengths)}
    for name in options.codecs:
        for kept in options.policies:
            engines["dmc " + (name if kept == "full" else f"{kept} x {name}")] = _ours(model, lengths, name, kept)
    least = dict.fromkeys(engines, float("inf"))
    for turn in range(options.steps + 1):
        for name, (step, _) in engines.items():
            started = time.process_time()
            step()
            if turn:  # the first warms up
                least[name] = min(least[name], 1e3 * (time.process_time() - started))
    for name, (_, held) in engines.items():
        print(
            f"| {max(lengths)} | {len(lengths)} | {kind} | {name} | {least[name]:.1f} | "
            f"{least['transformers'] / least[name]:.2f} x | {held():,} |",
            flush=True,
        )


def _ours(model: Decoder, lengths: list[int], name: str, kept: str) -> tuple[Callable, Callable]:
    config = model.config
    layers, heads, size = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    which, settings = named(kept)
    cache = KVCache(Shape(layers, heads, size, model.dtype), policy(which, **settings), codec(name), slots=len(lengths))
    slots = [cache.load(_prompt(cache, length)) for length in lengths]
    runner, places = Runner(model, cache), list(lengths)

    def step() -> None:
        hidden, _ = runner.step(slots, [_TOKEN] * len(slots), places)
        runner.logits(hidden).argmax(-1)
        places[:] = [place + 1 for place in places]

    return step, lambda: sum(sum(cache.held(slot).values()) for slot in slots)


def _prompt(cache: KVCache, length: int) -> object:
    """A prompt of random entries, as if it had been read."""
    heads, size = cache.shape.heads, cache.shape.head_size
    prompt, places = cache.prompt(), torch.arange(length - 1, dtype=torch.int32).expand(heads, -1)
    for number in range(cache.shape.layers):
        keys, values = torch.randn(2, heads, length - 1, size, dtype=cache.shape.dtype)
        tail = torch.randn(heads, 2 * size), torch.ones(heads), torch.zeros(heads)
        scores = torch.rand(heads, length - 1) if cache.policy.scored else None
        prompt.layers[number] = Layer(keys, values, places, scores, *tail)
    prompt.done = length
    return prompt


def _theirs(model: torch.nn.Module, lengths: list[int]) -> tuple[Callable, Callable]:
    from transformers import DynamicCache

    config, longest, batch = model.config, max(lengths), len(lengths)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    for number in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, batch, config.num_key_value_heads, longest, size, dtype=model.dtype), number)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    state = {"mask": mask}

    @torch.no_grad()
    def step() -> None:
        state["mask"] = torch.cat([state["mask"], mask.new_ones(batch, 1)], dim=1)
        out = model(torch.full((batch, 1), _TOKEN), past_key_values=cache, attention_mask=state["mask"], use_cache=True)
        out.logits[:, -1].argmax(-1)

    width = model.dtype.itemsize
    return step, lambda: width * 2 * config.num_hidden_layers * config.num_key_value_heads * size * batch * cache.get_seq_length()


def _lengths(kind: str, context: int, batch: int) -> list[int]:
    if kind == "equal" or batch == 1:
        return [context] * batch
    return [context // 4 + (context - context // 4) * place // (batch - 1) for place in range(batch)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="Hugging Face directory of a model")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048], help="cached tokens of the longest sequence")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="sequences at a time")
    parser.add_argument("--lengths", nargs="+", default=["equal", "unequal"], choices=["equal", "unequal"])
    parser.add_argument("--codecs", nargs="+", default=["dense", "int8", "tcq"], help="of ours")
    parser.add_argument("--policies", nargs="+", default=["full"], metavar="NAME[:SETTING=VALUE,...]", help="of ours")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of all engines' arithmetic")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each; the least counts")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    if min(*options.contexts, *options.batches, options.steps, options.threads) < 1:
        parser.error("--contexts, --batches, --steps and --threads must be at least 1")
    return options


if __name__ == "__main__":
    main()
