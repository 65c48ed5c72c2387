"""Transformer Engine's layers at every step: same kernels, no debug mode, no wait.

What is measured of a GEMM operand is the best that exists without changing the run. The tensor
itself, where the layer takes it, returns it or keeps it: module inputs of te.Linear, weights,
gradients of outputs. Its FP8 codes, where only they exist: behind a fused normalisation or
activation. Scale and largest magnitude, where not even codes are left: the gradient between the
two GEMMs of LayerNormMLP, attention probabilities. A layer that runs in 16 bits keeps everything as
values. The exact path (`foreshock.monitor.te_exact`) takes over at the steps at which it runs.

Imports nothing of Transformer Engine: it is asked only in a process that has loaded the library,
and knows its layers by the names of their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from foreshock.monitor import te_exact
from foreshock.monitor.entry import Entry
from foreshock.monitor.layers.adapter import Handle, HookContext, Switched, tensors_in
from foreshock.monitor.layers.te_history import History
from foreshock.monitor.layers.te_layer import Call, Layer
from foreshock.monitor.layers.te_operands import (
    Cast,
    Codes,
    GemmPlace,
    Saved,
    as_codes,
    plain,
    saved_by,
    saving_node,
)
from foreshock.monitor.layers.te_plan import GemmPlan, plan_of

__all__ = ["TransformerEngineAdapter"]


@dataclass(frozen=True, slots=True)
class _Kind:
    """A class of layers: the type of the node that saves its tensors, and its GEMMs."""

    node: str
    gemms: tuple[GemmPlace, ...]


_KINDS: Final = {
    "Linear": _Kind("_LinearBackward", (GemmPlace("", 0, 1, 0, 0, 2, takes_input=True),)),
    "LayerNormLinear": _Kind("_LayerNormLinearBackward", (GemmPlace("", 0, 1, 0, 5, 2),)),
    "LayerNormMLP": _Kind(
        "_LayerNormMLPBackward",
        (GemmPlace(".fc1", 0, 1, 0, 2, 4, gives_output=False), GemmPlace(".fc2", 3, 4, 2, 8, 10)),
    ),
}
# Calls between two tries to plan a layer, at most.
_LONGEST_PAUSE: Final = 256
_GROUPED: Final = "GroupedLinear"
_ATTENTION: Final = "DotProductAttention"
# Quantizers of attention: query, key and value share one; probabilities (FP8FwdTensors).
_QKV, _PROBABILITIES = 2, 8


class TransformerEngineAdapter:
    """Watches te.Linear, LayerNormLinear, LayerNormMLP, GroupedLinear and FP8 attention."""

    def __init__(self) -> None:
        self._history: tuple[HookContext, History] | None = None

    def claims(self, module: nn.Module) -> bool:
        """Whether it is one of them, or a subclass."""
        return _class_of(module) is not None

    def attach(self, name: str, module: nn.Module, context: HookContext) -> Sequence[Handle]:
        """One hook behind the layer's forward pass."""
        if self._history is None or self._history[0] is not context:
            self._history = (context, History(context))
        history = self._history[1]
        kind = _class_of(module)
        assert kind is not None
        layer: Layer
        if kind == _GROUPED:
            layer = _Grouped(name, context, history)
        elif kind == _ATTENTION:
            layer = _Attention(name, context, history)
        else:
            layer = _Gemms(name, context, history, _KINDS[kind])
        if kind != _ATTENTION:
            te_exact.register(module, name, context)
        return [Switched(module, context.layer_hook(layer.ran))]


def _class_of(module: nn.Module) -> str | None:
    for base in type(module).__mro__:
        if base.__module__.startswith("transformer_engine.pytorch."):
            name = base.__name__
            return name if name in _KINDS or name in (_GROUPED, _ATTENTION) else None
    return None


class _Gemms(Layer):
    """A layer with one GEMM, or with two."""

    def __init__(self, name: str, context: HookContext, history: History, kind: _Kind) -> None:
        super().__init__(name, context, history)
        self._kind = kind
        self._plan: GemmPlan | None = None
        # Calls until the next try to make one, and after the one that fails.
        self._pause, self._longer = 0, 1
        # Made once: a hook costs more to make than to call.
        self._come, self._go = context.hook(_Gradients.came), context.hook(_Gradients.went)

    def look(
        self, call: Call, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> None:
        """Inputs and weights now, gradients when they come."""
        result = next(tensors_in(output), None)
        node = saving_node(output, self._kind.node)
        saved = saved_by(node) if node is not None and self.collector.measuring else []
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        unseen = []
        for place in self._kind.gemms:
            held = given if place.takes_input else _at(saved, place.saved_input)
            if not self._input(call, place, held, _at(saved, place.saved_input)):
                cast = call.cast("scaling_fwd", place.input)
                unseen.append((self.name + place.suffix, "input", cast))
            self._weight(call, place, _at(saved, place.saved_weight))
        if call.fp8:
            call.kept(unseen)
        if result is not None and result.requires_grad:
            self._await_gradients(call, result, node)

    def ran(
        self,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        """After a call: by the plan if it is like the last one."""
        plan = self._plan
        if plan is not None and plan.follow(module, args, output):
            if plan.complete:
                return
        else:
            super().ran(module, args, kwargs, output)
        self._pause -= 1
        if self._pause < 0 and self.collector.room(lasting=self.collector.lasting) is not None:
            gemms, node = self._kind.gemms, self._kind.node
            self._plan = plan_of(self, module, gemms, args=args, output=output, node=node)
            # What differs from call to call is not worth a plan.
            self._pause, self._longer = self._longer, min(2 * self._longer, _LONGEST_PAUSE)

    def await_gradients(self, module: nn.Module, result: torch.Tensor, node: Any) -> None:
        """As `_await_gradients`, for the first call of a micro-batch."""
        self._await_gradients(Call(self, module, 0), result, node)

    def gradients(self, module: nn.Module, *, updates: bool) -> _Gradients:
        """Of the first call of a micro-batch, whose scales last."""
        gradients = _Gradients(Call(self, module, 0), self._kind.gemms)
        gradients.updates, gradients.lasting = updates, True
        return gradients

    def _input(self, call: Call, place: GemmPlace, held: Saved, spare: Saved) -> bool:
        """Measure the input; False if its values are nowhere to be had."""
        name, cast = self.name + place.suffix, call.cast("scaling_fwd", place.input)
        x = plain(held)
        if x is not None:
            call.values(name, "input", x, cast)
            return True
        codes = held if isinstance(held, Codes) else as_codes(held) or spare
        if isinstance(codes, Codes):
            call.codes(name, "input", codes, cast)
        return False

    def _weight(self, call: Call, place: GemmPlace, saved: Saved) -> None:
        name = self.name + place.suffix
        if not self.collector.measuring or not call.weighs(name):
            return
        cast = call.cast("scaling_fwd", place.weight)
        # One tensor even where the layer keeps query, key and value weights apart.
        if isinstance(saved, Codes):
            call.codes(name, "weight", saved, cast)
        elif saved is not None:
            call.values(name, "weight", saved, cast)
        else:
            for weight in _weights(call.module, place.suffix):
                call.values(name, "weight", weight, cast)

    def _await_gradients(self, call: Call, result: torch.Tensor, node: Any) -> None:
        gradients = _Gradients(call, self._kind.gemms)
        gradients.updates = bool(getattr(node, "reduce_and_update_bwd_fp8_tensors", False))
        # Transformer Engine has it done by the first layer of a forward pass. Where that one is
        # watched, gradients may wait until then for each other.
        self.context.updates = self.context.updates or gradients.updates
        gradients.lasting = self.collector.lasting and self.context.updates
        result.register_hook(partial(self._come, gradients))  # type: ignore[no-untyped-call]
        if node is not None and call.fp8 and self.collector.measuring and gradients.inner:
            node.register_hook(partial(self._go, gradients))


class _Gradients:
    """The output gradients of one call of a layer.

    Attributes:
        inner: GEMMs whose output gradient lives only inside the layer's backward pass.
        updates: Whether the layer's backward pass ends with the update of all scales, which moves
            this pass's largest magnitudes to the end of the history.
        lasting: Whether scales stay as they are until that layer's backward pass.
    """

    def __init__(self, call: Call, gemms: Sequence[GemmPlace]) -> None:
        self._call = call
        self._outer = [place for place in gemms if place.gives_output]
        self.inner = [place for place in gemms if not place.gives_output]
        self.updates = self.lasting = False
        self._scales: list[torch.Tensor] = []

    @property
    def _keeps(self) -> bool:
        """Whether scales and largest magnitudes outlast this layer's backward pass."""
        return self.lasting and not self.updates and not self._call.layer.repeats

    def came(self, gradient: torch.Tensor) -> None:
        """Before the layer's backward pass."""
        call, collector = self._call, self._call.layer.collector
        x = plain(gradient)
        if x is not None:
            collector.lasting = self.lasting
            for place in self._outer:
                cast = call.cast("scaling_bwd", place.gradient)
                call.values(call.layer.name + place.suffix, "grad_output", x, cast, before=True)
            collector.lasting = False
        if self.updates:
            collector.flush()
        if call.layer.collector.measuring and not call.layer.collector.recording:
            # The scale in force, which the pass may replace.
            scales = [scale for _, (_, scale) in self._inner_casts()]
            self._scales = scales if self._keeps else [scale.clone() for scale in scales]
            call.layer.history.schedule()

    def went(self, *_: object) -> None:
        """After it."""
        call, casts = self._call, self._inner_casts()
        if not call.layer.collector.measuring or len(casts) != len(self._scales):
            return
        entries: list[Entry] = []
        values: list[torch.Tensor] = []
        for place, (cast, (largest, scale)), before in zip(
            self.inner, casts, self._scales, strict=True
        ):
            amax = self._amax(place, cast, largest)
            if amax is not None:
                name = call.layer.name + place.suffix
                entries.append(call.layer.entry(name, "grad_output", cast, call.index))
                # Current scaling makes its scale during the pass.
                values += [amax, before if cast.delayed else scale]
        if entries:
            call.layer.history.add(entries, values, lasting=self._keeps)

    def _inner_casts(self) -> list[tuple[Cast, tuple[torch.Tensor, torch.Tensor]]]:
        casts = [self._call.cast("scaling_bwd", place.gradient) for place in self.inner]
        return [(c, c.kept) for c in casts if c is not None and c.kept is not None]

    def _amax(self, place: GemmPlace, cast: Cast, kept: torch.Tensor) -> torch.Tensor | None:
        if not (self.updates and cast.delayed):
            return kept
        state = getattr(self._call.module, "fp8_meta", {}).get("scaling_bwd")
        history = getattr(state, "amax_history", None)
        if not isinstance(history, torch.Tensor) or len(history) < 2:
            return None
        return history[-1, place.gradient].reshape(1)


class _Grouped(Layer):
    """GroupedLinear: one GEMM per expert, named as in Transformer Engine's own statistics.

    It keeps three quantizers per GEMM forward (input, weight, output) and two backward.
    """

    def __init__(self, name: str, context: HookContext, history: History) -> None:
        super().__init__(name, context, history)
        self._come = context.hook(self._gradient_came)

    def look(
        self, call: Call, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> None:
        """Each expert's rows of the input and of the gradient, and its weight."""
        x, splits = (*args, kwargs.get("inp"), kwargs.get("m_splits"))[:2]
        splits = kwargs.get("m_splits", splits)
        result = next(tensors_in(output), None)
        held = plain(x)
        if held is None or not isinstance(splits, list):
            self.collector.skipped.add((self.name, "input"))
            return
        self._pieces(call, "input", held, splits)
        for expert in range(len(splits)):
            name = f"{self.name}.gemm_{expert}"
            weight = plain(getattr(call.module, f"weight{expert}", None))
            if weight is not None and self.collector.measuring and call.weighs(name):
                call.values(name, "weight", weight, call.cast("scaling_fwd", expert * 3 + 1))
        if result is not None and result.requires_grad:
            result.register_hook(partial(self._come, call, splits))  # type: ignore[no-untyped-call]

    def _gradient_came(self, call: Call, splits: list[int], gradient: torch.Tensor) -> None:
        self._pieces(call, "grad_output", gradient, splits)

    def _pieces(self, call: Call, role: str, x: torch.Tensor, splits: list[int]) -> None:
        forward = role == "input"
        direction, each = ("scaling_fwd", 3) if forward else ("scaling_bwd", 2)
        pieces = torch.split(x.reshape(-1, x.shape[-1]), splits)
        for expert, piece in enumerate(pieces):
            cast = call.cast(direction, expert * each)
            call.values(f"{self.name}.gemm_{expert}", role, piece, cast, before=not forward)


class _Attention(Layer):
    """FP8 attention: query, key and value, which share a scale, and what is kept of probabilities.

    Probabilities exist only inside the kernel. Attention in 16 bits casts nothing and is left out.
    """

    def __init__(self, name: str, context: HookContext, history: History) -> None:
        super().__init__(name, context, history)
        self._come = context.hook(self._gradient_came)

    def ran(
        self,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        """Nothing unless the attention itself runs in FP8, which is seen at once."""
        if not self.collector.lasting or _attends_in_fp8(module):
            super().ran(module, args, kwargs, output)

    def look(
        self, call: Call, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> None:
        """Query, key, value and probabilities."""
        if not (call.fp8 and _attends_in_fp8(call.module) and self.collector.measuring):
            return
        shared = call.cast("scaling_fwd", _QKV)
        names = ("query_layer", "key_layer", "value_layer")
        for position, (role, name) in enumerate(zip(("query", "key", "value"), names, strict=True)):
            x = args[position] if position < len(args) else kwargs.get(name)
            codes, values = as_codes(x), plain(x)
            if codes is not None:
                call.codes(self.name, role, codes, shared)
            elif values is not None:
                call.values(self.name, role, values, shared)
        probabilities = call.cast("scaling_fwd", _PROBABILITIES)
        call.kept([(self.name, "attention_probs", probabilities)])
        result = next(tensors_in(output), None)
        if result is not None and result.requires_grad:
            result.register_hook(self._come)  # type: ignore[no-untyped-call]

    def _gradient_came(self, gradient: torch.Tensor) -> None:
        # Nothing to measure: rows are made at the end of the backward pass that has begun.
        self.history.schedule()


def _attends_in_fp8(module: nn.Module) -> bool:
    recipe = module.__dict__.get("fp8_meta", {}).get("recipe")
    return bool(getattr(recipe, "fp8_dpa", False))


def _at(saved: Sequence[Saved], position: int) -> Saved:
    return saved[position] if position < len(saved) else None


def _weights(module: nn.Module, suffix: str) -> list[torch.Tensor]:
    """The layer's own parameters, where nothing of them was found among the saved tensors."""
    names = getattr(module, "weight_names", None) or [f"{suffix[1:]}_weight"]
    found = (getattr(module, name, None) for name in names)
    return [w for w in found if isinstance(w, torch.Tensor) and plain(w) is not None]
