"""From each process's gradients to those that the optimizer steps with.

Holds the FP8 gradients of matrices and the plain ones of gains and biases; reduces both once per
step, when asked, and knows which tensors the step counts for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.monitor.operands import Observer, Operand
from foreshock.trainer.fp8lm.gradients import GradientStore
from foreshock.trainer.fp8lm.partition import Piece
from foreshock.trainer.fp8lm.reduction import GradientReduction, Reduced
from foreshock.trainer.fp8lm.scaled import Scaled, encode
from foreshock.trainer.fp8lm.sums import cut
from foreshock.trainer.fp8lm.transport import Transport
from foreshock.trainer.states_config import CommunicationConfig, StatesConfig

__all__ = ["GradientExchange"]


class GradientExchange:
    """Gradients of a model's replicas, and their mean.

    Args:
        matrices: Parameters with FP8 gradients.
        dense: Parameters with plain ones, which stay in `.grad` and are averaged in float32.
        states: How micro-batches add up.
        communication: How processes' gradients do.
        transport: Over which processes.
        parts: What each process owns of the matrices; None reduces everything to everybody.
        sharded: FSDP2's parameters, whose gradients come reduced: looked at for the norm, and for
            values that are not finite.

    Attributes:
        store: FP8 gradients of this process.
        observer: Is shown each reduced gradient.
        last: What the latest reduction found, None before the first.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        dense: Sequence[nn.Parameter],
        states: StatesConfig,
        communication: CommunicationConfig,
        transport: Transport,
        parts: Sequence[Sequence[Piece]] | None,
        sharded: Sequence[nn.Parameter] = (),
    ) -> None:
        self.observer: Observer | None = None
        self.last: Reduced | None = None
        self._matrices, self._dense = tuple(matrices), tuple(dense)
        self._sharded = tuple(sharded)
        self._index = {id(p): i for i, p in enumerate(self._matrices)}
        self._dense_index = {id(p): i for i, p in enumerate(self._dense)}
        self._config, self._transport, self._parts = communication, transport, parts
        self.store = GradientStore(self._matrices, states.accumulate)
        device = self._matrices[0].device if self._matrices else None
        shapes = [p.shape for p in self._matrices]
        self._reduction = GradientReduction(shapes, communication, transport, device)
        self._version = -1
        self._gradients: list[Tensor | Scaled | None] = []
        self._dense_present: Tensor | None = None
        self._finite: Tensor | None = None

    @property
    def mu(self) -> Tensor:
        """The automatic factor of each matrix."""
        return self._reduction.mu.value

    @property
    def bytes(self) -> int:
        """Memory of gradients held by this process."""
        dense = sum(
            p.grad.numel() * p.grad.element_size() for p in self._dense if p.grad is not None
        )
        return self.store.bytes + dense

    def clear(self) -> None:
        """Forget this step's gradients."""
        self.store.clear()
        self._gradients, self._finite, self._dense_present = [], None, None

    @torch.no_grad()
    def reduce(self) -> None:
        """Make the mean over the processes, unless nothing has come since the last time."""
        if self._version == self.store.version and self._finite is not None:
            return
        self._version = self.store.version
        local = self.store.local()
        self._finite = None
        if self._transport.ranks == 1:
            self._gradients = [None if g is None else _coded(g) for g in local]
        elif self._matrices:
            parts = self._parts
            reduction = self._reduction
            found = reduction.reduce_to_owners(local, parts) if parts else reduction.reduce(local)
            self.last = found
            self._gradients = list(found.gradients)
            self._finite = found.finite
        self._reduce_dense()
        if self._transport.ranks == 1 or not self._matrices:
            self._finite = self._all_finite()
        self._finite = self._shards_finite(self._finite)
        self._show()

    def gradient(self, parameter: nn.Parameter) -> Tensor | Scaled | None:
        """What the optimizer uses for a parameter; None where there is nothing to do here."""
        index = self._index.get(id(parameter))
        if index is not None:
            return self._gradients[index] if self._gradients else None
        return parameter.grad

    def applies(self, parameter: nn.Parameter) -> Tensor | None:
        """Whether the step counts for a parameter, 0-dim bool; None = certainly."""
        conditions = []
        if self._config.skip_nonfinite and self._finite is not None:
            conditions.append(self._finite)
        index = self._index.get(id(parameter))
        if index is not None and self._transport.ranks > 1 and self.last is not None:
            conditions.append(self.last.present[index])
        at = self._dense_index.get(id(parameter))
        if at is not None and self._dense_present is not None:
            conditions.append(self._dense_present[at])
        if not conditions:
            return None
        return torch.stack(conditions).all()

    @torch.no_grad()
    def clip(self, limit: float | None) -> Tensor:
        """See `Fp8AdamW.clip_gradients`."""
        self.reduce()
        norm = self._norm()
        if limit is not None:
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)
            for gradient in (*self._gradients, *(p.grad for p in self._dense), *self._shards()):
                if gradient is not None:
                    gradient.mul_(factor)
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """The factor mu of each matrix."""
        return self._reduction.mu.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over, also from another number of processes."""
        self._reduction.mu.load_state_dict(state)

    def _norm(self) -> Tensor:
        held = [g for g in self._gradients if g is not None]
        squares = [_norm_of(g) ** 2 for g in held]
        zero = torch.zeros((), device=self._device())
        total = torch.stack(squares).sum() if squares else zero
        if self._parts is not None and self._transport.ranks > 1:
            self._transport.total(total)
        if self._sharded:
            total = total + self._transport.total(
                torch.stack([zero, *(_norm_of(g) ** 2 for g in self._shards())]).sum()
            )
        dense = [_norm_of(p.grad) ** 2 for p in self._dense if p.grad is not None]
        return (torch.stack([total, *dense]).sum()).sqrt()

    def _device(self) -> torch.device:
        return (*self._matrices, *self._dense, *self._sharded)[0].device

    def _reduce_dense(self) -> None:
        if self._transport.ranks == 1 or not self._dense:
            return
        device = self._device()
        present = torch.tensor([p.grad is not None for p in self._dense], device=device)
        flat = torch.cat(
            [
                present.float(),
                *(
                    torch.zeros(p.numel(), device=device)
                    if p.grad is None
                    else p.grad.float().reshape(-1)
                    for p in self._dense
                ),
            ]
        )
        summed = self._transport.total(flat)
        head, *means = cut(summed, [len(self._dense), *(p.numel() for p in self._dense)])
        self._dense_present = head > 0
        for parameter, mean in zip(self._dense, means, strict=True):
            mean = mean.div(self._transport.ranks).view(parameter.shape).to(parameter.dtype)
            parameter.grad = mean
        if self._finite is not None:
            self._finite = self._finite & torch.isfinite(summed).all()

    def _shards(self) -> list[Tensor]:
        return [p.grad.to_local() for p in self._sharded if p.grad is not None]  # type: ignore[attr-defined]

    def _shards_finite(self, finite: Tensor | None) -> Tensor | None:
        if not self._sharded:
            return finite
        zero = torch.zeros((), device=self._device())
        amounts = [zero, *((~torch.isfinite(g)).any().float() for g in self._shards())]
        broken = self._transport.maximum(torch.stack(amounts).amax()[None])[0]
        return broken == 0 if finite is None else finite & (broken == 0)

    def _all_finite(self) -> Tensor:
        finite = torch.ones((), dtype=torch.bool, device=self._device())
        dense = [p.grad for p in self._dense]
        for gradient in (*self._gradients, *dense):
            if gradient is not None:
                values = gradient.codes if isinstance(gradient, Scaled) else gradient
                finite = finite & torch.isfinite(values.float()).all()
        return finite

    def _show(self) -> None:
        if self.observer is None:
            return
        for index, (parameter, gradient) in enumerate(
            zip(self._matrices, self._gradients, strict=False)
        ):
            if gradient is None:
                continue
            mu = self.last.mu[index] if self.last is not None else None
            if isinstance(gradient, Scaled):
                operand = Operand(gradient.format, gradient.scale_inv.reciprocal())
                self.observer(parameter, "grad_reduced", gradient.values(), operand, mu)
            else:
                self.observer(parameter, "grad_reduced", gradient, Operand("fp32", None), mu)

    def counts(self) -> dict[str, Tensor]:
        """Of the latest reduction, for a log: 0-dim tensors that nobody has waited for."""
        if self.last is None:
            return {}
        total = sum(p.numel() for p in self._matrices)
        last = self.last
        return {
            "gradient_overflow_ratio": last.overflow.sum() / total,
            "gradient_saturation_ratio": last.saturation.sum() / total,
            "gradient_at_largest_ratio": last.at_largest.sum() / total,
            "gradients_finite": last.finite.float(),
            "mu_min": last.mu.min(),
            "mu_mean": last.mu.mean(),
        }


def _coded(gradient: Tensor | Scaled) -> Scaled:
    """A copy that may be scaled without touching what is accumulated."""
    if not isinstance(gradient, Scaled):
        return encode(gradient, "e4m3")
    return Scaled(gradient.codes, gradient.scale, gradient.scale_inv.clone(), gradient.format)


def _norm_of(gradient: Tensor | Scaled) -> Tensor:
    if isinstance(gradient, Scaled):
        return gradient.norm()
    norm: Tensor = torch.linalg.vector_norm(gradient.float())
    return norm
