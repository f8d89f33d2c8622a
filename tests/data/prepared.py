"""Small prepared corpora for tests."""

import json
import shutil
from pathlib import Path

from data import sources, tokens
from data.prepare import HeldOut, prepare
from tests.training.helpers import TOKENIZER


def texts(count, *, words=20, mark="w"):
    return [" ".join(f"{mark}{i}.{j}" for j in range(words + i % 7)) for i in range(count)]


def write_jsonl(path, rows, column="text"):
    Path(path).write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return str(path)


def make(directory, rows, *, held_out="0.2", name="corpus", **settings):
    """A prepared corpus of these texts; returns its directory."""
    path = write_jsonl(directory / f"{name}.jsonl", rows)
    share = HeldOut.parse(held_out, [])
    prepare(sources.Request([path]), tokens.load_tokenizer(TOKENIZER), directory / name, held_out=share, **settings)
    return directory / name


def bos_tokenizer(directory, *, adds=True):
    """The base model's tokenizer with a BOS token of id 1, which it adds before each text or does not; its directory."""
    made = Path(shutil.copytree(TOKENIZER, directory, ignore=shutil.ignore_patterns("*.safetensors")))
    tokenizer = json.loads((made / "tokenizer.json").read_text())
    bos, text = {"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    if adds:
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [1], "tokens": ["<|pad|>"]}},
        }
    (made / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((made / "tokenizer_config.json").read_text()) | {"bos_token": "<|pad|>"}
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    return made
