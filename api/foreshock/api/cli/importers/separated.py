"""How a table of text is written: what stands between cells, and in numbers. Pure.

Where the comma is the decimal sign, programs part cells by semicolons.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Sequence
from typing import Final

__all__ = ["decimal_commas", "encoding_of", "rows_of", "separator_of", "with_points"]

_SEPARATORS: Final = (",", ";", "\t")
_WITH_COMMA: Final = re.compile(r"\s*[+-]?\d+,\d+([eE][+-]?\d+)?\s*")
_WITH_POINT: Final = re.compile(r"\s*[+-]?\d*\.\d+([eE][+-]?\d+)?\s*")


def encoding_of(head: bytes) -> str:
    """The encoding that a file's first bytes tell; UTF-8 where they tell none."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"


def separator_of(text: str) -> str:
    """What parts the cells of the first line that is not empty into most pieces."""
    line = next((line for line in text.splitlines() if line.strip()), "")

    def cells(separator: str) -> int:
        return max((len(row) for row in csv.reader([line], delimiter=separator)), default=0)

    return max(_SEPARATORS, key=cells)


def rows_of(text: str) -> tuple[str, list[list[str]]]:
    """The separator, and all rows that are not empty.

    Raises:
        csv.Error: A quote is not closed, or stands where none may.
    """
    separator = separator_of(text)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    return separator, [row for row in lines if any(cell.strip() for cell in row)]


def decimal_commas(separator: str, rows: Sequence[Sequence[str]]) -> bool:
    """Whether numbers are written with a comma: some have one, and none has a point."""
    if separator == ",":
        return False
    cells = [cell for row in rows for cell in row]
    return any(map(_WITH_COMMA.fullmatch, cells)) and not any(map(_WITH_POINT.fullmatch, cells))


def with_points(row: Sequence[str]) -> list[str]:
    """A row with its decimal commas as points."""
    return [cell.replace(",", ".") if _WITH_COMMA.fullmatch(cell) else cell for cell in row]
