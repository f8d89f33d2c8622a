"""Text to tokens: megatron-core's ``.bin/.idx`` pair, made once per (text, tokenizer) and kept.

Every document ends with the tokenizer's end-of-text token. A corpus lives in a directory named by the hash
of its texts and tokenizer, with ``meta.json`` written last: a directory without it is made again.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data import stdlib
from data.stdlib import Document

STDLIB = {"stdlib": ("guide", "topic", "api"), "stdlib-plain": ("src", "topic", "api")}


@dataclass(frozen=True)
class Corpus:
    """A tokenised text: ``tokens`` [N] int64 with document ends marked by ``end``."""

    tokens: torch.Tensor
    end: int
    hash: str
    characters: int

    @property
    def characters_per_token(self) -> float:
        """Mean characters of text per token."""
        return self.characters / max(1, len(self.tokens))


def load_tokenizer(directory: str | Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Raises:
        ValueError: if there is none, it is unreadable, has no end-of-text token or more entries than the model.
    """
    if not any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"{directory} has no tokenizer.json: copy the tokenizer beside the weights")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # the libraries below raise whatever they meet, bare Exception included
        said = " ".join(str(error).split())
        raise ValueError(f"the tokenizer in {directory} is not readable ({type(error).__name__}: {said})") from None
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {len(tokenizer)} entries, the model's vocabulary {vocab_size}: "
            "they do not belong together"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {directory} has no eos_token, which marks the ends of documents")
    return tokenizer


def corpora(text: str, held_out: str, tokenizer: PreTrainedTokenizerBase, cache: str | Path) -> tuple[Corpus, Corpus]:
    """``(training, held-out)`` corpora of the configured text.

    Args:
        text: ``stdlib`` (guides, topics, docstrings), ``stdlib-plain`` (source files as they are), or comma-separated
            files (.txt: one document a file; .jsonl: one ``{"text": ...}`` a line; either with .xz).
        held_out: files of the held-out text; empty holds out every twentieth document (for the standard
            library, the modules that `data.stdlib` names).
        tokenizer: of the model.
        cache: directory that keeps tokenised corpora.

    Raises:
        ValueError: if a file is missing or unreadable, or a split comes out empty.
    """
    docs = stdlib.documents(STDLIB[text]) if text in STDLIB else read_files(text)
    if held_out:
        training, tested = docs, read_files(held_out)
    elif text in STDLIB:
        training, tested = stdlib.split(docs)
    else:
        training = [d for i, d in enumerate(docs) if i % 20 != 19]
        tested = [d for i, d in enumerate(docs) if i % 20 == 19]
    for name, docs in (("training", training), ("held-out", tested)):
        if not docs:
            raise ValueError(f"the {name} text of data.text={text} is empty: give data.held_out a file, or more documents")
    return tokenize(training, tokenizer, cache), tokenize(tested, tokenizer, cache)


def read_files(names: str) -> list[Document]:
    """Documents of comma-separated ``.txt`` and ``.jsonl`` files, plain or ``.xz``.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    docs: list[Document] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"no text file at {name}")
        try:
            opener = lzma.open if path.suffix == ".xz" else open
            with opener(path, "rt", encoding="utf-8") as file:
                body = file.read()
        except (UnicodeDecodeError, lzma.LZMAError, EOFError, OSError) as error:
            raise ValueError(f"{name} is not readable as text ({type(error).__name__}: {error})") from None
        # Named without their directory: a corpus has the same hash wherever its files lie.
        docs += _json_lines(path, body) if ".jsonl" in path.name else [Document(path.name, body)]
    return [d for d in docs if d.text.strip()]


def _json_lines(path: Path, body: str) -> list[Document]:
    docs: list[Document] = []
    for number, line in enumerate(body.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()  # a lone surrogate is JSON, but no text
        except (json.JSONDecodeError, UnicodeEncodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'line {number} of {path} is not {{"text": "..."}} ({type(error).__name__}: {error}): mend or remove it'
            ) from None
        docs.append(Document(f"{path.name}:{len(docs)}", text))
    return docs


def tokenize(docs: list[Document], tokenizer: PreTrainedTokenizerBase, cache: str | Path) -> Corpus:
    """Tokens of the documents, from the cache if they were made before."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(f"{tokenizer.eos_token_id} {stdlib.corpus_hash(docs)}".encode())
    directory = Path(cache) / digest.hexdigest()[:16]
    if not (directory / "meta.json").is_file():
        _write(docs, tokenizer, directory)
    meta = json.loads((directory / "meta.json").read_text())
    dataset = IndexedDataset(str(directory / "tokens"))
    stream = torch.cat([torch.from_numpy(dataset[i].astype("int64")) for i in range(len(dataset))])
    return Corpus(stream, tokenizer.eos_token_id, meta["corpus_hash"], meta["characters"])


def _write(docs: list[Document], tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Build beside the final directory and rename: several processes may do so at once."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=directory.name + ".", dir=directory.parent))
    builder = IndexedDatasetBuilder(str(staging / "tokens.bin"), dtype=DType.optimal_dtype(len(tokenizer)))
    for encoded in tokenizer.backend_tokenizer.encode_batch([d.text for d in docs], add_special_tokens=False):
        builder.add_document(torch.tensor([*encoded.ids, tokenizer.eos_token_id]), [len(encoded.ids) + 1])
    builder.finalize(str(staging / "tokens.idx"))
    meta = {"corpus_hash": stdlib.corpus_hash(docs), "documents": len(docs), "characters": sum(len(d.text) for d in docs)}
    (staging / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    try:
        os.rename(staging, directory)
    except OSError:  # another process was first, or an unfinished one left its directory
        if (directory / "meta.json").is_file():
            shutil.rmtree(staging)
        else:
            shutil.rmtree(directory)
            os.rename(staging, directory)
