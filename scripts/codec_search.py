"""KL per byte of cache codecs on a real model: which codec and which of its settings loses least for what it holds.

    python scripts/codec_search.py SmolLM2-135M --text wiki.txt --text novel.txt --results codecs.jsonl
    python scripts/codec_search.py SmolLM2-135M --text wiki.txt --recipe gear:bits=4,backbone=kivi,rank=4 --recipe tcq-2bit

Of each text, 768 + 256 tokens from its middle. The prompt of 768 goes through the model in fp32; its keys and values
(as the cache holds them, rotated) are replaced by decode(encode(.)); then the next 256 tokens are scored in one pass,
and the KL of the uncompressed model's prediction to this one is averaged over them. All of the prompt is encoded but
the sinks, the last page too, however short: there is no recent window. The 256 tokens see each other exactly.

Bits per element are 8 x all bytes held for the prompt / its keys and values: encoded tensors as `codec.nbytes` counts
them, and the sinks in bf16.

Without --text the texts are sources and reference prose of the standard library of this Python. Results are added to a
file as they come, and what is in it already is not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from dmc import pretrained
from dmc.cache import Codec, codec
from dmc.cache.codecs.former import CHANGED

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
TEXTS = [LIBRARY / "argparse.py", LIBRARY / "pydoc_data/topics.py"]
SETS = {
    "presets": ["gear-4bit", "gear-2bit", "tcq-4bit", "tcq-3bit", "tcq-2bit"],
    "published": [
        f"gear:bits={bits},backbone={backbone},rank={rank},outliers={outliers}"
        for bits in (4, 3, 2)
        for backbone, rank, outliers in (("kivi", 0, 0), ("kivi", 2, 0), ("kivi", 2, 0.02), ("kcvt", 2, 0.02), ("token", 0, 0))
    ],
    "split": [
        f"tcq:key_bits={keys},value_bits={values}"
        for keys, values in (
            (4, 4),
            (4.25, 3.75),
            (4.5, 3.5),
            (4.75, 3.25),
            (5, 3),
            (3, 3),
            (3.25, 2.5),
            (3.5, 2.25),
            (3, 2.75),
            (3.75, 2),
            (2, 2),
            (2.25, 1.75),
            (2.5, 1.5),
            (2.75, 1.25),
        )
    ],
    "codecs": [  # all codecs, about 8, 5, 4, 3 and 2 bits
        "int8",
        "fp8",
        "svd:rank=32",
        "svd:rank=32,factors=int8",
        "svd:rank=16,factors=int8",
        *(f"gear:bits={bits},backbone=token,group=32,rank=0,outliers=0" for bits in (4, 2)),
        *(f"kivi:bits={bits}" for bits in (4, 3, 2)),
        *(f"gear:bits={bits},backbone=kivi,group=32,rank=2,outliers=0.02" for bits in (4, 2)),
        *(f"rotated:bits={bits}" for bits in (4, 3, 2)),
        *(f"rotated:bits={bits},mean=1" for bits in (4, 3, 2)),
        "gear-4bit",
        "gear-2bit",
        "tcq-4bit",
        "tcq-3bit",
        "tcq-2bit",
    ],
    "additions": [
        f"gear:bits={bits},backbone=trellis,rank={rank},outliers={outliers}"
        for bits in (4, 2)
        for rank, outliers in ((1, 0), (2, 0), (0, 0.02))
    ],
}


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face directory of a model")
    parser.add_argument("--text", action="append", type=Path, help="a text file; may be repeated")
    parser.add_argument("--recipe", action="append", help="CODEC:setting=value,... ; may be repeated")
    parser.add_argument("--set", action="append", choices=SETS, help="a named list of recipes; default: presets")
    parser.add_argument("--prompt", type=int, default=768, help="tokens whose cache is compressed (768)")
    parser.add_argument("--scored", type=int, default=256, help="tokens scored after them (256)")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens left exact (4)")
    parser.add_argument("--page-size", type=int, help="entries of a page (the codec's own)")
    parser.add_argument("--results", type=Path, default=Path("codec_search.jsonl"), help="one line a measurement; resumed")
    options = parser.parse_args()
    try:
        print(search(options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def search(options: argparse.Namespace) -> str:
    """Measures what is asked for; returns the table."""
    recipes = [name for chosen in options.set or () for name in SETS[chosen]] + (options.recipe or [])
    recipes = recipes or SETS["presets"]
    codecs = {recipe: parse(recipe) for recipe in recipes}
    return table(list(measure(options, codecs)))


def parse(recipe: str) -> Codec:
    """``"gear:bits=4,rank=2"`` → the codec.

    Raises:
        ValueError: if a setting is not name=value, or the codec rejects it.
    """
    name, _, settings = recipe.partition(":")
    pairs = [setting.partition("=") for setting in settings.split(",") if setting]
    if any(not equals for _, equals, _ in pairs):
        raise ValueError(f"recipe {recipe!r}: after the colon come name=value pairs with commas between")
    return codec(name, **{setting: yaml.safe_load(value) for setting, _, value in pairs})


def measure(options: argparse.Namespace, codecs: dict[str, Codec]) -> Iterator[dict]:
    """One result for each text and recipe, from the results file where it has it."""
    known = {}
    if options.results.exists():
        known = {row["key"]: row for row in map(json.loads, options.results.read_text().splitlines())}
    tokenizer = pretrained.load_tokenizer(options.model)
    model = None
    for path in options.text or TEXTS:
        tokens = window(tokenizer, path, options.prompt + options.scored)
        todo = {}
        for recipe, made in codecs.items():
            page = options.page_size or made.page_size
            rest = [page, options.sinks, options.prompt, *tokens.flatten().tolist()]
            key, before = (_key(Path(options.model).name, words, rest) for words in _written(recipe))
            if key in known:
                yield known[key]
            elif before in known:
                yield known[before] | {"key": key, "recipe": recipe}
            else:
                todo[recipe] = (key, made, page)
        if not todo:
            continue
        model = model or pretrained.load_model(options.model, torch.float32)
        reference = Reference(model, tokens, options.prompt)
        for recipe, (key, made, page) in todo.items():
            row = {"key": key, "recipe": recipe, "text": path.name, "page": page, "sinks": options.sinks}
            row |= reference.score(made, page, options.sinks)
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            yield row


def _written(recipe: str) -> tuple[str, str | None]:
    """What stands for a recipe in its key, and what version 0.1 had there for the same codec (None: it had no such name)."""
    name, _, settings = recipe.partition(":")
    if name.startswith("tcq"):
        return recipe, f"gear{recipe[3:]}"
    given = {setting.partition("=")[0] for setting in settings.split(",")}
    changed = name in CHANGED and not {"backbone", "rank"} <= given
    return f"{recipe} (published)" if changed else recipe, None


def _key(model: str, recipe: str | None, rest: list[int]) -> str | None:
    return recipe and hashlib.sha256(json.dumps([model, recipe, *rest]).encode()).hexdigest()[:16]


def window(tokenizer: PreTrainedTokenizerBase, path: Path, length: int) -> Tensor:
    """``[1, length]`` tokens from the middle of a text.

    Raises:
        ValueError: if the text is too short.
    """
    text = path.read_text(encoding="utf-8-sig")
    around = 8 * length  # characters each side: the whole of a long text need not be tokenised
    middle = len(text) // 2
    tokens = tokenizer(text[max(0, middle - around) : middle + around]).input_ids
    if len(tokens) < length:
        raise ValueError(f"{path} has {len(tokens)} tokens and {length} are needed: give a longer text")
    start = (len(tokens) - length) // 2
    return torch.tensor([tokens[start : start + length]])


class Reference:
    """A text's uncompressed cache and predictions.

    Args:
        model: fp32.
        tokens: ``[1, prompt + scored]``.
        prompt: tokens whose cache is compressed.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, tokens: Tensor, prompt: int) -> None:
        self.model, self.rest = model, tokens[:, prompt:]
        cache = DynamicCache()
        model.model(tokens[:, :prompt], past_key_values=cache)
        self.keys = torch.stack([layer.keys[0] for layer in cache.layers])  # [L, H, T, D]
        self.values = torch.stack([layer.values[0] for layer in cache.layers])
        self.predicted = self._predict(self.keys, self.values)

    @torch.no_grad()
    def score(self, made: Codec, page: int, sinks: int) -> dict[str, float]:
        """KL, bits per element, and seconds that encoding took."""
        start = time.process_time()
        keys, values, held = compress(made, self.keys, self.values, page, sinks)
        seconds = time.process_time() - start
        predicted = self._predict(keys, values)
        kl = (self.predicted.exp() * (self.predicted - predicted)).sum(-1).mean().item()
        return {"kl": kl, "bits": 8 * held / (self.keys.numel() + self.values.numel()), "seconds": seconds}

    def _predict(self, keys: Tensor, values: Tensor) -> Tensor:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(key[None], value[None], layer)
        return self.model(self.rest, past_key_values=cache).logits[0].float().log_softmax(-1)


def compress(made: Codec, keys: Tensor, values: Tensor, page: int, sinks: int) -> tuple[Tensor, Tensor, int]:
    """Keys and values ``[L, H, T, D]`` as they come back from the codec, and the bytes held for them."""
    layers, heads, tokens, size = keys.shape
    parts = [(keys[:, :, :sinks].bfloat16().float(), values[:, :, :sinks].bfloat16().float())]
    held = 2 * 2 * layers * heads * min(sinks, tokens) * size
    for start in range(sinks, tokens, page):
        blocks = made.encode(keys[:, :, start : start + page], values[:, :, start : start + page])
        held += made.nbytes(blocks)
        parts.append(tuple(part.float() for part in made.decode(blocks)))
    back = [torch.cat(part, dim=2) for part in zip(*parts, strict=True)]
    return *back, held


def table(rows: list[dict]) -> str:
    """A Markdown table: a row a recipe, mean over the texts."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    lines = ["| recipe | page | bits per element | KL | " + " | ".join(texts) + " |", "|---" * (4 + len(texts)) + "|"]
    for recipe, page in dict.fromkeys((row["recipe"], row["page"]) for row in rows):
        own = [row for row in rows if (row["recipe"], row["page"]) == (recipe, page)]
        mean = sum(row["kl"] for row in own) / len(own)
        by_text = " | ".join(f"{row['kl']:.4f}" for row in own)
        lines.append(f"| `{recipe}` | {page} | {own[0]['bits']:.3f} | **{mean:.4f}** | {by_text} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
