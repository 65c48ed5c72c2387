"""A risk as a row of the store and as JSON: one shape for routes, events and the page.

Computes nothing and reads no store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from foreshock.api.store_schema import RISK_SCHEMA
from foreshock.monitor.record import HORIZONS, Risk, encode_number

__all__ = ["risk_document", "risk_history", "risk_table", "stored_risk"]


def risk_table(risks: Iterable[tuple[datetime, Risk]]) -> pa.Table:
    """Risks with the times of their steps as a table of `RISK_SCHEMA`."""
    rows = [row for time, risk in risks for row in _rows(time, risk)]
    return pa.Table.from_pylist(rows, schema=RISK_SCHEMA)


def _rows(time: datetime, risk: Risk) -> list[dict[str, Any]]:
    common = {
        "step": risk.step,
        "time": time,
        "expected_lead": risk.expected_lead,
        "kind": risk.kind,
        "state": risk.state,
        "model_version": risk.model_version,
    }
    rows = []
    for horizon in HORIZONS:
        low, high = risk.band.get(horizon, (None, None))
        probability = risk.probability.get(horizon)
        rows.append(
            common | {"horizon": horizon, "probability": probability, "low": low, "high": high}
        )
    return rows


def risk_document(risk: Risk) -> dict[str, Any]:
    """A risk as JSON values; non-finite numbers as words."""
    return {
        "step": risk.step,
        "probability": _by_horizon(risk.probability),
        "band": {str(h): [encode_number(end) for end in ends] for h, ends in risk.band.items()},
        "reasons": {str(h): reason for h, reason in risk.reasons.items()},
        "expected_lead": encode_number(risk.expected_lead),
        "kind": risk.kind,
        "state": risk.state,
        "drivers": _drivers(risk),
        "model_version": risk.model_version,
    }


def _by_horizon(values: Mapping[int, float | None]) -> dict[str, float | str | None]:
    return {str(horizon): encode_number(values.get(horizon)) for horizon in HORIZONS}


def _drivers(risk: Risk) -> Sequence[Mapping[str, Any]]:
    return [
        {
            "signal": driver.signal,
            "contribution": encode_number(driver.contribution),
            "layer": driver.layer,
        }
        for driver in risk.drivers
    ]


def risk_history(table: pa.Table, points: int) -> dict[str, Any]:
    """Stored risks as columns, thinned to the row of the highest risk of each stretch.

    Args:
        table: Rows of `RISK_SCHEMA`, one per step and horizon, in any order.
        points: At most so many steps.

    Returns:
        `step`, `state` and `kind` lists, and `probability`, `low`, `high` lists per horizon.
    """
    steps, rows = np.unique(table["step"].to_numpy(), return_inverse=True)
    horizons = table["horizon"].to_numpy()
    columns: dict[str, Any] = {}
    for part in ("probability", "low", "high"):
        values = table[part].to_numpy().astype(np.float64)
        columns[part] = {h: np.full(len(steps), np.nan) for h in HORIZONS}
        for horizon in HORIZONS:
            mine = horizons == horizon
            columns[part][horizon][rows[mine]] = values[mine]
    chosen = _peaks(np.stack([columns["probability"][h] for h in HORIZONS]), points)
    first = np.unique(rows, return_index=True)[1][chosen]
    texts = {name: table[name].take(pa.array(first)).to_pylist() for name in ("state", "kind")}
    numbers = {
        part: {str(h): [_known(v) for v in values[chosen]] for h, values in by_horizon.items()}
        for part, by_horizon in columns.items()
    }
    return {"step": steps[chosen].tolist(), **numbers, **texts}


def _known(value: float) -> float | None:
    # A probability is never NaN; in these columns NaN stands for null.
    return None if np.isnan(value) else float(value)


def _peaks(
    probability: np.ndarray[Any, np.dtype[np.float64]], points: int
) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Places of the highest risk (any horizon; none is lowest) of each stretch, and the last."""
    count = probability.shape[1]
    if count <= points:
        return np.arange(count)
    height = np.where(np.isnan(probability), -1.0, probability).max(axis=0)
    edges = np.linspace(0, count - 1, max(points, 2)).astype(np.intp)
    peaks = [a + int(height[a:b].argmax()) for a, b in pairwise(edges)]
    return np.array([*peaks, count - 1], dtype=np.intp)


def stored_risk(step: int, rows: Sequence[Mapping[str, Any]]) -> Risk:
    """A risk from its rows in the store; drivers are not kept.

    Args:
        step: Its step.
        rows: Rows of `RISK_SCHEMA` of this step, one per horizon.
    """
    known = {row["horizon"]: row for row in rows}
    first = rows[0]
    unknown = {h for h, row in known.items() if row["probability"] is None}
    return Risk(
        step=step,
        probability={h: row["probability"] for h, row in known.items()},
        reasons={h: "the model could not say" for h in unknown},
        band={h: (row["low"], row["high"]) for h, row in known.items() if row["low"] is not None},
        expected_lead=first["expected_lead"],
        kind=first["kind"],
        state=first["state"],
        model_version=first["model_version"],
    )
