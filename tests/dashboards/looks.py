"""What every panel showed at one moment, and what was stored then."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from dashboards.build import DASHBOARDS
from dashboards.frames import Frame, from_infinity, transformed
from dashboards.parts import FLEET, NUMERICS, RUN
from dashboards.queries import (
    PanelQuery,
    ServiceRead,
    annotation_queries,
    panel_queries,
    panels,
    service_read,
)

from foreshock.api.alert_log import ALERT_NAMES
from foreshock.api.exposition import LAYER_STATISTICS
from foreshock.monitor.record import StepRecord, records_from_json
from tests.dashboards.prometheus import Prometheus, Vector, labels
from tests.dashboards.real_plan import NAME
from tests.dashboards.service import Service

WINDOW = "15s"
LAYER = "blocks.1.mlp.down"
BY_HAND = "by-hand"
OPERANDS = ("input", "weight", "grad_output")
BOARDS = {board["uid"]: board for board in (make() for make in DASHBOARDS)}
VARIABLES = {
    "job": "foreshock",
    "instance": ".+",
    "project": "default",
    "run": NAME,
    "role": "input",
    "layer": LAYER,
    "format": "mxfp8_e4m3",
    "first_step": "0",
    "last_step": "1000000000000",
    "__rate_interval": WINDOW,
}
# What this trainer has none of is shown of records made by hand.
OF_OTHER_RUNS = {"Automatic gradient scale mu": {"project": "hand", "run": BY_HAND}}
OVER_TIME = [
    query
    for uid in (FLEET, RUN)
    for query in (
        *panel_queries(BOARDS[uid], VARIABLES),
        *annotation_queries(BOARDS[uid], VARIABLES),
    )
    if isinstance(query, PanelQuery)
]
ON_STEPS = list(panels(BOARDS[NUMERICS]))


def variables(panel: Mapping[str, Any]) -> dict[str, str]:
    if panel["title"] in OF_OTHER_RUNS:
        return VARIABLES | OF_OTHER_RUNS[panel["title"]]
    return VARIABLES


def reads(panel: Mapping[str, Any]) -> list[ServiceRead]:
    return [service_read(panel["title"], t, variables(panel)) for t in panel["targets"]]


@dataclass(frozen=True)
class Look:
    """All that was shown at one moment, and all that was stored."""

    panels: Mapping[str, Vector]
    frames: Mapping[str, tuple[list[Frame], list[Frame]]]
    store: Mapping[str, Vector]
    records: Mapping[str, list[StepRecord]]


def look(prometheus: Prometheus, service: Service) -> Look:
    client = service.client
    return Look(
        panels={query.expression: prometheus.ask(query.expression) for query in OVER_TIME},
        frames={panel["title"]: framed(client, panel) for panel in ON_STEPS},
        store=stored(client),
        records={
            run: records_of(client, run, project)
            for run, project in ((NAME, "default"), (BY_HAND, "hand"))
        },
    )


def get(client: httpx.Client, path: str, **query: str | int) -> Any:
    answer = client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def records_of(client: httpx.Client, run: str, project: str = "default") -> list[StepRecord]:
    answer = client.get(f"/api/v1/runs/{run}/records", params={"project": project})
    return list(records_from_json(answer.content))


def asked(client: httpx.Client, read: ServiceRead) -> Frame:
    answer = client.get(read.path, params=dict(read.parameters))
    assert answer.status_code == 200, answer.text
    return from_infinity(answer.text if read.query["type"] == "csv" else answer.json(), read.query)


def framed(client: httpx.Client, panel: Mapping[str, Any]) -> tuple[list[Frame], list[Frame]]:
    """Frames of each query, and of the panel after its transformations."""
    raw = [asked(client, read) for read in reads(panel)]
    return raw, transformed(raw, panel.get("transformations", ()))


# What the store holds, by metric


def stored(client: httpx.Client) -> dict[str, Vector]:
    records = records_of(client, NAME)
    newest = {name: value for record in records for name, value in record.scalars.items()}
    risk = get(client, f"/api/v1/runs/{NAME}/risk")
    saved = [r.time.timestamp() for r in records for e in r.events if e.kind == "checkpoint"]
    last = records[-1]
    firing = get(client, "/api/v1/alerts", state="firing")["alerts"]
    found: dict[str, Vector] = {
        "foreshock_step": {labels(): last.step},
        "foreshock_loss": {labels(): newest["loss"]},
        "foreshock_gradient_norm": {labels(): newest["grad_norm"]},
        "foreshock_learning_rate": {labels(): newest["learning_rate"]},
        "foreshock_step_seconds": {labels(): newest["step_seconds"]},
        "foreshock_monitor_overhead_ratio": {labels(): newest["overhead_ratio"]},
        "foreshock_divergence_risk_ratio": {
            labels(horizon=horizon): float(value)
            for horizon, value in risk["probability"].items()
            if value is not None
        },
        "foreshock_expected_lead_steps": {}
        if risk["expected_lead"] is None
        else {labels(): risk["expected_lead"]},
        "foreshock_at_risk_seconds": {labels(): risk["hours_at_risk"] * 3600},
        "foreshock_last_checkpoint_timestamp_seconds": {labels(): max(saved)},
        "foreshock_alert_state": {
            labels(): ("ok", "pending", "firing", "resolved").index(risk["state"])
        },
        "foreshock_alert_firing": {
            labels(kind=kind): float(any(a["kind"] == kind for a in firing)) for kind in ALERT_NAMES
        },
    }
    for known in LAYER_STATISTICS:
        worst, layers = worst_of(records, known.statistic, known.worst == "largest")
        found[f"foreshock_{known.suffix}"] = worst
        found[f"foreshock_layer_{known.suffix}"] = layers
    return found


def worst_of(records: list[StepRecord], statistic: str, largest: bool) -> tuple[Vector, Vector]:
    pick = max if largest else min
    measured = next(record for record in reversed(records) if record.tensors)
    layers: Vector = {}
    by_role: dict[str, list[float]] = defaultdict(list)
    for tensor in measured.tensors:
        value = getattr(tensor, statistic)
        identity = tensor.identity
        if value is not None and not identity.what_if and identity.role in OPERANDS:
            layers[labels(layer=identity.layer, role=identity.role)] = value
            by_role[identity.role].append(value)
    return {labels(role=role): pick(values) for role, values in by_role.items()}, layers
