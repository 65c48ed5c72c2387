"""A long run of many series, sent over HTTP in Arrow batches: a large model's, weeks in.

The numbers are noise about known courses; what matters is how many there are.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import httpx
import numpy as np
import pyarrow as pa

from foreshock.monitor.record import (
    STATISTICS,
    IdentityColumns,
    TensorIdentity,
    record_batch,
    write_stream,
)

__all__ = ["ROLES", "LongRun", "send_long_run"]

ROLES: Final = (
    "input",
    "weight",
    "grad_output",
    "output",
    "grad_weight",
    "exp_avg",
    "exp_avg_sq",
    "master_weight",
)
_STEPS_A_BATCH: Final = 1000
_BEGAN: Final = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRun:
    """How large.

    Attributes:
        name: Of the run.
        steps: Optimizer steps, each with loss and gradient norm.
        blocks: Of four layers each; a layer has a series per role of `ROLES`.
        tensor_every: Steps between two with tensors.
    """

    name: str
    steps: int
    blocks: int = 125
    tensor_every: int = 100

    @property
    def layers(self) -> tuple[str, ...]:
        """Qualified names, in order."""
        parts = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
        return tuple(f"blocks.{block}.{part}" for block in range(self.blocks) for part in parts)

    @property
    def series(self) -> int:
        """Tensor series: a layer's operand each."""
        return len(self.layers) * len(ROLES)


def loss(step: int) -> float:
    """Falls for as long as the run lasts."""
    return 2.0 + 9.0 / math.sqrt(1 + step / 30)


def send_long_run(client: httpx.Client, run: LongRun) -> None:
    """Announce the run and send all of it.

    Raises:
        httpx.HTTPStatusError: The service did not take a batch.
    """
    launch = str(uuid.uuid4())
    body = {"run": run.name, "launch_id": launch, "first_step": 0, "layers": list(run.layers)}
    client.post("/api/v1/runs", json=body).raise_for_status()
    headers = {"Content-Type": "application/vnd.apache.arrow.stream"}
    for sequence, table in enumerate(_tables(run)):
        path = f"/api/v1/runs/{run.name}/batches/{launch}-0-{sequence}"
        client.put(path, content=write_stream(table), headers=headers).raise_for_status()


def _tables(run: LongRun) -> Iterator[pa.Table]:
    random = np.random.default_rng(0)
    identities = IdentityColumns.of(
        [
            TensorIdentity(layer, role, "e5m2" if role == "grad_output" else "e4m3")
            for layer in run.layers
            for role in ROLES
        ]
    )
    for first in range(0, run.steps, _STEPS_A_BATCH):
        last = min(first + _STEPS_A_BATCH, run.steps)
        steps = range(first, last)
        yield pa.Table.from_batches([_record(run, step, identities, random) for step in steps])


def _record(
    run: LongRun, step: int, identities: IdentityColumns, random: np.random.Generator
) -> pa.RecordBatch:
    measured = step % run.tensor_every == 0
    noise = random.standard_normal(3)
    return record_batch(
        step=step,
        time=_BEGAN + timedelta(seconds=step),
        scalars={
            "loss": loss(step) + 0.02 * noise[0],
            "grad_norm": 0.5 + 0.05 * abs(noise[1]),
            "update_ratio": 2e-3 * (1 + 0.05 * noise[2]),
            "learning_rate": 3e-4,
        },
        identities=identities if measured else None,
        statistics=_statistics(run, step, random) if measured else None,
    )


def _statistics(
    run: LongRun, step: int, random: np.random.Generator
) -> dict[str, np.ma.MaskedArray]:
    columns = {name: np.ma.array(random.random(run.series)) for name in STATISTICS}
    depth = np.repeat(np.arange(len(run.layers)), len(ROLES))
    # Outliers grow with depth and with the square root of time: a picture with a shape.
    columns["kurtosis"] = np.ma.array(
        3 + 0.01 * depth * math.sqrt(step / 1000) + 0.1 * columns["kurtosis"]
    )
    columns["numel"] = columns["observations"] = np.ma.ones(run.series)
    return columns
