"""Records as JSON that survives what we exist to report: NaN and infinities stand as strings.

The only place where numbers of a record become JSON or come from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa

from foreshock.monitor.record.convert import records_to_table, table_to_records
from foreshock.monitor.record.model import RecordError, StepRecord
from foreshock.monitor.record.schema import EVENT_TYPE, SCHEMA, TENSOR_TYPE, validate

__all__ = [
    "decode_number",
    "encode_number",
    "json_to_table",
    "records_from_json",
    "records_to_json",
]

_WORDS: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode_number(value: float | None) -> float | str | None:
    """A number for JSON: non-finite ones become "NaN", "Infinity" or "-Infinity"."""
    if value is None or math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def decode_number(value: object, where: str, index: int | None = None) -> float | None:
    """A number from JSON, or None for null.

    Raises:
        RecordError: Anything else; names `where` and the allowed words.
    """
    if value is None:
        return None
    if isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError(
            f'{where} is {value!r}; allowed: a number, null, "NaN", "Infinity", "-Infinity"', index
        )
    return float(value)


def records_to_json(records: Iterable[StepRecord]) -> bytes:
    """`{"records": [...]}` as UTF-8; nulls inside a tensor are left out."""
    rows = records_to_table(records).to_pylist()
    body = {"records": [_row_to_json(row) for row in rows]}
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()


def _row_to_json(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": row["step"],
        "time": row["time"].isoformat(),
        "scalars": {k: encode_number(v) for k, v in row["scalars"]},
        "events": [_known(event) for event in row["events"]],
        "tensors": [_known(tensor) for tensor in row["tensors"]],
    }


def _known(row: dict[str, Any]) -> dict[str, Any]:
    return {
        k: encode_number(v) if isinstance(v, float) else v for k, v in row.items() if v is not None
    }


def records_from_json(body: bytes | str) -> list[StepRecord]:
    """Read `{"records": [...]}`.

    Raises:
        RecordError: No JSON, no such shape, or a record that breaks the contract.
    """
    return table_to_records(json_to_table(body))


def json_to_table(body: bytes | str) -> pa.Table:
    """Read `{"records": [...]}` into a validated table.

    Raises:
        RecordError: As `records_from_json`.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}") from None
    rows = document.get("records") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise RecordError('the body is not {"records": [...]}')
    prepared = [_row_from_json(row, index) for index, row in enumerate(rows)]
    try:
        table = pa.Table.from_pylist(prepared, schema=SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, ValueError, TypeError) as error:
        raise RecordError(_first_line(error)) from None
    return validate(table)


def _row_from_json(row: object, index: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RecordError("a record is not an object", index)
    scalars = row.get("scalars") or {}
    if not isinstance(scalars, dict):
        raise RecordError("scalars is not an object", index)
    return {
        "step": _integer(row.get("step"), "step", index),
        "time": _time(row.get("time"), index),
        "scalars": [(k, decode_number(v, f"scalar {k!r}", index)) for k, v in scalars.items()],
        "events": _structs(row.get("events"), EVENT_TYPE, "events", index),
        "tensors": _structs(row.get("tensors"), TENSOR_TYPE, "tensors", index),
    }


def _integer(value: object, where: str, index: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise RecordError(f"{where} is {value!r}; allowed: a 64-bit integer", index)
    return value


def _time(value: object, index: int) -> datetime:
    if not isinstance(value, str):
        raise RecordError('time is missing; give ISO 8601, e.g. "2026-01-31T12:00:00+00:00"', index)
    try:
        parsed = datetime.fromisoformat(value)
    except ValueError:
        raise RecordError(f"time {value!r} is not ISO 8601", index) from None
    if parsed.tzinfo is None:
        raise RecordError(f"time {value!r} has no timezone; end it in Z or +00:00", index)
    try:
        return parsed.astimezone(UTC)
    except OverflowError:
        raise RecordError(f"time {value!r} is out of range", index) from None


def _structs(value: object, to: pa.DataType, where: str, index: int) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RecordError(f"{where} is not a list of objects", index)
    return [{f.name: _member(item.get(f.name), f, where, index) for f in to} for item in value]


def _member(value: object, field: pa.Field, where: str, index: int) -> object:
    if pa.types.is_floating(field.type):
        return decode_number(value, f"{where}.{field.name}", index)
    if pa.types.is_integer(field.type):
        return _integer(value, f"{where}.{field.name}", index)
    if pa.types.is_list(field.type):
        return _integers(value, f"{where}.{field.name}", index)
    wanted = bool if pa.types.is_boolean(field.type) else str
    if value is not None and not isinstance(value, wanted):
        raise RecordError(f"{where}.{field.name} is {value!r}; allowed: {wanted.__name__}", index)
    return value


def _integers(value: object, where: str, index: int) -> list[int | None] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise RecordError(f"{where} is {value!r}; allowed: a list of integers", index)
    return [_integer(item, where, index) for item in value]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
