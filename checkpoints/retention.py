"""Which checkpoints are removed, and the clearing up after saves that were killed.

Resume points (``step000400``) beyond the newest few go; checkpoints of a compression ratio (``cr2``) and
``final`` stay. A checkpoint vanishes at once, by a rename, before its files are removed: a kill in between
leaves a hidden directory, which the next start removes.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from checkpoints.integrity import MARKER, looks_whole

_RESUME_POINT = re.compile(r"step\d+")
_LEFTOVER = re.compile(r"\.(.+)\.([0-9a-f]+\.staging|trash)|newest\.tmp")
_RETIRED = re.compile(r"\.(.+)\.old")


def retired(final: Path) -> Path:
    """Where a checkpoint waits while its successor of the same name takes its place."""
    return final.with_name(f".{final.name}.old")


def remove_outdated(directory: Path, newest: str, keep_last: int) -> None:
    """Remove all but the last ``keep_last`` checkpoints (0 keeps all); ``newest`` stays in any case.

    Only whole ones count, and only whole ones are removed: what is damaged is left for a person to look at.
    """
    if not keep_last:
        return
    points = [p for p in directory.iterdir() if _RESUME_POINT.fullmatch(p.name) and looks_whole(p)]
    points.sort(key=lambda p: (p.name == newest, (p / MARKER).stat().st_mtime_ns), reverse=True)
    for path in points[keep_last:]:
        trash = path.with_name(f".{path.name}.trash")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def clean(directory: Path) -> None:
    """Remove what killed saves left in ``directory``; put back a checkpoint whose successor never came."""
    for path in list(directory.iterdir()) if directory.is_dir() else []:
        replaced = _RETIRED.fullmatch(path.name)
        if replaced and not (final := directory / replaced[1]).exists():
            os.rename(path, final)
        elif replaced or _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
