"""A stack whose steps never wait for the host: what each needs is on the device beforehand.

The host works out tokens, rates and faults of a window of steps, the device takes them one by one
through a counter of its own, and results come back once per window. On CUDA the whole step is
captured as a graph after a few steps, so that no Python runs between kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from foreshock.monitor.record import TensorIdentity
from foreshock.trainer.config import DataConfig, RunConfig
from foreshock.trainer.data import (
    Corpus,
    broken_batch,
    corpus_of,
    sequence_starts,
    text_at,
)
from foreshock.trainer.faults import BadBatch
from foreshock.trainer.schedule import learning_rate
from foreshock.trainer.stacked import check_alike, stacked_model
from foreshock.trainer.stacked_faults import FAULT_ROWS, StackedFaults
from foreshock.trainer.stacked_optimizer import StackedAdamW
from foreshock.trainer.stacked_scales import StackedScales
from foreshock.trainer.stacked_sums import DeviceStatistics

__all__ = ["SCALARS", "Fold", "StackWindow", "train_windows"]

Fold = Callable[[Sequence[TensorIdentity]], Callable[[Tensor], Tensor]]
"""Of identities, a function of statistics (E, len(STATISTICS), rows) that gives (E, K), float32."""

SCALARS: Final = ("loss", "grad_norm", "param_norm", "update_ratio")
"""Of `StackWindow.scalars`, in order; as `StackStep` has them."""

_RATE_ROWS: Final = ("rate", "first", "second", "kept")
_EAGER_STEPS: Final = 4
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StackWindow:
    """Some steps of every model of the stack.

    Attributes:
        first: Number of the first step.
        scalars: `SCALARS`, float32 (steps, len(SCALARS), E).
        folded: What the fold made of the tensor statistics, float32 (steps, E, K), NaN at steps
            without.
        graph: Whether a CUDA graph took (most of) the steps.
    """

    first: int
    scalars: npt.NDArray[np.float32]
    folded: npt.NDArray[np.float32]
    graph: bool


def train_windows(
    configs: Sequence[RunConfig],
    *,
    fold: Fold,
    folded: int,
    device: torch.device | str,
    window: int = 50,
    graph: bool = True,
) -> Iterator[StackWindow]:
    """Train all runs together, some steps per item.

    Args:
        configs: The runs; they share what `train_stack` asks for.
        fold: Makes what is kept of tensor statistics.
        folded: How many numbers per model that is: K.
        device: Where to train; anything works, CUDA is what it is made for.
        window: Steps per item; the last may be shorter.
        graph: On CUDA, capture the step as a graph; where that fails, go on without.

    Raises:
        ValueError: As `train_stack`.
    """
    check_alike(configs, texts=False)
    stack = _DeviceStack(configs, fold, folded, torch.device(device), window, graph)
    return stack.windows()


class _Texts:
    """The texts that the runs of a stack read, one after the other in one tensor on the device."""

    def __init__(self, configs: Sequence[RunConfig], device: torch.device) -> None:
        self.configs = tuple(configs)
        found: dict[DataConfig, Corpus] = {}
        self.corpora: list[Corpus] = []
        for config in configs:
            key = replace(config.data, switch_at=0, repeats=1, repeats_until=0)
            if key not in found:
                found[key] = corpus_of(config.data)
            self.corpora.append(found[key])
        self._begins: dict[str, int] = {}
        pieces: list[Tensor] = []
        total = 0
        for corpus in found.values():
            for text in (corpus, corpus.other):
                digest = None if text is None else _digest(text)
                if text is None or digest is None or digest in self._begins:
                    continue
                self._begins[digest] = total
                pieces.append(text.tokens)
                total += text.tokens.numel()
        self._text = torch.cat(pieces).to(device)
        self.highest = int(self._text.max())
        length = configs[0].data.sequence_length + 1
        self._within = torch.arange(length, device=device)

    def tokens(self, steps: range) -> Tensor:
        """uint8 (steps, E, B, T + 1), as each run alone would read them."""
        first = self.configs[0].data
        starts = np.empty((len(steps), len(self.configs), first.batch_size), dtype=np.int64)
        broken = []
        for model, (config, corpus) in enumerate(zip(self.configs, self.corpora, strict=True)):
            for index, step in enumerate(steps):
                text = text_at(corpus, config.data, step)
                begin = self._begins[_digest(text)]
                places = sequence_starts(text, config.data, config.seed, step)
                starts[index, model] = begin + places
                if isinstance(config.fault, BadBatch) and config.fault.active(step):
                    broken.append((index, model, step, config.fault, config.seed))
        placed = torch.from_numpy(starts).to(self._text.device)
        tokens = self._text[placed[..., None] + self._within]
        for index, model, step, fault, seed in broken:
            whole = tokens[index, model].cpu().long()
            tokens[index, model] = broken_batch(whole, fault, seed, step).to(tokens)
        return tokens


def _digest(text: Corpus) -> str:
    # The first of two texts is named by both.
    return text.sha256.partition("+")[0]


def _stream(device: torch.device) -> torch.cuda.Stream:
    made: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return made


class _DeviceStack:
    def __init__(
        self,
        configs: Sequence[RunConfig],
        fold: Fold,
        folded: int,
        device: torch.device,
        window: int,
        graph: bool,
    ) -> None:
        self.configs, self.device = tuple(configs), device
        self.texts = _Texts(configs, device)
        if self.texts.highest >= configs[0].model.vocabulary:
            raise ValueError("the text holds bytes that model.vocabulary does not reach")
        self.model = stacked_model(configs).to(device)
        self.optimizer = StackedAdamW(self.model, [config.optimizer for config in configs])
        self.scales = StackedScales(self.model)
        layers = self.model.linears()
        self.faults = StackedFaults(layers, [config.fault for config in configs], self.scales)
        self.statistics = DeviceStatistics(self.model, [config.precision for config in configs])
        self.fold = fold(self.statistics.identities)
        self.every = configs[0].tensor_every
        models, data = len(configs), configs[0].data
        self.length = -(-window // self.every) * self.every
        shape = (self.length, models, data.batch_size, data.sequence_length + 1)
        self.tokens = torch.zeros(shape, dtype=torch.uint8, device=device)
        rows = len(_RATE_ROWS) + len(FAULT_ROWS)
        self.numbers = torch.zeros(self.length, rows, models, dtype=torch.float64, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.scalars = torch.zeros(self.length, len(SCALARS), models, device=device)
        self.signals = torch.zeros(self.length, models, folded, device=device)
        self.wants_graph = graph and device.type == "cuda"
        self.graphs: dict[bool, Any] = {}
        self.stream = _stream(device) if device.type == "cuda" else None

    def windows(self) -> Iterator[StackWindow]:
        steps = self.configs[0].steps
        for first in range(0, steps, self.length):
            planned = range(first, min(first + self.length, steps))
            numbers = self._numbers(planned)
            if self.stream is None:
                yield self._window(planned, numbers)
                continue
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                result = self._window(planned, numbers)
            yield result

    def _window(self, steps: range, numbers: npt.NDArray[np.float64]) -> StackWindow:
        self.tokens[: len(steps)].copy_(self.texts.tokens(steps))
        self.numbers[: len(steps)].copy_(torch.from_numpy(numbers))
        self.counter.zero_()
        self.scalars.fill_(torch.nan)
        self.signals.fill_(torch.nan)
        for step in steps:
            self._step(step)
        return StackWindow(
            steps.start,
            # Copies: on a CPU it would be the very memory that the next window fills.
            self.scalars[: len(steps)].cpu().numpy().copy(),
            self.signals[: len(steps)].cpu().numpy().copy(),
            bool(self.graphs),
        )

    def _step(self, step: int) -> None:
        measured = step % self.every == 0
        if step < _EAGER_STEPS * self.every or not self.wants_graph:
            self._body(measured)
            return
        if measured not in self.graphs:
            self._capture(measured)
        graph = self.graphs.get(measured)
        if graph is None:
            self._body(measured)
        else:
            graph.replay()

    def _capture(self, measured: bool) -> None:
        graph = torch.cuda.CUDAGraph()
        pool = next((g.pool() for g in self.graphs.values()), None)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                self._body(measured)
        except RuntimeError as error:
            # A step without a graph is slower and otherwise the same.
            self.wants_graph = False
            self.graphs.clear()
            torch.cuda.synchronize(self.device)
            _log.warning("no CUDA graph, steps go on without: %s", error)
            return
        self.graphs[measured] = graph

    def _body(self, measured: bool) -> None:
        """One step, by the numbers at the counter; nothing in it depends on a value."""
        tokens = self.tokens.index_select(0, self.counter)[0].long()
        numbers = self.numbers.index_select(0, self.counter)[0]
        rate, first, second, kept, *faults = numbers.unbind(0)
        self.faults.bind(torch.stack(faults).float())
        self.statistics.start(measured)
        losses = self.model(tokens[..., :-1], tokens[..., 1:])
        total = torch.sum(losses * faults[0].float())
        torch.autograd.backward(total)
        self.scales.advance()
        if measured:
            folded = self.fold(self.statistics.take())
            self.signals.index_copy_(0, self.counter, folded[None].float())
        norms = self.optimizer.step_on_device(rate, first, second, kept.float())
        scalars = torch.stack((losses.detach(), *norms))
        self.scalars.index_copy_(0, self.counter, scalars[None].float())
        self.counter.add_(1)

    def _numbers(self, steps: range) -> npt.NDArray[np.float64]:
        """(steps, rate rows and fault rows, E)."""
        rates = np.array([[learning_rate(c, step) for c in self.configs] for step in steps])
        # Everybody computes the rate in float32, as `train_stack` does.
        rates = rates.astype(np.float32).astype(np.float64)
        forgets = np.array([config.forget_optimizer_at for config in self.configs])
        number = np.arange(steps.start, steps.stop)[:, None]
        taken = number + 1 - np.where((forgets > 0) & (number >= forgets), forgets, 0)
        first, second = self.optimizer.bias_corrections(torch.from_numpy(taken).double())
        kept = np.where((forgets > 0) & (number == forgets), 0.0, 1.0)
        mine = np.stack((rates, first.numpy(), second.numpy(), kept), 1)
        return np.concatenate((mine, self.faults.numbers(steps)), 1)
