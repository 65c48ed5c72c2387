"""A real training run in a process of its own that stops twice, so that somebody can look.

Emulated FP8, one more format and the optimizer's states measured; its learning rate runs away from
step 40 on, and the shipped forecaster notices. Started as
`python -m tests.dashboards.real_run --url http://... --folder PATH`: at a pause it writes
`paused-STEP` there and waits for `go-STEP`. With `--demo SEED` it trains the failing run of
`foreshock demo` instead, without a pause, and with `--healthy` its twin.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import nn

from foreshock.monitor import Watch, watch
from foreshock.trainer.config import DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from foreshock.trainer.faults import LearningRateRamp
from foreshock.trainer.loop import StepResult, train
from foreshock.trainer.recipes import debug_cpu, demo
from tests.dashboards.real_plan import CHECKPOINTS, DROPPED, LAST, NAME, PAUSES, TENSOR_EVERY

_CONFIG: Final = replace(
    debug_cpu(7),
    name=NAME,
    model=ModelConfig(architecture="llama3", width=32, layers=2, heads=2),
    optimizer=OptimizerConfig(learning_rate=2e-3),
    schedule=ScheduleConfig(warmup_steps=20),
    data=DataConfig(sequence_length=32, batch_size=4),
    steps=LAST + 1,
    tensor_every=TENSOR_EVERY,
    fault=LearningRateRamp(start=40, factor=1.15, limit=1000.0),
)


class _Pauses:
    def __init__(
        self, folder: Path, events: Callable[[str, str], None], pauses: tuple[int, ...]
    ) -> None:
        self._folder = folder
        self._pauses = pauses
        self._event = events

    def __call__(self, step: StepResult) -> None:
        if step.step in CHECKPOINTS or (not self._pauses and step.step % 100 == 0):
            self._event("checkpoint", f"step-{step.step}.pt")
        if step.step == DROPPED and self._pauses:
            self._event("dropped", "3 records: the spool was full")
        if step.step in self._pauses:
            (self._folder / f"paused-{step.step}").write_text("paused")
            while not (self._folder / f"go-{step.step}").exists():
                time.sleep(0.05)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--demo", type=int)
    parser.add_argument("--healthy", action="store_true")
    given = parser.parse_args()
    config = _CONFIG if given.demo is None else demo(given.demo)[int(given.healthy)]
    watches: list[Watch] = []

    def attach(model: nn.Module, optimizer: torch.optim.Optimizer, first_step: int) -> Watch:
        made = watch(
            model,
            optimizer,
            run=config.name,
            url=given.url,
            spool=given.folder / f"spool-{config.name}",
            tensor_every=TENSOR_EVERY,
            first_step=first_step,
            what_if=["mxfp8"],
            optimizer_states=True,
        )
        watches.append(made)
        return made

    def event(kind: str, detail: str) -> None:
        watches[0].event(kind, detail)

    pauses = PAUSES if given.demo is None else ()
    train(config, watch=attach, on_step=_Pauses(given.folder, event, pauses))


if __name__ == "__main__":
    main()
