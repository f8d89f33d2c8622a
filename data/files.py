"""Documents of small texts that are read whole: ``.txt`` and ``.jsonl`` files, plain or ``.xz``."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

from data.stdlib import Document


def read_files(names: str) -> list[Document]:
    """Documents of comma-separated ``.txt`` and ``.jsonl`` files, plain or ``.xz``.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    docs: list[Document] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        path = Path(name)
        if path.is_dir():
            raise ValueError(f"{name} is a directory: several prepared corpora are given with weights, as in 0.5:A,0.5:B")
        if not path.is_file():
            raise ValueError(f"no text file or prepared corpus at {name}")
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
