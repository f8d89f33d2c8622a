"""Counts of what a source holds besides texts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Skipped:
    """Documents and files that hold no text and are left out.

    Attributes:
        blank: documents that are empty or white space alone.
        null: documents without a text: null, or a JSON object without the column.
        files: files without a document: 0 bytes, or a table without rows.
    """

    blank: int = 0
    null: int = 0
    files: int = 0

    def __bool__(self) -> bool:
        """True if anything was left out."""
        return bool(self.blank or self.null or self.files)

    def __add__(self, other: Skipped) -> Skipped:
        """The sum of two counts."""
        return Skipped(self.blank + other.blank, self.null + other.null, self.files + other.files)

    def __str__(self) -> str:
        """Such as ``2 blank documents, 1 null document, 3 empty files``."""
        counts = ((self.blank, "blank document"), (self.null, "null document"), (self.files, "empty file"))
        return ", ".join(f"{count} {what}{'s' if count > 1 else ''}" for count, what in counts if count)
