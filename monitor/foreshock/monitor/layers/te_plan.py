"""Where a layer's operands lie, worked out once: later calls only read addresses and note them.

A plan is made after a call of which every tensor could wait for others, and is followed by calls
that are like it: same quantizers, same kinds of saved objects, same shapes, first call of the
micro-batch, no recomputation. Everything is looked at before anything is noted, so that a call
that is different can go the long way (`transformer_engine`) as if there were no plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from weakref import ref

import torch
from torch import nn

from foreshock.monitor.collector import Collector
from foreshock.monitor.device_rows import DeviceRows, Known
from foreshock.monitor.entry import Entry
from foreshock.monitor.layers.adapter import HookContext
from foreshock.monitor.layers.te_history import History
from foreshock.monitor.layers.te_operands import Cast, GemmPlace, plain, positions_in
from foreshock.monitor.placement import PLAIN

__all__ = ["GemmPlan", "Planned", "plan_of"]

_FORWARD: Final = "scaling_fwd"
_BACKWARD: Final = "scaling_bwd"
# The module's own argument instead of a saved tensor; no saved tensor at all.
_GIVEN, _NOWHERE = -1, -1


class Gradients(Protocol):
    """What looks at the output gradients of one call, the long way."""

    def came(self, gradient: torch.Tensor) -> None:
        """Before the layer's backward pass."""
        ...

    def went(self, *_: object) -> None:
        """After it."""
        ...


class Planned(Protocol):
    """The layer that a plan is for."""

    name: str
    context: HookContext
    collector: Collector
    history: History
    repeats: bool

    def cast(self, module: nn.Module, direction: str, position: int) -> Cast | None:
        """How the quantizer at a position casts; None if there is none."""
        ...

    def entry(self, layer: str, role: str, cast: Cast, index: int) -> Entry:
        """Whose scale and largest magnitude those of a quantizer are."""
        ...

    def await_gradients(self, module: nn.Module, result: torch.Tensor, node: Any) -> None:
        """The long way for the gradients of the first call of a micro-batch."""
        ...

    def gradients(self, module: nn.Module, *, updates: bool) -> Gradients:
        """The same for one whose scales last, when its gradient has come."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Quantizer:
    """One that must be the one it was, with the tensors that it had."""

    direction: str
    position: int
    cast: Cast

    def stays(self, quantizers: Any) -> bool:
        quantizer, (amax, scale) = self.cast.quantizer, self.cast.held
        try:
            return (
                quantizers[self.direction][self.position] is quantizer
                and quantizer.amax is amax
                and quantizer.scale is scale
            )
        except (AttributeError, LookupError, TypeError):
            return False


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """Where a tensor lies.

    Attributes:
        at: Position among the saved tensors, or `_GIVEN`.
        scale_at: Position of its inverse scale among them, or `_NOWHERE`.
        scale: Where it is always the same tensor, or none.
        known: What was worked out.
    """

    at: int
    scale_at: int
    scale: torch.Tensor | None
    known: Known


class _Operands:
    """Tensors of a call that are noted together."""

    __slots__ = ("_rows", "_sources", "group")

    def __init__(self, rows: DeviceRows, sources: Sequence[_Source]) -> None:
        self._rows = rows
        self._sources = [
            (s.at, s.scale_at, s.scale, s.known.shape, s.known.stride, s.known.dtype)
            for s in sources
        ]
        self.group = rows.group([s.known for s in sources])

    def found(self, given: Any, saved: Sequence[Any]) -> tuple[list[Any], ...] | None:
        """Tensors, addresses and scales; None where one is not like it was."""
        tensors, addresses, scales = [], [], []
        for at, scale_at, scale, shape, stride, dtype in self._sources:
            x = given if at < 0 else saved[at]
            if type(x) not in PLAIN:
                return None
            address = x.data_ptr()
            if address & 15 or x.shape != shape or x.dtype is not dtype or x.stride() != stride:
                return None
            if scale_at >= 0:
                scale = saved[scale_at]
                if type(scale) not in PLAIN:
                    return None
            tensors.append(x)
            addresses.append(address)
            scales.append(scale)
        return tensors, addresses, scales

    def note(self, found: tuple[list[Any], ...]) -> None:
        self._rows.add_group(self.group, *found)


class GemmPlan:
    """The way of one layer's first call in a micro-batch, as long as nothing has changed.

    Attributes:
        complete: Whether gradients are planned too.
    """

    __slots__ = (
        "_collector",
        "_context",
        "_generation",
        "_gradients",
        "_history",
        "_inputs",
        "_layer",
        "_names",
        "_rows",
        "_seen",
        "_weights",
        "complete",
    )

    def __init__(self, layer: Planned, rows: DeviceRows, names: Sequence[str], seen: _Seen) -> None:
        self._layer, self._names = layer, names
        self._collector, self._context = layer.collector, layer.context
        self._history = layer.history
        self._rows, self._generation = rows, rows.generation
        self._seen = seen
        self._inputs = _Operands(rows, seen.inputs)
        self._weights = _Operands(rows, seen.weights)
        self._gradients = seen.gradients
        self.complete = bool(seen.gradients)

    def follow(self, module: Any, args: tuple[object, ...], output: object) -> bool:
        """Note a call's operands.

        Returns:
            False, and nothing is done, for a call that is not like the one that was planned.
        """
        if not self._may_follow(module):
            return False
        result: Any = output[0] if type(output) is tuple else output
        node: Any = result.grad_fn if type(result) is torch.Tensor else None
        saved = self._saved_by(node)
        if saved is None:
            return False
        inputs = self._inputs.found(args[0] if args else None, saved)
        weighs = self._collector.still_weighs(self._names[0])
        weights = self._weights.found(None, saved) if weighs else None
        if inputs is None or (weighs and weights is None):
            return False
        self._context.calls[self._layer.name] = 1
        self._inputs.note(inputs)
        if weights is not None:
            for name in self._names:
                self._collector.weighs(name)
            self._weights.note(weights)
        if self._seen.entries:
            self._history.add(self._seen.entries, self._seen.values, lasting=True)
        self._await(module, result, node)
        return True

    def _may_follow(self, module: Any) -> bool:
        """Whether the call counts, is the first one, and casts as the planned one did."""
        collector, layer = self._collector, self._layer
        if (
            collector.room(lasting=collector.lasting) is None
            or self._generation != self._rows.generation
            or layer.repeats
            or layer.name in self._context.calls
            or not module.training
            or not module.fp8
            or not torch.is_grad_enabled()
            or torch._C._is_tracing()
            or torch._C._current_graph_task_id() != -1
            # The exact path.
            or module.__dict__.get("debug_enabled_in_this_iteration")
        ):
            return False
        held = module.quantizers
        return all(quantizer.stays(held) for quantizer in self._seen.quantizers)

    def _saved_by(self, node: Any) -> Sequence[Any] | None:
        """What a node saved, if it is as it was."""
        seen = self._seen
        if seen.node is not type(node):
            return None
        # Hooks on saved tensors may compute them anew.
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return None
        own: Any = node
        saved: Sequence[Any] = own.saved_tensors
        if len(saved) != seen.saved or [*map(type, own.tensor_objects)] != seen.kinds:
            return None
        return saved if all(saved[at] is None for at in seen.absent) else None

    def _await(self, module: nn.Module, result: Any, node: Any) -> None:
        updates = bool(getattr(node, "reduce_and_update_bwd_fp8_tensors", False))
        if not self.complete or not (updates or self._context.updates):
            self._layer.await_gradients(module, result, node)
            return
        self._context.updates = True
        gradients = self._gradients[updates]
        result.register_hook(gradients.come)
        if gradients.inner:
            node.register_hook(gradients.go)


class _PlannedGradients:
    """The output gradients of calls that went by a plan; passes of one layer do not overlap.

    Args:
        layer, module: Whose they are.
        outer: Of the gradient that passes by: what was worked out for it, and its scale.
        quantizers: That must have stayed.
        inner: Those that live only inside the layer: whose rows they are, and how they are cast.
        updates: Whether the layer's backward pass ends with the update of all scales.
    """

    def __init__(
        self,
        layer: Planned,
        module: nn.Module,
        *,
        outer: tuple[Known, torch.Tensor | None],
        quantizers: Sequence[_Quantizer],
        inner: Sequence[tuple[Entry, Cast]],
        updates: bool,
    ) -> None:
        self._layer, self._collector, self._history = layer, layer.collector, layer.history
        # Weakly: a layer that the model has let go of must not stay in memory.
        self._module = ref(module)
        self._known, self._scale = outer
        self._quantizers, self._updates = quantizers, updates
        self._entries = [entry for entry, _ in inner]
        self._values = [x for _, cast in inner for x in cast.kept or ()]
        self._long_way: Gradients | None = None
        self._came = False
        self.inner = bool(inner)
        self.come, self.go = layer.context.hook(self.came), layer.context.hook(self.went)

    def came(self, gradient: torch.Tensor) -> None:
        """Before the layer's backward pass."""
        module: Any = self._module()
        if module is None:
            return
        rows = self._collector.room(lasting=True)
        if (
            rows is None
            or (self._updates and self.inner)
            or self._layer.repeats
            or type(gradient) not in PLAIN
            or not all(quantizer.stays(module.quantizers) for quantizer in self._quantizers)
            or not rows.add_known(self._known, gradient, self._scale)
        ):
            self._long_way = self._layer.gradients(module, updates=self._updates)
            self._long_way.came(gradient)
            return
        self._long_way, self._came = None, True
        if self._updates:
            self._collector.flush()
        self._history.schedule()

    def went(self, *_: object) -> None:
        """After it."""
        long_way, self._long_way = self._long_way, None
        came, self._came = self._came, False
        if long_way is not None:
            long_way.went()
        elif came:
            self._history.add(self._entries, self._values, lasting=True)


@dataclass(slots=True)
class _Seen:
    """What a plan is made of.

    Attributes:
        node, kinds, saved: Type of the node, types of its objects, number of its saved tensors.
        quantizers: Of the forward pass.
        absent: Positions among the saved tensors at which there is none.
        inputs, weights: Where they lie.
        entries, values: Scales and largest magnitudes in force, two an entry.
        gradients: By whether they end with the update of all scales; empty where not known yet.
    """

    node: type
    kinds: list[type]
    saved: int
    quantizers: list[_Quantizer] = field(default_factory=list)
    absent: list[int] = field(default_factory=list)
    inputs: list[_Source] = field(default_factory=list)
    weights: list[_Source] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    gradients: dict[bool, _PlannedGradients] = field(default_factory=dict)


class _NotPlannedError(Exception):
    """This call cannot be planned."""


def plan_of(
    layer: Planned,
    module: Any,
    places: Sequence[GemmPlace],
    *,
    args: tuple[object, ...],
    output: object,
    node: str,
) -> GemmPlan | None:
    """The plan of a call that has been looked at; None where it has none, or not yet.

    Args:
        layer: Of the module.
        module: A layer of Transformer Engine.
        places: Of its GEMMs.
        args: Of the call.
        output: What it returned.
        node: Name of the type of the node that saved its tensors.
    """
    rows = layer.collector.room(lasting=layer.collector.lasting)
    if rows is None or layer.repeats or not getattr(module, "fp8", False):
        return None
    names = tuple(layer.name + place.suffix for place in places)
    try:
        seen = _Look(layer, module, args, output, node).seen(places)
    except _NotPlannedError:
        return None
    return GemmPlan(layer, rows, names, seen)


class _Look:
    """Looks where everything lies that the long way has just measured."""

    def __init__(
        self, layer: Planned, module: Any, args: tuple[object, ...], output: object, node: str
    ) -> None:
        self._layer, self._module = layer, module
        self._given = args[0] if args else None
        result: Any = output[0] if type(output) is tuple else output
        node_found: Any = result.grad_fn if type(result) is torch.Tensor else None
        _demand(type(node_found).__name__ == node)
        # Hooks on saved tensors may compute them anew.
        _demand(torch._C._autograd._top_saved_tensors_default_hooks(False) is None)
        self._node = node_found
        self._objects: Sequence[object] = getattr(node_found, "tensor_objects", None) or ()
        self._saved: Sequence[Any] = node_found.saved_tensors
        self._starts = positions_in(self._objects)

    def seen(self, places: Sequence[GemmPlace]) -> _Seen:
        seen = _Seen(type(self._node), [*map(type, self._objects)], len(self._saved))
        for place in places:
            self._input(place, seen)
            self._weight(place, seen)
        try:
            seen.gradients = {
                updates: self._gradients(places, updates) for updates in (False, True)
            }
        except _NotPlannedError:
            # Under current scaling they have launches of their own.
            seen.gradients = {}
        return seen

    def _input(self, place: GemmPlace, seen: _Seen) -> None:
        name, cast = self._layer.name + place.suffix, self._cast(_FORWARD, place.input, seen)
        if place.takes_input:
            _demand(plain(self._given) is self._given)
            seen.inputs.append(self._values(name, "input", _GIVEN, cast))
            return
        source = self._at(name, "input", place.saved_input, cast)
        if source is None:
            seen.absent.append(self._starts[place.saved_input])
        else:
            seen.inputs.append(source)
        values = source is not None and source.scale_at == _NOWHERE
        if not values and cast.kept is not None:
            seen.entries.append(self._layer.entry(name, "input", cast, 0))
            seen.values += cast.kept

    def _weight(self, place: GemmPlace, seen: _Seen) -> None:
        name, cast = self._layer.name + place.suffix, self._cast(_FORWARD, place.weight, seen)
        source = self._at(name, "weight", place.saved_weight, cast)
        if source is None:
            raise _NotPlannedError
        seen.weights.append(source)

    def _at(self, name: str, role: str, place: int, cast: Cast) -> _Source | None:
        """Where a saved operand lies."""
        _demand(place < len(self._starts))
        at = self._starts[place]
        if self._objects[place] is None:
            x = self._saved[at]
            if x is None:
                return None
            _demand(plain(x) is x)
            return self._values(name, role, at, cast)
        # Data, transpose and inverse scale.
        used = at if self._saved[at] is not None else at + 1
        return _Source(used, at + 2, None, self._known(name, role, cast.after.format))

    def _values(self, name: str, role: str, at: int, cast: Cast) -> _Source:
        return _Source(at, _NOWHERE, cast.after.scale, self._known(name, role, cast.after))

    def _known(self, name: str, role: str, how: object) -> Known:
        known = self._layer.collector.known(name, role, how)
        if known is None:
            raise _NotPlannedError
        return known

    def _gradients(self, places: Sequence[GemmPlace], updates: bool) -> _PlannedGradients:
        outer = [place for place in places if place.gives_output]
        _demand(len(outer) == 1)
        name = self._layer.name + outer[0].suffix
        operand = self._cast(_BACKWARD, outer[0].gradient).before
        inner = [
            (self._layer.entry(self._layer.name + place.suffix, "grad_output", cast, 0), cast)
            for place in places
            if not place.gives_output and (cast := self._cast(_BACKWARD, place.gradient))
        ]
        _demand(all(cast.kept is not None for _, cast in inner))
        return _PlannedGradients(
            self._layer,
            self._module,
            outer=(self._known(name, "grad_output", operand), operand.scale),
            quantizers=[
                _Quantizer(_BACKWARD, place.gradient, self._cast(_BACKWARD, place.gradient))
                for place in places
            ],
            inner=inner,
            updates=updates,
        )

    def _cast(self, direction: str, position: int, seen: _Seen | None = None) -> Cast:
        cast = self._layer.cast(self._module, direction, position)
        if cast is None:
            raise _NotPlannedError
        if seen is not None:
            seen.quantizers.append(_Quantizer(direction, position, cast))
        return cast


def _demand(fulfilled: bool) -> None:
    if not fulfilled:
        raise _NotPlannedError
