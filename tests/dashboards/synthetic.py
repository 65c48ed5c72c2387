"""A training run made by hand: records whose every number is known, sent over HTTP.

Stands in for the trainer where a test is about what the service shows of a run.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

import httpx

from foreshock.monitor.record import (
    StepRecord,
    TensorIdentity,
    TensorStatistics,
    records_to_json,
)

__all__ = ["LAYERS", "SyntheticRun", "by_hand", "record"]

LAYERS: Final = tuple(
    f"blocks.{block}.{part}"
    for block in range(4)
    for part in ("attention.qkv", "mlp.up", "mlp.down")
)
SICK: Final = "blocks.3.mlp.down"
ROLES: Final = ("input", "weight", "grad_output")


def loss(step: int, rise: int | None) -> float:
    """Falls like a language model's loss, and rises for good after `rise`."""
    value = 2.0 + 3.4 * math.exp(-step / 45) + 0.02 * math.sin(7.3 * step)
    return value if rise is None or step <= rise else value + 0.002 * (step - rise) ** 1.5


def illness(step: int, layer: str, onset: int | None) -> float:
    """Factor on a layer's outliers: 1 when healthy, growing from `onset`, most in one layer."""
    if onset is None or step <= onset:
        return 1.0
    share = 1.0 if layer == SICK else 0.1
    return 1 + share * math.expm1(min(5.0, (step - onset) / 25))


def record(
    step: int, *, onset: int | None, rise: int | None, layers: tuple[str, ...] = LAYERS
) -> StepRecord:
    """The record of one step."""
    sick = illness(step, SICK, onset)
    return StepRecord(
        step=step,
        time=datetime.now(UTC),
        scalars={
            "loss": loss(step, rise),
            "grad_norm": 0.8 * sick**0.5 + 0.01 * math.cos(3.1 * step),
            "learning_rate": 1e-3 * min(1.0, (step + 1) / 20) * 0.999**step,
            "update_ratio": 2e-3 * sick**0.3,
            "param_norm": 40 + 0.01 * step,
            "tokens": 4096.0 * (step + 1),
            "step_seconds": 0.05 + 0.001 * math.sin(step),
            "overhead_ratio": 0.012 + 0.001 * math.sin(step),
        },
        tensors=tuple(
            _tensor(step, layer, role, illness(step, layer, onset))
            for layer in layers
            for role in ROLES
        ),
    )


def _tensor(step: int, layer: str, role: str, sick: float) -> TensorStatistics:
    place = layer.__len__() + ROLES.index(role)
    wave = 1 + 0.02 * math.sin(step + place)
    amax = 4.0 * sick**0.5 * wave
    return TensorStatistics(
        identity=TensorIdentity(layer, role, "e5m2" if role == "grad_output" else "e4m3"),
        numel=65536,
        amax=amax,
        rms=0.9 * wave,
        kurtosis=(3.2 + 0.1 * place) * sick * wave,
        kurtosis_sequence_mean=3.1 * sick * wave,
        channel_kurtosis=1.2 * sick * wave,
        top_channel=17,
        top_channel_share=min(0.9, 0.02 * sick),
        underflow_ratio=min(0.4, 0.01 * sick * wave),
        subnormal_ratio=min(0.5, 0.02 * sick * wave),
        overflow_ratio=min(0.3, 1e-4 * sick * wave),
        headroom_log2=1.5 * wave - math.log2(sick),
        sqnr_db=30.0 - 3 * math.log2(sick),
        scale_log2=6.0,
        scale_log2_max=6.0,
        zero_ratio=0.001,
        nonfinite_count=0,
        min_nonzero=1e-6,
    )


def by_hand(step: int, layer: str) -> StepRecord:
    """What only trainers with FP8 gradients and states have: mu, and master weights."""
    return StepRecord(
        step=step,
        time=datetime.now(UTC),
        scalars={"loss": loss(step, None)},
        tensors=tuple(
            TensorStatistics(
                identity=TensorIdentity(layer, role, form), numel=64, rms=0.1 + step, mu=mu
            )
            for role, form, mu in (
                ("grad_reduced", "e4m3", 2.0**step),
                ("master_weight", "fp16", None),
            )
        ),
    )


class SyntheticRun:
    """Announces a run and sends its records, as a monitor's shipper would.

    Args:
        client: Of the service; its base address ends before `/api/v1`.
        name: Name of the run.
        onset: Step after which statistics leave their usual range; None never.
        rise: Step after which the loss rises; None never.
        project: Its project.
    """

    def __init__(
        self,
        client: httpx.Client,
        name: str,
        *,
        onset: int | None = None,
        rise: int | None = None,
        layers: tuple[str, ...] = LAYERS,
        project: str = "default",
    ) -> None:
        self.client = client
        self.project = project
        self.name = name
        self.onset = onset
        self.rise = rise
        self.layers = layers
        self.next_step = 0
        self._launch = str(uuid.uuid4())
        self._sequence = 0
        body = {
            "project": project,
            "run": name,
            "launch_id": self._launch,
            "first_step": 0,
            "config": {},
            "layers": list(layers),
            "tokens_per_step": 4096,
            "world_size": 1,
        }
        client.post("/api/v1/runs", json=body).raise_for_status()

    def send(self, steps: int) -> list[StepRecord]:
        """Send the next records in one batch; returns them once they are durable."""
        numbers = range(self.next_step, self.next_step + steps)
        records = [
            record(step, onset=self.onset, rise=self.rise, layers=self.layers) for step in numbers
        ]
        self.put(records)
        self.next_step += steps
        return records

    def put(self, records: Iterable[StepRecord]) -> None:
        """Send records as they are."""
        path = f"/api/v1/runs/{self.name}/batches/{self._launch}-0-{self._sequence}"
        headers = {"Content-Type": "application/json"}
        content, query = records_to_json(records), {"project": self.project}
        answer = self.client.put(path, content=content, headers=headers, params=query)
        answer.raise_for_status()
        self._sequence += 1
