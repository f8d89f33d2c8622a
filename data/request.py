"""What to read: files, directories, or datasets on the Hub."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """What to read.

    Attributes:
        names: files, patterns such as ``'part-*.jsonl.xz'``, directories, or names of datasets on the Hub.
        column: that holds the text.
        config: of a Hub dataset that has several.
        split: of a Hub or saved dataset.
        revision: branch, tag or commit of a Hub dataset.
        streaming: read a Hub dataset as it comes; otherwise download it to the library's cache first.
        txt_documents: what one document of a ``.txt`` file is: ``file``, ``paragraph`` or ``line``.
    """

    names: list[str]
    column: str = "text"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True
    txt_documents: str = "file"
