"""The processes of one training job, as the monitor's worker threads talk to each other.

A group of its own over TCP (gloo), used by the worker threads only: no collective of the training
waits for the monitor's or is reordered by it, and a process that is gone costs records, not steps.
Two reductions per step, a third exchange only when a process knows a name that the others do not.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final, Self

import numpy as np
import torch
import torch.distributed as dist

from foreshock.monitor.reduction import Agreement, Merged, RankStep, Words, pack, unpack, words_of

__all__ = ["Ranks", "RanksLost"]

_LOGGER = logging.getLogger("foreshock.monitor")
_ATTACH_SECONDS: Final = 120.0
# A process may write a checkpoint for long; the worker waits for it, the training does not.
_PATIENCE: Final = timedelta(minutes=30)
_WATCHES: Final = itertools.count()


class RanksLost(RuntimeError):
    """The other processes cannot be reached any more, or are at another step."""


class Ranks:
    """This process among the others.

    Attributes:
        rank, size: Global rank and number of processes.
    """

    def __init__(self, group: Any) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._group = group
        self._agreement = Agreement()
        self._known = Words()
        self._lost = False

    @classmethod
    def join(cls) -> Self | None:
        """Meet the other processes; None in a job of one.

        Raises:
            RuntimeError: Not every process called within two minutes.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        _meet(f"foreshock/watch-{next(_WATCHES)}")
        return cls(dist.new_group(backend="gloo", timeout=_PATIENCE))

    def union(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Names of all ranks, in the order of the first rank that has them."""
        of_all: list[Any] = [None] * self.size
        dist.all_gather_object(of_all, names, group=self._group)
        return tuple(dict.fromkeys(name for names in of_all for name in names))

    def agreed(self, value: str) -> str:
        """What rank 0 said, on all ranks."""
        of_all: list[Any] = [None] * self.size
        dist.all_gather_object(of_all, value, group=self._group)
        return str(of_all[0])

    def merge(self, step: RankStep, shares: Mapping[str, float | None], *, tensors: bool) -> Merged:
        """The step of all processes; in the worker thread, by every process at every step.

        Args:
            step: As this process saw it.
            shares: By parameter name, how many processes hold the same piece (`Words`).
            tensors: Whether the step is one with tensor statistics, for all processes alike.

        Raises:
            RanksLost: Now, or at an earlier step.
        """
        if self._lost:
            raise RanksLost("the other processes were lost earlier")
        try:
            merged = self._reduce(step, shares, tensors=tensors)
        except RuntimeError as error:
            self._lost = True
            raise RanksLost(
                f"the other processes cannot be reached ({error}); from step {step.step} on "
                "records speak of rank 0 alone"
            ) from error
        if not merged.in_step:
            self._lost = True
            raise RanksLost(f"the processes are at different steps, this one at {step.step}")
        return merged

    def _reduce(
        self, step: RankStep, shares: Mapping[str, float | None], *, tensors: bool
    ) -> Merged:
        words = words_of(step, shares)
        merged = self._once(step, words, tensors=tensors)
        if merged.incomplete and merged.in_step:
            self._agree(words)
            merged = self._once(step, words, tensors=tensors)
        return merged

    def _once(self, step: RankStep, words: Words, *, tensors: bool) -> Merged:
        complete = self._agreement.covers(words)
        sums, maxes = pack(step, self._agreement, complete=complete, tensors=tensors)
        vectors = []
        for vector, how in ((sums, dist.ReduceOp.SUM), (maxes, dist.ReduceOp.MAX)):
            tensor = torch.from_numpy(np.ascontiguousarray(vector))
            dist.all_reduce(tensor, op=how, group=self._group)
            vectors.append(tensor.numpy())
        with np.errstate(invalid="ignore"):
            return unpack(vectors[0], vectors[1], self._agreement, tensors=tensors)

    def _agree(self, words: Words) -> None:
        # What was known stays known: a layer that rests for a step keeps its place.
        self._known = Words(
            {**self._known.tensors, **words.tensors},
            {**self._known.parameters, **words.parameters},
            self._known.scalars | words.scalars,
        )
        of_all: list[Any] = [None] * self.size
        dist.all_gather_object(of_all, self._known, group=self._group)
        self._agreement = Agreement.of(of_all)


def _meet(name: str) -> None:
    store = dist.distributed_c10d._get_default_store()
    size = dist.get_world_size()
    arrived = store.add(name, 1)
    until = time.monotonic() + _ATTACH_SECONDS
    while arrived < size:
        if time.monotonic() > until:
            raise RuntimeError(
                f"{arrived} of {size} processes called watch(); every rank has to call it, at the "
                "same place of the script"
            )
        time.sleep(0.02)
        arrived = store.add(name, 0)
