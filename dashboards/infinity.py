"""Queries of the Infinity data source: reads of the service's API in Infinity's query model.

The backend parser is meant throughout: Grafana's server asks, so no browser needs a token. Tables
come as CSV, which costs least; lists that exist as JSON only are named by a plain path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from grafana_foundation_sdk.cog import builder, variants
from grafana_foundation_sdk.models import common

__all__ = ["INFINITY", "PLUGIN", "Column", "Read", "joined", "matrix"]

PLUGIN: Final = "yesoreyeram-infinity-datasource"

INFINITY: Final = common.DataSourceRef(type_val=PLUGIN, uid="${datasource}")

Kind = Literal["string", "number", "timestamp"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of an answer.

    Attributes:
        selector: Its name there; for JSON a path.
        text: Its name in the panel.
        kind: What its values are.
    """

    selector: str
    text: str
    kind: Kind = "number"


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One read of the API.

    Attributes:
        path: Below `/api/v1`; may hold variables.
        columns: What is taken of it; none takes a list of plain values.
        parameters: Of the query; may hold variables.
        root: For JSON, the path of the list; None reads CSV.
    """

    path: str
    columns: tuple[Column, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    root: str | None = None

    def query(self, reference: str) -> dict[str, Any]:
        """What stands in the JSON of a dashboard."""
        table = self.root is None
        parameters = {**self.parameters, "as": "csv"} if table else self.parameters
        return {
            "refId": reference,
            "datasource": INFINITY.to_json(),
            "type": "csv" if table else "json",
            "source": "url",
            "parser": "backend",
            "format": "table",
            "url": f"/api/v1{self.path}",
            "url_options": {
                "method": "GET",
                "data": "",
                "params": [{"key": key, "value": value} for key, value in parameters.items()],
            },
            "root_selector": self.root or "",
            "columns": [
                {"selector": column.selector, "text": column.text, "type": column.kind}
                for column in self.columns
            ],
            "filters": [],
        }

    def builder(self, place: int) -> builder.Builder[variants.Dataquery]:
        """For the SDK's panels; named A, B, ... by its place."""
        return _Built(self.query(chr(ord("A") + place)))


class _Query(variants.Dataquery):
    def __init__(self, members: Mapping[str, Any]) -> None:
        self._members = members

    def to_json(self) -> Mapping[str, Any]:
        return self._members


class _Built(builder.Builder[variants.Dataquery]):
    def __init__(self, members: Mapping[str, Any]) -> None:
        self._members = members

    def build(self) -> variants.Dataquery:
        return _Query(self._members)


def joined(by: str) -> dict[str, Any]:
    """The transformation that makes one frame of several queries."""
    return {"id": "joinByField", "options": {"byField": by, "mode": "outer"}}


def matrix(rows: str, columns: str, value: str, *, numeric_rows: bool) -> list[dict[str, Any]]:
    """Transformations from one line per value to a matrix, both sides in the order they come.

    Args:
        rows: Field of the first column.
        columns: Field whose values become columns.
        value: Field of the cells.
        numeric_rows: Makes the first column numbers, as an axis needs them; otherwise it is text.
    """
    corner = f"{rows}\\{columns}"
    options = {"rowField": rows, "columnField": columns, "valueField": value, "emptyValue": "null"}
    made: list[dict[str, Any]] = [{"id": "groupingToMatrix", "options": options}]
    if numeric_rows:
        number = [{"targetField": corner, "destinationType": "number"}]
        made.append({"id": "convertFieldType", "options": {"fields": {}, "conversions": number}})
        # A step that the first layer has no value for comes after the others.
        made.append({"id": "sortBy", "options": {"fields": {}, "sort": [{"field": corner}]}})
        # nn.Sequential calls its layers 0, 1, ...; a heatmap takes such columns for buckets.
        layer = {"regex": "^(\\d+)$", "renamePattern": "layer $1"}
        made.append({"id": "renameByRegex", "options": layer})
    return made
