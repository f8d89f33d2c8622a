"""The column that holds the texts: what is asked of records and of the schemas of tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow

_PATIENCE = 1000  # JSON records without the column, before the first with it, after which it is called missing


class Unreadable(ValueError):
    """One sentence about a source that cannot be read."""


class Column:
    """One column of every file of a request.

    A JSON record may leave a null field out, so records without the column count as null texts, unless no record has it.
    """

    structured = False  # True: values are not texts but lists and objects, as only JSON and Arrow hold them

    def __init__(self, name: str = "text") -> None:
        self.name = name
        self._found, self._without, self._first = False, 0, ""

    def of(self, record: object, where: str) -> str | None:
        """The text of a JSON record.

        Args:
            record: the parsed record.
            where: names the record in an error.

        Raises:
            Unreadable: if it is not an object, the value is not text, or there seems to be no such column.
        """
        if not isinstance(record, dict):
            raise Unreadable(f'{where} is not an object such as {{"{self.name}": "..."}}: fix or remove it')
        if self.name in record:
            self._found = True
            return self.text(record[self.name], where)
        self._without += 1
        self._first = self._first or _missing(where, self.name, record)
        if self._without >= _PATIENCE:
            self.end()
        return None

    def text(self, value: object, where: str) -> str | None:
        """The value if it is a text or null.

        Raises:
            Unreadable: for any other.
        """
        if value is None:
            return None
        if not isinstance(value, str):
            raise Unreadable(f"{where} has a {type(value).__name__} in column {self.name!r}: it must be text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Unreadable(
                f"{where} has half a surrogate pair in column {self.name!r}, at character {error.start}, which is not a "
                "character: fix or remove it"
            ) from None
        return value

    def in_table(self, names: Iterable[str], where: str) -> None:
        """Check that a table with rows has the column.

        Raises:
            Unreadable: naming the columns that it has.
        """
        names = list(names)
        if self.name not in names:
            raise Unreadable(_missing(where, self.name, names))
        self._found = True

    def of_type(self, kind: pyarrow.DataType, where: str) -> None:
        """Check that an Arrow column holds texts.

        Raises:
            Unreadable: naming the type.
        """
        import pyarrow as pa

        inner = kind.value_type if pa.types.is_dictionary(kind) else kind
        known = (pa.string(), pa.large_string(), pa.string_view(), pa.null())
        if inner not in known:
            raise Unreadable(f"{where} has values of type {kind} in column {self.name!r}: they must be text")

    def end(self) -> None:
        """Called when all was read.

        Raises:
            Unreadable: if there were records, and none had the column.
        """
        if self._without and not self._found:
            raise Unreadable(self._first)


def _missing(where: str, name: str, names: Iterable[str]) -> str:
    return (
        f"{where} has no column {name!r}, it has {', '.join(names) or 'none'}: choose one with --text-column of "
        "scripts/prepare_data.py"
    )
