"""The queries in a dashboard's JSON as Grafana would send them, variables filled in.

For whoever runs a dashboard without Grafana: the tests, and the pictures of the documentation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

__all__ = ["PanelQuery", "ServiceRead", "annotation_queries", "panel_queries", "panels"]

_VARIABLE: Final = re.compile(r"\$\{(\w+)(?::(\w+))?\}|\$(\w+)")
_FORMATS: Final[Mapping[str, Callable[[str], str]]] = {
    "": str,
    "percentencode": lambda text: quote(text, safe=""),
}


@dataclass(frozen=True, slots=True)
class PanelQuery:
    """One PromQL expression of one panel, ready to be asked.

    Attributes:
        panel: Title of the panel.
        reference: A, B, ...
        legend: Legend format.
        expression: PromQL without variables.
        instant: Asked for the newest value, not over time.
    """

    panel: str
    reference: str
    legend: str
    expression: str
    instant: bool


@dataclass(frozen=True, slots=True)
class ServiceRead:
    """One read of the service through Infinity, ready to be asked.

    Attributes:
        panel: Title of the panel.
        reference: A, B, ...
        path: With `/api/v1`.
        parameters: Of the query.
        query: As it stands in the dashboard, for what is made of the answer.
    """

    panel: str
    reference: str
    path: str
    parameters: Mapping[str, str]
    query: Mapping[str, Any]


def panels(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every panel but the rows; those in closed rows too."""
    for panel in document["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels", ())
        else:
            yield panel


def panel_queries(
    document: Mapping[str, Any], variables: Mapping[str, str]
) -> Iterator[PanelQuery | ServiceRead]:
    """Every query of a dashboard.

    Args:
        document: The dashboard's JSON.
        variables: Value of each variable, `__rate_interval` among them.

    Raises:
        KeyError: A query names a variable that has no value.
    """
    for panel in panels(document):
        for target in panel.get("targets", ()):
            if "expr" in target:
                yield PanelQuery(
                    panel["title"],
                    target["refId"],
                    target.get("legendFormat", ""),
                    _filled(target["expr"], variables),
                    bool(target.get("instant")),
                )
            else:
                yield service_read(panel["title"], target, variables)


def service_read(
    panel: str, target: Mapping[str, Any], variables: Mapping[str, str]
) -> ServiceRead:
    """A query of Infinity as the request that it makes."""
    given = {p["key"]: _filled(p["value"], variables) for p in target["url_options"]["params"]}
    return ServiceRead(panel, target["refId"], _filled(target["url"], variables), given, target)


def annotation_queries(
    document: Mapping[str, Any], variables: Mapping[str, str]
) -> Iterator[PanelQuery]:
    """The expressions behind a dashboard's marks."""
    for each in document.get("annotations", {}).get("list", ()):
        expression = _filled(each["expr"], variables)
        yield PanelQuery(each["name"], "A", each["titleFormat"], expression, instant=False)


def _filled(text: str, variables: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        return _FORMATS[found[2] or ""](variables[found[1] or found[3]])

    return _VARIABLE.sub(value, text)
