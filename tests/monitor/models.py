"""Small models and loops that the monitor's tests watch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from torch.nn import functional

from foreshock.monitor.record import StepRecord, TensorStatistics, table_to_records

__all__ = ["Recorder", "TinyLlama", "batches", "row", "tiny", "train"]


class TinyLlama(nn.Module):
    """Embedding, one gated block with dropout, head; returns (logits, loss)."""

    def __init__(self, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 8)
        self.norm = nn.RMSNorm(8)
        self.gate = nn.Linear(8, 16, bias=False)
        self.up = nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 17)

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self.embedding(tokens)
        h = self.norm(x)
        x = x + self.dropout(self.down(functional.silu(self.gate(h)) * self.up(h)))
        logits: torch.Tensor = self.head(x)
        if targets is None:
            return logits, None
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Recorder:
    """A sink that keeps records."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def __call__(self, record: pa.RecordBatch) -> None:
        self.records += table_to_records(pa.Table.from_batches([record]))


def tiny(seed: int = 0, *, dropout: float = 0.1) -> tuple[TinyLlama, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = TinyLlama(dropout=dropout)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def batches(step: int, micro_batches: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(17, (2, 6), generator=generator) for _ in range(micro_batches)]


def train(
    model: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 4,
    micro_batches: int = 2,
    before: Callable[[int], None] | None = None,
) -> list[float]:
    """Accumulation, clipping, dropout; returns the losses of all micro-batches."""
    losses = []
    for step in range(steps):
        if before is not None:
            before(step)
        for tokens in batches(step, micro_batches):
            _, loss = model(tokens[:, :-1], tokens[:, 1:])
            losses.append(float(loss.detach()))
            (loss / micro_batches).backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def row(record: StepRecord, layer: str, role: str, call_index: int = 0) -> TensorStatistics:
    """The one row of a layer's operand."""
    (found,) = (
        t
        for t in record.tensors
        if (t.identity.layer, t.identity.role, t.identity.call_index) == (layer, role, call_index)
    )
    return found


def folder_of(path: Path | None) -> Path:
    assert path is not None
    return path
