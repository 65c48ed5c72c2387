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
from foreshock.monitor.layers.adapter import Handle, HookContext, Switched, tensors_in
from foreshock.monitor.layers.te_history import History
from foreshock.monitor.layers.te_operands import (
    Cast,
    Codes,
    Saved,
    as_codes,
    plain,
    saved_by,
    saving_node,
)
from foreshock.monitor.operands import DTYPE_FORMATS, Operand
from foreshock.monitor.record import TensorIdentity

__all__ = ["GemmPlace", "TransformerEngineAdapter"]


@dataclass(frozen=True, slots=True)
class GemmPlace:
    """Where the operands of one GEMM of a layer are found.

    Attributes:
        suffix: What the GEMM is called behind the layer's name.
        input, weight: Positions of their quantizers (Transformer Engine's FP8FwdTensors).
        gradient: Position of the output gradient's quantizer (FP8BwdTensors).
        saved_input, saved_weight: Positions among the tensors that the layer saves.
        takes_input: Whether the operand is the module's own input.
        gives_output: Whether the GEMM's output is the module's, so that its gradient passes by.
    """

    suffix: str
    input: int
    weight: int
    gradient: int
    saved_input: int
    saved_weight: int
    takes_input: bool = False
    gives_output: bool = True


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
        layer: _Layer
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


class _Layer:
    """One watched layer."""

    def __init__(self, name: str, context: HookContext, history: History) -> None:
        self.name = name
        self.context = context
        self.collector = context.collector
        self.history = history
        self.repeats = False
        self._casts: dict[tuple[str, int], Cast] = {}
        self._identities: dict[tuple[str, str, str, int], TensorIdentity] = {}

    def cast(self, module: nn.Module, direction: str, position: int) -> Cast | None:
        """How the quantizer at a position casts; None if there is none."""
        known = getattr(module, "quantizers", {}).get(direction) or ()
        if position >= len(known):
            return None
        found = self._casts.get((direction, position))
        if found is None or found.quantizer is not known[position] or not found.current:
            found = Cast.of(module, known[position])
            self._casts[direction, position] = found
        return found

    def identity(self, layer: str, role: str, cast: Cast, index: int) -> TensorIdentity:
        """The row of a tensor that is cast so."""
        format = cast.after.format
        key = layer, role, format, index
        found = self._identities.get(key)
        if found is None:
            granularity = cast.after.granularity
            found = TensorIdentity(layer, role, format, index, granularity=granularity)
            self._identities[key] = found
        return found

    def ran(
        self,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        """After a call."""
        if not self.context.counts(module):
            return
        self.context.begins()
        if not self.collector.wants or te_exact.took_over(module):
            return
        index = self.context.next_call(self.name)
        self.repeats = self.repeats or index > 0
        self.look(_Call(self, module, index), args, kwargs, output)

    def look(
        self, call: _Call, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> None:
        """Measure what a counted call left."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Call:
    """One counted call of a layer."""

    layer: _Layer
    module: nn.Module
    index: int

    @property
    def fp8(self) -> bool:
        """Whether it ran in FP8; a layer knows since its forward pass."""
        return bool(getattr(self.module, "fp8", False))

    def cast(self, direction: str, position: int) -> Cast | None:
        """How the quantizer at a position casts, or None."""
        return self.layer.cast(self.module, direction, position)

    def values(
        self, layer: str, role: str, x: torch.Tensor, cast: Cast | None, *, before: bool = False
    ) -> None:
        """Measure a tensor, after its cast unless told otherwise."""
        if cast is None or not self.fp8:
            compute = getattr(self.module, "activation_dtype", x.dtype)
            operand = Operand(DTYPE_FORMATS.get(compute, "fp32"), None)
        else:
            operand = cast.before if before else cast.after
        self.layer.collector.observe(layer, role, x, operand, call_index=self.index)

    def codes(self, layer: str, role: str, codes: Codes, cast: Cast | None) -> None:
        """Measure the codes of a tensor."""
        if cast is not None:
            self.layer.collector.observe_codes(
                layer,
                role,
                codes.data,
                format=cast.after.format,
                scale_inv=codes.scale_inv,
                call_index=self.index,
            )

    def kept(self, rows: Sequence[tuple[str, str, Cast | None]]) -> None:
        """Keep largest magnitudes and scales in force, of tensors by layer and role."""
        if not self.layer.collector.measuring or self.layer.collector.recording:
            return
        identities, values = [], []
        for layer, role, cast in rows:
            if cast is not None and cast.amax is not None and cast.scale is not None:
                identities.append(self.layer.identity(layer, role, cast, self.index))
                values += [cast.amax, cast.scale]
        if identities:
            self.layer.history.add(identities, values, lasting=self.lasting)

    @property
    def lasting(self) -> bool:
        """Whether this call's scales and largest magnitudes stay as they are for now.

        A layer that is called again goes on with its largest magnitudes.
        """
        return self.layer.collector.lasting and not self.layer.repeats

    def weighs(self, layer: str) -> bool:
        """Whether the layer's weight is still to be measured in this step."""
        return self.layer.collector.weighs(layer)


class _Gemms(_Layer):
    """A layer with one GEMM, or with two."""

    def __init__(self, name: str, context: HookContext, history: History, kind: _Kind) -> None:
        super().__init__(name, context, history)
        self._kind = kind
        # Made once: a hook costs more to make than to call.
        self._come, self._go = context.hook(_Gradients.came), context.hook(_Gradients.went)

    def look(
        self, call: _Call, args: tuple[object, ...], kwargs: dict[str, object], output: object
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

    def _input(self, call: _Call, place: GemmPlace, held: Saved, spare: Saved) -> bool:
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

    def _weight(self, call: _Call, place: GemmPlace, saved: Saved) -> None:
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

    def _await_gradients(self, call: _Call, result: torch.Tensor, node: Any) -> None:
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

    def __init__(self, call: _Call, gemms: Sequence[GemmPlace]) -> None:
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
            scales = [cast.scale for cast in self._inner_casts()]
            self._scales = scales if self._keeps else [scale.clone() for scale in scales]
            call.layer.history.schedule()

    def went(self, *_: object) -> None:
        """After it."""
        call, casts = self._call, self._inner_casts()
        if not call.layer.collector.measuring or len(casts) != len(self._scales):
            return
        identities, values = [], []
        for place, cast, before in zip(self.inner, casts, self._scales, strict=True):
            amax = self._amax(place, cast)
            if amax is not None:
                name = call.layer.name + place.suffix
                identities.append(call.layer.identity(name, "grad_output", cast, call.index))
                # Current scaling makes its scale during the pass.
                values += [amax, before if cast.delayed else cast.scale]
        if identities:
            call.layer.history.add(identities, values, lasting=self._keeps)

    def _inner_casts(self) -> list[Any]:
        casts = [self._call.cast("scaling_bwd", place.gradient) for place in self.inner]
        return [c for c in casts if c is not None and c.amax is not None and c.scale is not None]

    def _amax(self, place: GemmPlace, cast: Cast) -> torch.Tensor | None:
        if not (self.updates and cast.delayed):
            return cast.amax
        state = getattr(self._call.module, "fp8_meta", {}).get("scaling_bwd")
        history = getattr(state, "amax_history", None)
        if not isinstance(history, torch.Tensor) or len(history) < 2:
            return None
        return history[-1, place.gradient]


class _Grouped(_Layer):
    """GroupedLinear: one GEMM per expert, named as in Transformer Engine's own statistics.

    It keeps three quantizers per GEMM forward (input, weight, output) and two backward.
    """

    def __init__(self, name: str, context: HookContext, history: History) -> None:
        super().__init__(name, context, history)
        self._come = context.hook(self._gradient_came)

    def look(
        self, call: _Call, args: tuple[object, ...], kwargs: dict[str, object], output: object
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

    def _gradient_came(self, call: _Call, splits: list[int], gradient: torch.Tensor) -> None:
        self._pieces(call, "grad_output", gradient, splits)

    def _pieces(self, call: _Call, role: str, x: torch.Tensor, splits: list[int]) -> None:
        forward = role == "input"
        direction, each = ("scaling_fwd", 3) if forward else ("scaling_bwd", 2)
        pieces = torch.split(x.reshape(-1, x.shape[-1]), splits)
        for expert, piece in enumerate(pieces):
            cast = call.cast(direction, expert * each)
            call.values(f"{self.name}.gemm_{expert}", role, piece, cast, before=not forward)


class _Attention(_Layer):
    """FP8 attention: query, key and value, which share a scale, and what is kept of probabilities.

    Probabilities exist only inside the kernel. Attention in 16 bits casts nothing and is left out.
    """

    def __init__(self, name: str, context: HookContext, history: History) -> None:
        super().__init__(name, context, history)
        self._come = context.hook(self._gradient_came)

    def look(
        self, call: _Call, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> None:
        """Nothing unless the attention itself runs in FP8."""
        recipe = getattr(call.module, "fp8_meta", {}).get("recipe")
        if not (call.fp8 and getattr(recipe, "fp8_dpa", False) and self.collector.measuring):
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


def _at(saved: Sequence[Saved], position: int) -> Saved:
    return saved[position] if position < len(saved) else None


def _weights(module: nn.Module, suffix: str) -> list[torch.Tensor]:
    """The layer's own parameters, where nothing of them was found among the saved tensors."""
    names = getattr(module, "weight_names", None) or [f"{suffix[1:]}_weight"]
    found = (getattr(module, name, None) for name in names)
    return [w for w in found if isinstance(w, torch.Tensor) and plain(w) is not None]
