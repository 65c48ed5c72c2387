"""Scalars of every step, on the device: loss, gradient norm, parameter norm, update ratio.

Reads parameters and gradients and writes nothing. Reads no value on the host.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from foreshock.monitor.containment import Containment
from foreshock.monitor.placement import PLAIN, local_of

if TYPE_CHECKING:
    from foreshock.monitor.fused_norms import FusedNorms

__all__ = [
    "SAMPLED_ELEMENTS",
    "GradientNorms",
    "Norms",
    "Parameters",
    "Value",
    "find_loss",
    "learning_rate",
    "mean",
    "one_value",
]

Value = torch.Tensor | float

# A run whose passes open ever anew is told of every gradient.
_MOST_SURPRISES: Final = 8

SAMPLED_ELEMENTS: Final = 4096
"""At most this many elements of each parameter stand for it in `update_ratio`."""


def find_loss(output: object) -> torch.Tensor | None:
    """The loss in what a model returned.

    A 0-dim floating tensor, `.loss` or `["loss"]`. In a tuple or list, the first 0-dim floating
    tensor that gradients can come through, so that no measure beside the loss is taken for it;
    the first one at all where none has a graph.
    """
    if isinstance(output, Mapping):
        candidates: Sequence[object] = (output.get("loss"),)
    elif isinstance(output, tuple | list):
        candidates = (getattr(output, "loss", None), *output)
    else:
        candidates = (output, getattr(output, "loss", None))
    losses = [
        candidate
        for candidate in candidates
        if isinstance(candidate, torch.Tensor)
        and candidate.ndim == 0
        and candidate.is_floating_point()
    ]
    return next((loss for loss in losses if loss.requires_grad), losses[0] if losses else None)


def learning_rate(optimizers: Iterable[torch.optim.Optimizer]) -> Value | None:
    """The largest over the parameter groups; a tensor is not waited for."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    rates = [group["lr"] for group in groups if "lr" in group]
    values = [one_value("learning_rate", rate) for rate in rates]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    numbers = [value for value in values if not isinstance(value, torch.Tensor)]
    if not tensors:
        return max(numbers, default=None)
    largest = torch.stack(tensors).max()
    return largest.clamp(min=max(numbers)) if numbers else largest


def mean(values: Sequence[torch.Tensor | float]) -> torch.Tensor | float:
    """Mean of 0-dim tensors, or of numbers.

    Numbers stay on the host; a mixture goes to the first tensor's device.
    """
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not tensors:
        return sum(float(value) for value in values) / len(values)
    like = tensors[0]
    parts = [
        torch.as_tensor(value, dtype=torch.float64).to(like.device, non_blocking=True)
        for value in values
    ]
    return torch.stack(parts).mean()


def one_value(name: str, value: torch.Tensor | float) -> Value:
    """A value to log; a tensor on a device is copied and not waited for.

    Raises:
        ValueError: It is a tensor of more or fewer than one element.
    """
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.numel() != 1:
        raise ValueError(
            f"log({name}=...) got a tensor of shape {tuple(value.shape)}, not one value"
        )
    if value.device.type == "cpu":
        return float(value.detach())
    return value.detach().reshape(()).to(torch.float64, copy=True)


@dataclass(frozen=True, slots=True)
class Norms:
    """L2 norms by parameter name.

    Attributes:
        names: In order.
        vectors: One tensor with all norms, or none.
    """

    names: tuple[str, ...] = ()
    vectors: tuple[torch.Tensor, ...] = ()


class GradientNorms:
    """L2 norms of gradients as backward leaves them, before anything clips them.

    A hook on each parameter notes that a gradient has come; when the backward pass is over, all of
    them are measured together. The last pass of the step holds the whole gradient. Of a sharded
    parameter it is the local shard's norm.

    Whose gradient comes first in a pass asks to be called at its end. After a step it is known
    which these are, and the others' hooks run no Python from then on: they are the `append` of a
    list. If another one opens a pass, the optimizer's step finds that, and a step is learnt from.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], guard: Containment) -> None:
        # By parameter name; the last of two for the same one counts.
        self._norms: list[Norms] = []
        self._captured = Norms()
        self._came: list[torch.Tensor] = []
        self._backward = -1
        self._known: tuple[list[torch.Tensor], tuple[str, ...]] = ([], ())
        self._guard = guard
        self._names = names
        self._fused = _fused(next((local_of(p.detach()).device for p in names), None))
        self._held: torch.Tensor | None = None
        # Those whose gradients came first in a pass.
        self._openers: set[torch.Tensor] = set()
        self._learnt, self._surprises = False, 0
        self._handles = {
            parameter: _hooked(parameter, self._accumulated)
            for parameter in names
            if parameter.requires_grad
        }

    def norms(self) -> Norms:
        """Of the step so far, in the order of the last backward pass.

        A captured graph measures at every replay and tells nobody: its numbers are looked up.
        """
        if not self._norms:
            captured = self._captured
            return Norms(captured.names, tuple(vector.clone() for vector in captured.vectors))
        if len(self._norms) == 1 or self._norms[-1].names == self._norms[0].names:
            return self._norms[-1]
        return _last_of_each(self._norms)

    @property
    def thrown_away(self) -> bool:
        """Whether gradients came, no optimizer has used them, and they are gone."""
        return self._held is not None and self._held.grad is None

    def use(self) -> bool:
        """An optimizer is about to step: whether what came, if it did, is still there for it."""
        there = not self.thrown_away
        if self._came:
            self._measure()
            self._surprises += 1
            self._let_tell(self._handles)
        elif not self._learnt and self._openers and self._surprises < _MOST_SURPRISES:
            self._let_tell(self._openers)
        self._held = None
        return there

    def start_step(self) -> None:
        """Forget the step that ended."""
        self._norms = []
        self._came.clear()
        self._held = None

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def _accumulated(self, parameter: torch.Tensor) -> None:
        # Called for every parameter in every backward pass: nothing here may cost anything.
        # What a pass that raised has left behind must not keep the next one unmeasured.
        backward = torch._C._current_graph_task_id()
        if not self._came or backward != self._backward:
            self._backward = backward
            self._openers.add(parameter)
            with self._guard:
                _at_end_of_backward(self._backward_ends)
        self._came.append(parameter)

    def _let_tell(self, some: Container[torch.Tensor]) -> None:
        """Hooks in Python for these, and for all others what costs least."""
        self._learnt = some is self._openers
        for parameter, handle in self._handles.items():
            handle.remove()
            tells = self._accumulated if parameter in some else self._came.append
            self._handles[parameter] = _hooked(parameter, tells)

    def _backward_ends(self) -> None:
        # Data-parallel wrappers finish their reductions in such a callback too; once more to the
        # end of the queue puts this one behind theirs.
        _at_end_of_backward(self._measure)

    def _measure(self) -> None:
        with self._guard, torch.no_grad():
            came = self._came.copy()
            self._came.clear()
            # A parameter may have come in two passes, one of which raised.
            if not self._same(came):
                came = list(dict.fromkeys(came))
            held = [p for p in came if p.grad is not None]
            if not held:
                return
            self._held = held[0]
            gradients = [_values(p.grad) for p in held if p.grad is not None]
            vector = None if self._fused is None else self._fused.norms(gradients)
            if vector is None:
                vector = _stacked(_norms(gradients))
            norms = Norms(self._names_of(held), (vector,))
            if _capturing(norms):
                self._captured = norms
            else:
                self._norms.append(norms)

    def _names_of(self, parameters: list[torch.Tensor]) -> tuple[str, ...]:
        """Names in order; they are the same in every step, or nearly."""
        if not self._same(parameters):
            names = tuple(self._names[p] for p in parameters if isinstance(p, nn.Parameter))
            self._known = (parameters, names)
        return self._known[1]

    def _same(self, parameters: list[torch.Tensor]) -> bool:
        known = self._known[0]
        return len(known) == len(parameters) and all(map(is_, known, parameters))


def _fused(device: torch.device | None) -> FusedNorms | None:
    """Norms by one launch, where there is a CUDA device and Triton."""
    if device is None or device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from foreshock.monitor.fused_norms import FusedNorms

    return FusedNorms(device)


def _hooked(parameter: nn.Parameter, function: Callable[[torch.Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(function)  # type: ignore[no-untyped-call]
    return handle


def _last_of_each(several: Sequence[Norms]) -> Norms:
    """Each parameter's last norm, in the order in which they came."""
    found: dict[str, torch.Tensor] = {}
    for norms in several:
        for name, norm in zip(norms.names, norms.vectors[0].unbind(0), strict=True):
            found.pop(name, None)
            found[name] = norm
    return Norms(tuple(found), (_stacked(list(found.values())),))


def _stacked(norms: list[torch.Tensor]) -> torch.Tensor:
    if len({norm.dtype for norm in norms[:1]} | {norm.dtype for norm in norms}) > 1:
        norms = [norm.double() for norm in norms]
    return torch.stack(norms)


def _at_end_of_backward(function: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(function)


def _capturing(norms: Norms) -> bool:
    on_cuda = any(vector.is_cuda for vector in norms.vectors)
    return on_cuda and torch.cuda.is_current_stream_capturing()


def _values(x: torch.Tensor) -> torch.Tensor:
    """The numbers that this process holds of a gradient or a parameter."""
    # Asked for each parameter in each step; most are plain.
    held = x if type(x) in PLAIN else local_of(x.detach())
    return held.coalesce().values() if held.is_sparse else held


class Parameters:
    """Norms of the parameters, and how far one optimizer step moves them.

    The update ratio ||after - before|| / ||before|| is estimated from a fixed strided sample of
    each parameter, whole for those of at most `SAMPLED_ELEMENTS` elements, in which every sampled
    element stands for as many as the stride; memory is bounded by two samples.
    """

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        self._parameters = [p for p in names if local_of(p.detach()).numel()]
        self._names = tuple(names[parameter] for parameter in self._parameters)
        self._before: torch.Tensor | None = None
        self._views: list[tuple[nn.Parameter, int, torch.Tensor]] = []
        self._weights: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory of the samples: the weights', and of the two between which a step lies."""
        weights = self._weights
        return 0 if weights is None else 3 * weights.numel() * weights.element_size()

    def before_step(self) -> None:
        """Take the sample that the step is about to change, unless it is taken."""
        if self._before is None:
            self._before = self._sample()

    def norms(self) -> Norms:
        """Each parameter's norm; of a sharded one, the local shard's."""
        if not self._parameters:
            return Norms()
        with torch.no_grad():
            norms = _norms([_values(parameter) for parameter in self._parameters])
            return Norms(self._names, (_stacked(norms),))

    def update_ratio(self) -> torch.Tensor | None:
        """How far the step moved; None without a sample from before it."""
        before, self._before = self._before, None
        if before is None:
            return None
        with torch.no_grad():
            after = self._sample()
            return None if after is None else self._ratio(before, after)

    def _ratio(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        if self._weights is None or self._weights.device != before.device:
            parts = [
                before.new_full(_sample_of(p).shape, float(_stride(_values(p))))
                for p in self._parameters
            ]
            self._weights = torch.cat(parts)
        change = after - before
        moved = torch.dot(self._weights, change.square_())
        size = torch.dot(self._weights, before.square_())
        return (moved.double() / size.double()).sqrt()

    def _sample(self) -> torch.Tensor | None:
        if not self._parameters:
            return None
        with torch.no_grad():
            # Views are made once, for as long as every parameter stays where it is.
            if not self._views or any(p.data_ptr() != at for p, at, _ in self._views):
                plain = all(type(p) in PLAIN for p in self._parameters)
                samples = [_sample_of(parameter) for parameter in self._parameters]
                pairs = zip(self._parameters, samples, strict=True)
                self._views = [(p, p.data_ptr(), s) for p, s in pairs] if plain else []
            else:
                samples = [sample for _, _, sample in self._views]
            return torch.cat(samples).float()


def _stride(values: torch.Tensor) -> int:
    return -(-values.numel() // SAMPLED_ELEMENTS)


def _sample_of(parameter: nn.Parameter) -> torch.Tensor:
    values = _values(parameter)
    sample = values.reshape(-1)[:: _stride(values)]
    return torch.view_as_real(sample).reshape(-1) if sample.is_complex() else sample


def _norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """One call for all of them; it takes one type at a time."""
    if not tensors:
        return []
    same = len({(x.dtype, x.device) for x in tensors}) == 1 and not tensors[0].is_complex()
    if not same or any(not x.numel() for x in tensors):
        return [_norm(x) for x in tensors]
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return list(torch._foreach_norm(tensors, 2, dtype=wide))


def _norm(x: torch.Tensor) -> torch.Tensor:
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm: torch.Tensor = torch.linalg.vector_norm(x, dtype=wide)
    return norm
