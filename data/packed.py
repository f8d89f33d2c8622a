"""Compressed files (.xz .gz .bz2 .zst) as streams of bytes that are decompressed while they are read."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import lzma
from pathlib import PurePath
from typing import Any, BinaryIO

PACKED = (".xz", ".gz", ".bz2", ".zst")
_BLOCK = 2**17  # compressed bytes that are read at once
_WINDOW = 2**31  # bytes; `zstd --long=31` needs them, the library allows 2^27 unless it is told


def is_packed(name: str) -> bool:
    """True if the name ends like that of a compressed file."""
    return PurePath(name).suffix in PACKED


def check(name: str) -> None:
    """Raise now what opening the file would raise for lack of a package.

    Raises:
        ValueError: if the file is a ``.zst`` and the package zstandard is missing.
    """
    if PurePath(name).suffix == ".zst" and not _has_zstandard():
        raise ValueError(
            f"{name} is compressed with Zstandard: install the package zstandard (pip install zstandard; it is in this "
            "project's extra 'data')"
        )


def unpacked(raw: BinaryIO, name: str) -> Any:
    """The content of an open file, decompressed if its name says that it is compressed.

    All members of a file are read (several ``.gz`` or frames one after the other). A file that was cut short raises
    EOFError when its end is reached.
    """
    suffix = PurePath(name).suffix
    if suffix == ".xz":
        return lzma.open(raw)
    if suffix == ".gz":
        return io.BufferedReader(gzip.open(raw), 2**20)
    if suffix == ".bz2":
        return bz2.open(raw)
    if suffix == ".zst":
        check(name)
        return io.BufferedReader(_Zstandard(raw), 2**20)
    return raw


def unpacked_size(head: bytes, size: int, name: str) -> int:
    """Bytes of a file once decompressed, estimated from its first bytes ``head`` and its size as it is stored."""
    if not is_packed(name) or not head:
        return size
    stream, found = unpacked(io.BytesIO(head), name), 0
    try:
        while part := stream.read1(2**20):
            found += len(part)
    except Exception:  # the head ends in the middle, or the file is damaged, which reading it will report
        pass
    return found * size // len(head) if found else size


def _has_zstandard() -> bool:
    try:
        return importlib.util.find_spec("zstandard") is not None
    except ValueError:  # sys.modules holds None for it
        return False


class _Zstandard(io.RawIOBase):
    """Zstandard frames one after the other; zstandard's own reader stops after the first, or at a cut, without an error."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._frames = raw, zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        self._frame: Any = None  # in the middle of which we are
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._packed or self._raw.read(_BLOCK)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a Zstandard frame")
                return 0
            self._frame = self._frame or self._frames.decompressobj()
            self._ready, self._packed = memoryview(self._frame.decompress(packed)), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
