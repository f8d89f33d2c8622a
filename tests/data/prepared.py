"""Small prepared corpora for tests."""

import json
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
