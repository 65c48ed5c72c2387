"""How records stand in a request or an answer, for the description: JSON schema beside Arrow.

The schema is the contract of `foreshock.monitor.record`, which checks what comes in.
"""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa

from foreshock.api.examples import RECORDS
from foreshock.api.wire import ARROW, JSON
from foreshock.monitor.record import ROLES, TENSOR_TYPE

__all__ = [
    "BINARY",
    "CSV",
    "PARQUET",
    "RECORDS_ANSWER",
    "RECORDS_BODY",
    "RECORDS_SCHEMA",
    "TABLE_ANSWER",
]

PARQUET: Final = "application/vnd.apache.parquet"
CSV: Final = "text/csv"
BINARY: Final = {"type": "string", "format": "binary"}

_INT32: Final = {"type": ["integer", "null"], "minimum": -(2**31), "maximum": 2**31 - 1}
_NUMBER: Final = {
    "anyOf": [{"type": ["number", "null"]}, {"enum": ["NaN", "Infinity", "-Infinity"]}]
}
_TEXT: Final = {"type": ["string", "null"]}
_EVENT: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["kind"],
    "properties": {
        "kind": {"type": "string"},
        "micro_batch": _INT32,
        "layer": _TEXT,
        "role": _TEXT,
        "rank": _INT32,
        "detail": _TEXT,
    },
}


def _tensor() -> dict[str, Any]:
    given: dict[str, Any] = {
        "role": {"enum": list(ROLES)},
        "numel": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
        "granularity": {"enum": ["tensor", "row", "block"]},
    }
    properties = {field.name: given.get(field.name, _schema(field.type)) for field in TENSOR_TYPE}
    for name in ("layer", "format"):
        properties[name] = {"type": "string"}
    return {
        "type": "object",
        "required": ["layer", "role", "format", "numel"],
        "properties": properties,
    }


def _schema(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_floating(kind):
        return _NUMBER
    if pa.types.is_boolean(kind):
        return {"type": ["boolean", "null"]}
    if pa.types.is_integer(kind):
        return {"type": ["integer", "null"]}
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return {"type": ["array", "null"], "items": {"type": "integer"}}
    return _TEXT


RECORDS_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["records"],
    "properties": {
        "records": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["step", "time"],
                "properties": {
                    "step": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
                    "time": {"type": "string", "format": "date-time"},
                    "scalars": {"type": "object", "additionalProperties": _NUMBER},
                    "events": {"type": "array", "items": _EVENT},
                    "tensors": {"type": "array", "items": _tensor()},
                },
            },
        }
    },
}

RECORDS_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {"schema": RECORDS_SCHEMA, "examples": {"two steps": {"value": RECORDS}}},
            ARROW: {"schema": BINARY},
        },
    }
}

RECORDS_ANSWER: Final[dict[str, Any]] = {
    JSON: {"schema": RECORDS_SCHEMA, "examples": {"two steps": {"value": RECORDS}}},
    ARROW: {"schema": BINARY},
    PARQUET: {"schema": BINARY},
    CSV: {
        "schema": {"type": "string"},
        "examples": {
            "two steps": {
                "value": "step,time,grad_norm,loss\n"
                "0,2026-01-31T12:00:00+00:00,1.2,5.5\n1,2026-01-31T12:00:01+00:00,,NaN\n"
            }
        },
    },
}

TABLE_ANSWER: Final[dict[str, Any]] = {
    ARROW: {"schema": BINARY},
    PARQUET: {"schema": BINARY},
    CSV: {
        "schema": {"type": "string"},
        "examples": {"some rows": {"value": "step,min,mean,max,nonfinite\n0,2.5,2.6,2.7,0\n"}},
    },
}
"""Beside the JSON of a route's model: the same rows."""
