"""The texts of a run as tokens: prepared corpora as they are, everything else tokenised once and kept.

Texts that are no prepared corpus (the standard library, files) are read whole and tokenised
into a directory of the cache named by the hash of texts and tokenizer, of the same form as a prepared corpus
(`data.corpus`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.core.datasets.indexed_dataset import DType
from transformers import PreTrainedTokenizerBase

from data import blend, corpus, stdlib
from data.chat import COLUMN, ChatTemplate, Messages, template_hash
from data.corpus import Corpus
from data.encode import Encoder, chunked
from data.files import read_files
from data.mixture import Mixture
from data.opening import described, opening, setting
from data.skipped import Skipped
from data.stdlib import Document
from data.writer import FORMAT, PartWriter, write_meta
from dmc import pretrained

STDLIB = {"stdlib": ("guide", "topic", "api"), "stdlib-plain": ("src", "topic", "api")}


def load_tokenizer(directory: str | Path, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Args:
        directory: that holds it.
        vocab_size: of the model, if there is one to compare with.

    Raises:
        ValueError: if there is none, it is unreadable, has no end-of-text token or more entries than the model.
    """
    if not any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"{directory} has no tokenizer.json: copy the tokenizer next to the weights")
    tokenizer = pretrained.load_tokenizer(directory)
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {len(tokenizer)} entries, the model's vocabulary {vocab_size}: "
            "they do not belong together"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {directory} has no eos_token, which marks the ends of documents")
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that identify a tokenizer."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def about(tokenizer: PreTrainedTokenizerBase) -> dict:
    """What a corpus says about its tokenizer in ``meta.json``."""
    return {"hash": tokenizer_hash(tokenizer), "vocabulary": len(tokenizer), "end": tokenizer.eos_token_id}


def corpora(
    text: str | list,
    held_out: str | list,
    tokenizer: PreTrainedTokenizerBase,
    cache: str | Path,
    bos: str | bool = "auto",
    *,
    chat: bool = False,
    loss_on: str = "everything",
) -> tuple[Mixture, Mixture]:
    """``(training, held-out)`` texts of the configuration.

    Args:
        text: a corpus or a blend of several (`data.blend.parse`). A corpus is ``stdlib`` (guides, topics,
            docstrings), ``stdlib-plain`` (source files as they are), a prepared corpus (its directory, or the prefix
            of one of its parts), or comma-separated files of any kind that `data.readers` reads (.txt: one document
            per file; .jsonl: one ``{"text": ...}`` per line).
        held_out: the same for the held-out text. Empty takes the held-out parts of prepared corpora, every
            twentieth document of files and, for the standard library, the modules that `data.stdlib` names, with
            the shares of ``text``.
        tokenizer: of the model.
        cache: directory that keeps tokenised corpora.
        bos: whether documents begin with a BOS token (`data.opening.opening`); conversations begin as their template does.
        chat: files hold conversations, in the column `data.chat.COLUMN`. A prepared corpus says itself whether it does.
        loss_on: of conversations, one of `data.chat.LOSS_ON`. Texts are scored completely.

    Raises:
        ValueError: if a text is missing, unreadable, of another tokenizer or prepared with another ``bos``, or a split
            comes out empty; with conversations if there is no chat template or a corpus was prepared with another; if
            ``loss_on`` is "assistant" and no text holds conversations.
    """
    parts = blend.parse(text, "data.text")
    tested = blend.parse(held_out, "data.held_out") if held_out else parts
    template = ChatTemplate(tokenizer, loss_on) if chat else None
    make = _Maker(tokenizer, cache, opening(tokenizer, bos), template, loss_on)
    if held_out:
        first, second = [make.training(p.text) for p in parts], [make.tested(p.text) for p in tested]
    else:
        pairs = [make.both(p.text) for p in parts]
        first, second = [a for a, _ in pairs], [b for _, b in pairs]
    # Everything was found and read by now: only then is anything tokenised and written.
    training, evaluated = _mixture(first, parts), _mixture(second, tested)
    if loss_on == "assistant" and all(c.scored is None for c in training.corpora):
        raise ValueError(
            "data.loss_on is assistant, and nothing in data.text holds conversations: set data.chat=true for files of them, name "
            "a corpus prepared with --chat, or leave data.loss_on out"
        )
    return training, evaluated


def tokenize(
    docs: list[Document],
    tokenizer: PreTrainedTokenizerBase,
    cache: str | Path,
    name: str = "",
    begin: Sequence[int] = (),
    loss_on: str | None = None,
) -> Corpus:
    """The documents, each after the tokens ``begin``, as a corpus called ``name``; from the cache if it has them.

    With ``loss_on`` they are conversations (`data.chat`), which begin as their template does.

    Raises:
        ValueError: if the cache cannot be written or what it holds was damaged.
    """
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    begin = [] if loss_on else begin
    hashed = _hash(docs, begin, loss_on)
    digest.update(f"{FORMAT} {tokenizer.eos_token_id} {hashed}".encode())
    directory = Path(cache) / digest.hexdigest()[:16]
    if not (directory / "meta.json").is_file():
        try:
            _write(docs, tokenizer, directory, begin, hashed, loss_on)
        except OSError as error:
            raise ValueError(
                f"data.cache {cache} could not be written: {error.strerror or error}; free some space or name another"
            ) from None
    found = corpus.open_part(directory, "tokens")
    return dataclasses.replace(found, name=name or found.name)


# ------------------------------------------------------------------------------------------- one text


class _Maker:
    """Finds and reads texts; what it returns makes (or opens) the corpus when called."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, cache: str | Path, begin: list[int], template: ChatTemplate | None, loss_on: str
    ) -> None:
        self._tokenizer, self._cache, self._begin = tokenizer, cache, begin
        self._template, self._loss_on = template, loss_on

    def both(self, text: str) -> tuple[Callable[[], Corpus], Callable[[], Corpus]]:
        """The training and held-out part of one text."""
        if _is_prepared(text):
            directory, part = _located(text, "train")
            if part != "train" or "held_out" not in corpus.read_meta(directory)["parts"]:
                raise ValueError(f"{text} has no held-out part of its own: give data.held_out, or prepare it with --held-out")
            return self._prepared(directory, "train"), self._prepared(directory, "held_out")
        docs, skipped = self._documents(text)
        if text in STDLIB:
            training, tested = stdlib.split(docs)
        else:
            training = [d for i, d in enumerate(docs) if i % 20 != 19]
            tested = [d for i, d in enumerate(docs) if i % 20 == 19]
        return self._tokenized(text, training, "training", skipped), self._tokenized(text, tested, "held-out", Skipped())

    def training(self, text: str) -> Callable[[], Corpus]:
        """A text to train on where another is held out: files whole, of a prepared corpus its training part."""
        if _is_prepared(text):
            return self._prepared(*_located(text, "train"))
        docs, skipped = self._documents(text)
        return self._tokenized(text, docs, "training", skipped)

    def tested(self, text: str) -> Callable[[], Corpus]:
        """A text named in data.held_out: files whole, of a prepared corpus its held-out part."""
        if _is_prepared(text):
            return self._prepared(*_located(text, "held_out"))
        docs, skipped = self._files(text)
        return self._tokenized(text, docs, "held-out", skipped)

    def _documents(self, text: str) -> tuple[list[Document], Skipped]:
        return (stdlib.documents(STDLIB[text]), Skipped()) if text in STDLIB else self._files(text)

    def _files(self, text: str) -> tuple[list[Document], Skipped]:
        return read_files(text, Messages(COLUMN, self._template) if self._template else None)

    def _tokenized(self, text: str, docs: list[Document], name: str, skipped: Skipped) -> Callable[[], Corpus]:
        if not docs:
            left_out = f" (left out: {skipped})" if skipped else ""
            raise ValueError(
                f"the {name} text of data.text={text} is empty{left_out}: give data.held_out a file, or more documents"
            )
        loss_on = self._template.loss_on if self._template and text not in STDLIB else None
        return lambda: dataclasses.replace(
            tokenize(docs, self._tokenizer, self._cache, text, self._begin, loss_on), skipped=skipped
        )

    def _prepared(self, directory: Path, part: str) -> Callable[[], Corpus]:
        meta = corpus.read_meta(directory)
        made, here = meta["tokenizer"], about(self._tokenizer)
        if made != here:
            differing = ", ".join(f"{k} {made.get(k)}, the model's {here[k]}" for k in here if made.get(k) != here[k])
            raise ValueError(
                f"{directory} was made with another tokenizer ({differing}): "
                "prepare it again with scripts/prepare_data.py --tokenizer and the model's directory"
            )
        begin = meta.get("begin", [])  # corpora older than the setting have none
        if "chat" in meta:
            self._check_chat(directory, meta["chat"])
        elif begin != self._begin:
            raise ValueError(
                f"{directory} holds {described(begin)}, data.bos asks for {described(self._begin)}: set "
                f"data.bos={setting(begin)}, or prepare it again with --bos {setting(self._begin)}"
            )
        opened = corpus.open_part(directory, part)
        if self._loss_on == "everything":
            opened = dataclasses.replace(opened, scored=None)
        return lambda: opened

    def _check_chat(self, directory: Path, made: dict) -> None:
        """That a prepared corpus of conversations fits the model's template and the loss."""
        if made["template"] != (here := template_hash(self._tokenizer)):
            raise ValueError(
                f"{directory} was made with another chat template ({made['template']}, the model's is {here}): prepare it again "
                "with scripts/prepare_data.py --chat and the model's directory"
            )
        if self._loss_on == "assistant" and made["loss_on"] != "assistant":
            raise ValueError(
                f"{directory} was prepared without the assistant turns, which data.loss_on=assistant needs: prepare it again "
                "with --loss-on assistant, or set data.loss_on=everything"
            )


def _mixture(makers: list[Callable[[], Corpus]], parts: list[blend.Part]) -> Mixture:
    return Mixture(tuple(make() for make in makers), tuple(part.share for part in parts))


def _is_prepared(text: str) -> bool:
    return text not in STDLIB and corpus.is_corpus(text)


def _located(text: str, part: str) -> tuple[Path, str]:
    """Directory and part: of a directory the given part, of a prefix its own."""
    path = Path(text)
    return (path, part) if path.is_dir() else (path.parent, path.name)


def _hash(docs: list[Document], begin: Sequence[int], loss_on: str | None) -> str:
    """Hash of names and texts, which results and checkpoints name; of the tokens that documents begin with, if any; and of
    assistant turns."""
    found = stdlib.corpus_hash(docs)
    if loss_on:
        turns = [doc.text.turns for doc in docs]
        return hashlib.sha256(f"{found} chat {loss_on} {turns}".encode()).hexdigest()[:16]
    return hashlib.sha256(f"{found} {list(begin)}".encode()).hexdigest()[:16] if begin else found


def _write(
    docs: list[Document],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    begin: Sequence[int],
    hashed: str,
    loss_on: str | None,
) -> None:
    """Build next to the final directory and rename: several processes may do so at once."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=directory.name + ".", dir=directory.parent))
    dtype = DType.optimal_dtype(len(tokenizer))
    encode = Encoder(
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.eos_token_id,
        dtype.__name__,
        parse_special=bool(loss_on),
        begin=begin,
        loss_on=loss_on,
    )
    writer = PartWriter(staging, "tokens", dtype, scores=loss_on == "assistant")
    try:
        for chunk in chunked(d.text for d in docs):
            for document in encode(chunk).documents():
                writer.add(document.ids, characters=document.characters, digest=document.digest, scored=document.scored)
        chat = {"chat": {"template": template_hash(tokenizer), "loss_on": loss_on}} if loss_on else {}
        about_it = {"tokenizer": about(tokenizer), "begin": list(begin), **chat}
        write_meta(staging, about_it | {"parts": {"tokens": writer.finish() | {"hash": hashed}}})
    except BaseException:
        writer.abandon()
        shutil.rmtree(staging, ignore_errors=True)
        raise
    try:
        os.rename(staging, directory)
    except OSError:  # another process was first, or an unfinished one left its directory
        if (directory / "meta.json").is_file():
            shutil.rmtree(staging)
        else:
            shutil.rmtree(directory)
            os.rename(staging, directory)
