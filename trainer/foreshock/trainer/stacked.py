"""Many models trained as one: weights carry a leading axis, GEMMs are batched.

Each model keeps its own seed, data order, optimizer settings, recipe and fault, and does what it
would do alone up to rounding. A model that becomes NaN stays so in its own slice. The stack
keeps no checkpoints: it is made to produce many short runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreshock.monitor.record import StatisticColumns, TensorIdentity
from foreshock.trainer.config import DataConfig, RunConfig
from foreshock.trainer.data import Corpus, batch, corpus_of
from foreshock.trainer.faults import BadBatch
from foreshock.trainer.model import Decoder
from foreshock.trainer.schedule import learning_rate
from foreshock.trainer.stacked_optimizer import StackedAdamW
from foreshock.trainer.stacked_statistics import StackStatistics

__all__ = ["StackStep", "check_alike", "stacked_model", "train_stack"]

Scalars = dict[str, "np.ndarray[Any, np.dtype[np.float64]]"]


@dataclass(frozen=True, slots=True)
class StackStep:
    """One optimizer step of every model of the stack.

    Attributes:
        step: 0-based.
        scalars: loss (before any `BadBatch` gain), grad_norm (before clipping), learning_rate,
            tokens (cumulative), param_norm (after the step) and update_ratio; float64, shape (E,).
        identities: What the rows of the statistics are; the same at every step.
        statistics: Name to values of shape (E, rows), masked where not measured; None at steps
            without tensor statistics.
    """

    step: int
    scalars: Scalars
    identities: tuple[TensorIdentity, ...]
    statistics: StatisticColumns | None


def train_stack(
    configs: Sequence[RunConfig],
    *,
    corpus: Corpus | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[StackStep]:
    """Train all runs together, one step per item.

    Args:
        configs: The runs. Model and data sizes, number of steps, cadence of statistics and FP8
            formats must agree; all else may differ. Where bf16 and FP8 recipes are mixed, bf16
            runs have no statistics of the cast.
        corpus: The text; None loads the one that `data` names.
        device: Where to train.

    Returns:
        Steps in order. Nothing is trained ahead of the consumer.

    Raises:
        ValueError: The runs do not fit into one stack, or the text does not fit the model.
    """
    check_alike(configs)
    stack = _Stack(configs, corpus or corpus_of(configs[0].data), torch.device(device))
    return (stack.step(step) for step in range(configs[0].steps))


def check_alike(configs: Sequence[RunConfig], *, texts: bool = True) -> None:
    """Raise a ValueError unless the runs fit into one stack.

    Args:
        configs: The runs.
        texts: They must read the same text in the same way, too.
    """
    if not configs:
        raise ValueError("a stack needs at least one run")
    for name in ("model", "data", "steps", "tensor_every"):
        values = {_shape(getattr(config, name), texts) for config in configs}
        if len(values) > 1:
            raise ValueError(f"runs of one stack share {name}; these have {len(values)} different")
    if any(config.states.level != "O0" for config in configs):
        raise ValueError("a stack keeps float32 states: states.level is O0; train alone for O1")
    if any(config.states.parameters != "float32" for config in configs):
        raise ValueError("a stack keeps float32 weights; train alone for parameters in bfloat16")
    if any(c.initial or c.data.source == "instructions" for c in configs):
        raise ValueError("a stack trains on text from drawn weights; fine-tune each run alone")


def _shape(part: object, texts: bool) -> object:
    """What of a part the runs share: of the data perhaps only its sizes."""
    if isinstance(part, DataConfig) and not texts:
        return part.batch_size, part.sequence_length
    return part


class _Stack:
    def __init__(self, configs: Sequence[RunConfig], corpus: Corpus, device: torch.device) -> None:
        self.configs, self.corpus, self.device = tuple(configs), corpus, device
        if int(corpus.tokens.numpy().max()) >= configs[0].model.vocabulary:
            raise ValueError(f"{corpus.name} holds bytes that model.vocabulary does not reach")
        if any(config.forget_optimizer_at for config in configs):
            raise ValueError("forget_optimizer_at: `train_windows` stacks such runs")
        self.model = stacked_model(configs).to(device)
        self.optimizer = StackedAdamW(self.model, [config.optimizer for config in configs])
        self.statistics = StackStatistics(self.model, [config.precision for config in configs])
        self.faults = tuple(config.fault for config in configs)

    def step(self, step: int) -> StackStep:
        first = self.configs[0]
        measured = step % first.tensor_every == 0
        self.model.begin_step(step, self.faults)
        tokens = self._tokens(step)
        with self.statistics.measuring(measured):
            losses = self.model(tokens[..., :-1], tokens[..., 1:])
            total = torch.sum(losses * self._loss_gains(step))
            total.backward()  # type: ignore[no-untyped-call]
        rates = torch.tensor([learning_rate(config, step) for config in self.configs])
        norms = self.optimizer.step(rates)
        values = torch.stack((losses.detach(), *norms)).double().cpu().numpy()
        names = ("loss", "grad_norm", "param_norm", "update_ratio")
        scalars = dict(zip(names, values, strict=True))
        scalars["learning_rate"] = rates.double().numpy()
        per_step = first.data.batch_size * first.data.sequence_length
        scalars["tokens"] = np.full(len(self.configs), float((step + 1) * per_step))
        statistics = self.statistics.take() if measured else None
        return StackStep(step, scalars, self.statistics.identities, statistics)

    def _tokens(self, step: int) -> Tensor:
        """int64 (E, B, T + 1)."""
        batches = [batch(self.corpus, c.data, c.seed, step, c.fault) for c in self.configs]
        return torch.stack(batches).to(self.device)

    def _loss_gains(self, step: int) -> Tensor:
        gains = [f.loss_gain(step) if isinstance(f, BadBatch) else 1.0 for f in self.faults]
        return torch.tensor(gains, device=self.device)


def stacked_model(configs: Sequence[RunConfig]) -> Decoder:
    """A stack in which each model has the initial weights that its run has alone."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        stack = Decoder(
            configs[0].model, [config.precision for config in configs], lead=(len(configs),)
        )
        for index, config in enumerate(configs):
            torch.manual_seed(config.seed)
            single = Decoder(config.model, config.precision)
            for name, parameter in single.named_parameters():
                stack.get_parameter(name)[index].copy_(parameter)
    return stack
