"""Unfamiliar records and a drifting fleet, against quantiles of healthy training records."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from foreshock.api.corpus import CorpusRun
from foreshock.api.familiarity import FleetDrift, Reference, reference_of
from foreshock.api.features import FEATURES
from foreshock.api.labels import RunLabel

NAMES = ("loss.medium", "grad_norm.medium", "input.move", "weight.move")


def runs(count: int = 24, steps: int = 1600) -> list[CorpusRun]:
    rng = np.random.default_rng(0)
    features = np.full((count, steps, len(FEATURES)), np.nan, dtype=np.float32)
    for name in NAMES:
        features[..., FEATURES.index(name)] = rng.normal(size=(count, steps))
    one = CorpusRun(
        name="r",
        fingerprint="f",
        group="g",
        architecture="a",
        family="healthy",
        fault_start=None,
        steps=np.arange(steps),
        signals=np.zeros((steps, 1)),
        loss=np.zeros(steps),
        features=features[0],
        detected=np.zeros(steps, dtype=np.bool_),
        label=RunLabel("healthy"),
    )
    return [replace(one, group=f"g{i // 3}", features=features[i]) for i in range(count)]


@pytest.fixture(scope="module")
def reference() -> Reference:
    found = reference_of(runs(), NAMES)
    assert found is not None
    return found


def test_held_out_records_are_seldom_unfamiliar_and_far_ones_are_named(
    reference: Reference,
) -> None:
    assert reference.false_share < 0.04
    rng = np.random.default_rng(1)
    usual = [reference.judge(row).unlike for row in rng.normal(size=(2000, len(NAMES)))]
    assert np.mean(usual) < 0.04
    strange = reference.judge(np.array([0.0, 25.0, np.nan, 0.0]))
    assert strange.unlike
    assert strange.signals == ("grad_norm.medium",)
    assert strange.distance > reference.limit


def test_nothing_measured_is_not_unfamiliar(reference: Reference) -> None:
    assert not reference.judge(np.full(len(NAMES), np.nan)).unlike


def test_a_card_keeps_the_reference(reference: Reference) -> None:
    again = Reference.from_dict(json.loads(json.dumps(reference.as_dict())))
    row = np.array([0.0, 25.0, np.nan, 0.0])
    assert again.judge(row).signals == reference.judge(row).signals
    assert again.limit == reference.limit


def test_a_fleet_that_moves_is_seen_in_its_own_group_only(reference: Reference) -> None:
    drift = FleetDrift(reference, memory=1000)
    rng = np.random.default_rng(2)
    assert drift.index() == {}
    for row in rng.normal(size=(3000, len(NAMES))):
        drift.update(row)
    assert max(drift.index().values()) < 0.1
    for row in rng.normal(size=(3000, len(NAMES))) + np.array([0, 0, 1.5, 0]):
        drift.update(row)
    index = drift.index()
    assert index["input"] > 0.25
    assert max(index["loss"], index["grad_norm"], index["weight"]) < 0.1


def test_too_little_says_nothing() -> None:
    assert reference_of(runs(2), NAMES) is None
