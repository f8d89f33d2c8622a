"""Measures the cells of a grid one by one and keeps what is done, so that a stopped run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from dmc.engine import LLM
from dmc.evaluation import former
from dmc.evaluation.grid import Cell, codec_settings
from dmc.evaluation.measure import measure, prefill
from dmc.evaluation.provenance import hardware, model_hash
from dmc.evaluation.reference import Reference, reference
from dmc.evaluation.windows import Windows

RESULTS = "results.jsonl"
SCHEMA = 1
"""Version of a row's fields. It rises when a field changes its meaning or goes; rows older than this field have none."""


def run(
    cells: Sequence[Cell],
    windows: Windows,
    base: Path,
    out: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    store: Path | None = None,
    after: Callable[[list[dict]], None] | None = None,
) -> list[dict]:
    """Measures what ``out/results.jsonl`` does not hold yet.

    Args:
        cells: of `dmc.evaluation.grid.cells`.
        windows: of the text.
        base: the uncompressed model.
        out: made if it is not there.
        device, dtype: as `LLM` takes them.
        store: of references; None: ``out/references``.
        after: called with all rows of the grid that are there, each time one is added.

    Returns:
        One row a cell, in order: ``schema``, ``key``, ``model``, ``policy``, ``codec`` (as written), and ``result`` (the fields
        of `Measurement`), or ``error``, one sentence. A cell that failed is tried again by the next run.

    Raises:
        ValueError: if the base is not a plain model, the windows do not fit it, or another run writes to ``out``.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _opened(out / RESULTS) as file:
        known = _rows(file, device, dtype)
        keys = [_key(cell, windows, base, device, dtype) for cell in cells]
        if all(_done(known.get(key)) for key in keys):
            return [known[key] for key in keys]
        llm = LLM(base, policy="full", device=device, dtype=dtype, max_batch=1)
        wanted = reference(base, windows, store=store or out / "references", dtype=llm.model.dtype, device=llm.model.device)
        del llm
        todo = [(cell, key) for cell, key in zip(cells, keys, strict=True) if not _done(known.get(key))]
        for row in _measured(todo, windows, wanted, device, dtype, skipped=len(cells) - len(todo)):
            known[row["key"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
            if after:
                after([known[key] for key in keys if key in known])
    return [known[key] for key in keys]


def _measured(
    todo: list[tuple[Cell, str]], windows: Windows, wanted: Reference, device: str, dtype: str, *, skipped: int
) -> Iterator[dict]:
    """Rows of cells; what fails becomes a row that says so."""
    steps = len(windows.tokens) * windows.scored
    prompts: tuple[object, list] = (None, [])
    with tqdm(total=len(todo) * steps, unit="token", smoothing=0.05, dynamic_ncols=True) as bar:
        for number, (cell, key) in enumerate(todo):
            bar.set_description(f"{skipped + number + 1}/{skipped + len(todo)} {cell.model.name} {cell.policy} {cell.codec}")
            row: dict = {
                "schema": SCHEMA,
                "key": key,
                "model": cell.model.resolve().name,
                "policy": str(cell.policy),
                "codec": str(cell.codec),
            }
            started = time.perf_counter()
            try:
                llm = _load(cell, device, dtype, min(len(windows.tokens), 64))
                if prompts[0] != (cell.model, cell.policy):
                    prompts = (cell.model, cell.policy), prefill(llm, windows)
                result = measure(llm, windows, reference=wanted, prompts=prompts[1], progress=bar.update)
                row["result"], row["hardware"] = asdict(result), hardware(result.device)
            except (ValueError, RuntimeError) as error:  # rejected, or out of memory; other exceptions are bugs
                if getattr(error, "__notes__", None):  # raised by the user's policy itself (`dmc.cache.reading.asking`)
                    raise
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            bar.n = (number + 1) * steps  # a failed cell did not complete its progress
            bar.refresh()
            row["seconds"] = round(time.perf_counter() - started, 2)
            yield json.loads(json.dumps(row))  # as it will be read from the file


def _load(cell: Cell, device: str, dtype: str, batch: int) -> LLM:
    own, cache = codec_settings(cell.codec)
    return LLM(
        cell.model,
        policy=cell.policy.name,
        policy_settings=dict(cell.policy.settings),
        codec=cell.codec.name,
        codec_settings=own,
        device=device,
        dtype=dtype,
        max_batch=batch,
        **cache,
    )


def _key(cell: Cell, windows: Windows, base: Path, device: str, dtype: str) -> str:
    """Return the hash of everything that a row depends on, except the code (the row has the commit)."""
    parts = [model_hash(cell.model), str(cell.policy), str(cell.codec), windows.hash, model_hash(base), device, dtype]
    files = [*cell.codec.settings, *cell.policy.settings]
    parts += [_digest(value) for name, value in files if name in ("file", "decisions")]  # the content, not the path alone
    return former.key(parts)


def _digest(path: str) -> str | None:
    """Return the SHA-256 of a file; None if it cannot be read (loading the cell then reports the error)."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _done(row: dict | None) -> bool:
    return row is not None and "result" in row


@contextmanager
def _opened(path: Path) -> Iterator:
    """Open for reading and appending, locked against a second run; an incomplete last line is removed."""
    import fcntl

    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {path}: wait for it, or give another --out") from None
        file.seek(0)
        text = file.read()
        whole = text.rfind("\n") + 1
        if whole < len(text):
            file.truncate(len(text[:whole].encode()))
        yield file


def _rows(file: TextIO, device: str, dtype: str) -> dict[str, dict]:
    """By key; of several with one key the last. Codecs have the names of today."""
    file.seek(0)
    rows = {}
    for number, line in enumerate(file, 1):
        try:
            row = former.renamed(json.loads(line), device, dtype)
            rows[row["key"]], schema = row, int(row.get("schema", 1))
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"line {number} of {file.name} is not a result of a frontier: fix or remove it") from None
        if schema > SCHEMA:
            raise ValueError(f"line {number} of {file.name} has schema {schema}, of a later version of dmc: give another --out")
    return rows
