"""Rows that a read of the service gave, beside what they must be by the records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from dashboards.queries import ServiceRead

from foreshock.monitor.record import StepRecord, TensorStatistics
from tests.dashboards.looks import Look
from tests.dashboards.prometheus import labels

__all__ = ["COMPARE"]


def same(shown: float | None, stored: float | None) -> bool:
    if shown is None or stored is None:
        return shown is stored
    return math.isnan(shown) == math.isnan(stored) and shown == pytest.approx(
        stored, rel=1e-5, abs=1e-30, nan_ok=True
    )


def compare_series(
    rows: list[dict[str, Any]], read: ServiceRead, records: list[StepRecord], _: Look
) -> None:
    (mean,) = [c["text"] for c in read.query["columns"] if c["selector"] == "mean"]
    wanted = {}
    for record in records:
        if "name" in read.parameters:
            value = record.scalars.get(read.parameters["name"])
        else:
            chosen = [t for t in record.tensors if is_chosen(t, read.parameters)]
            value = getattr(chosen[0], read.parameters["statistic"]) if chosen else None
        if value is not None:
            wanted[record.step] = value
    assert [row["step"] for row in rows] == list(wanted)
    for row in rows:
        assert same(row[mean], wanted[row["step"]]), (read, row)


def is_chosen(tensor: TensorStatistics, given: Mapping[str, str]) -> bool:
    identity = tensor.identity
    by_format = identity.format == given["format"] if "format" in given else not identity.what_if
    of_layer = identity.layer == given.get("layer", identity.layer)
    return identity.role == given["role"] and by_format and of_layer


def compare_heatmap(
    rows: list[dict[str, Any]], read: ServiceRead, records: list[StepRecord], _: Look
) -> None:
    wanted = {
        (tensor.identity.layer, record.step): getattr(tensor, read.parameters["statistic"])
        for record in records
        for tensor in record.tensors
        if is_chosen(tensor, read.parameters)
    }
    wanted = {key: value for key, value in wanted.items() if value is not None}
    assert {(row["layer"], row["step"]) for row in rows} == wanted.keys()
    for row in rows:
        assert same(row["value"], wanted[row["layer"], row["step"]]), row


def compare_tensors(
    rows: list[dict[str, Any]], read: ServiceRead, records: list[StepRecord], _: Look
) -> None:
    statistic = read.parameters["statistic"]
    measured = next(
        [t for t in record.tensors if is_there(t, read.parameters["role"], statistic)]
        for record in reversed(records)
        if any(is_there(t, read.parameters["role"], statistic) for t in record.tensors)
    )
    assert len(rows) == len(measured)
    names = {c["selector"]: c["text"] for c in read.query["columns"]}
    shown = [row[names[statistic]] for row in rows]
    assert sorted(shown) == pytest.approx(sorted(getattr(t, statistic) for t in measured), rel=1e-5)
    assert {row[names["layer"]] for row in rows} == {t.identity.layer for t in measured}


def is_there(tensor: TensorStatistics, role: str, statistic: str) -> bool:
    return tensor.identity.role == role and getattr(tensor, statistic) is not None


def compare_risks(
    rows: list[dict[str, Any]], _: ServiceRead, records: list[StepRecord], moment: Look
) -> None:
    assert [row["step"] for row in rows] == [record.step for record in records]
    newest = moment.store["foreshock_divergence_risk_ratio"]
    for horizon in ("10", "100", "1000"):
        assert rows[-1][f"{horizon} steps"] == newest.get(labels(horizon=horizon))


def compare_causes(
    rows: list[dict[str, Any]], _: ServiceRead, __: list[StepRecord], ___: Look
) -> None:
    for row in rows:
        assert row["Cause"]
        assert 0 <= row["Probability"] <= 1
        assert row["Remedy"]


def compare_alerts(
    rows: list[dict[str, Any]], _: ServiceRead, __: list[StepRecord], moment: Look
) -> None:
    firing = {dict(k)["kind"] for k, v in moment.store["foreshock_alert_firing"].items() if v}
    assert {row["Kind"] for row in rows if row["State"] == "firing"} == firing


COMPARE = {
    "series": compare_series,
    "heatmap": compare_heatmap,
    "tensors": compare_tensors,
    "history": compare_risks,
    "diagnosis": compare_causes,
    "alerts": compare_alerts,
}
