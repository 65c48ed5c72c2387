"""Hooks on a model and its layers: from a training step to the collector.

Knows no records and no host values. A hook never returns anything, so it cannot change a value of
the training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from foreshock.monitor import ops
from foreshock.monitor.collector import Collector
from foreshock.monitor.containment import Containment
from foreshock.monitor.layers import Adapter, HookContext, adapters
from foreshock.monitor.layers.adapter import Handle, Hook, Switched
from foreshock.monitor.layers.te_operands import autocast_is_on
from foreshock.monitor.notices import MOST_MICRO_BATCHES
from foreshock.monitor.placement import is_batched
from foreshock.monitor.scalars import find_loss

__all__ = [
    "Callbacks",
    "ModelHooks",
    "find_layers",
    "is_watched",
    "modules_in",
    "plain_name",
    "uncovered",
    "unwrapped",
]

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside torch.compile's and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def modules_in(model: nn.Module) -> int:
    """A number that changes when a module of the model comes, goes or is replaced."""
    return hash(tuple(map(id, model.modules())))


def plain_name(name: str) -> str:
    """A qualified name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def find_layers(
    model: nn.Module, *, include: str | None = None, exclude: str | None = None
) -> dict[str, tuple[nn.Module, Adapter]]:
    """The layers of a model that can be watched, by qualified name, in order of definition.

    Args:
        model: Searched with all its submodules; a shared module counts under its first name.
        include: Regular expression; only names in which it is found. None takes all.
        exclude: Regular expression; names in which it is found are left out.

    Raises:
        ValueError: No layer is left, or an expression is not one.
    """
    try:
        wanted = re.compile("" if include is None else include)
        unwanted = None if exclude is None else re.compile(exclude)
    except re.error as error:
        raise ValueError(f"include or exclude is no regular expression: {error}") from None
    layers = _claimed(model)
    if not layers:
        raise ValueError(
            "no linear layer found: watch knows nn.Linear in bf16, fp16 or fp32, Transformer "
            "Engine's and torchao's layers, and modules with operand(role) and weight "
            "(foreshock.monitor.operands.QuantizedGemm)"
        )
    chosen = {
        name: layer
        for name, layer in layers.items()
        if wanted.search(name) and not (unwanted and unwanted.search(name))
    }
    if not chosen:
        raise ValueError(
            f"include={include!r} and exclude={exclude!r} leave none of {len(layers)} linear "
            f"layers, the first of which is {next(iter(layers))!r}"
        )
    return chosen


def uncovered(model: nn.Module, names: Mapping[nn.Parameter, str]) -> tuple[float, list[str]]:
    """What of the trained matrices no watched kind of layer uses.

    Args:
        model: All of it; what a user leaves out by a regular expression counts as covered.
        names: Trained parameters with their names. Those of one axis, and embeddings, which no
            GEMM reads, are left aside.

    Returns:
        Share of the elements that is covered, names of the others, the largest first.
    """
    layers = [module for module, _ in _claimed(model).values()]
    known = {id(p) for layer in layers for p in layer.parameters()}
    looked_up = (m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
    aside = {id(p) for module in looked_up for p in module.parameters()} - known
    matrices = [p for p in names if p.ndim > 1 and id(p) not in aside]
    missed = [p for p in matrices if id(p) not in known]
    every = sum(p.numel() for p in matrices)
    share = 1.0 - sum(p.numel() for p in missed) / every if every else 1.0
    return share, [names[p] for p in sorted(missed, key=lambda p: -p.numel())]


def _claimed(model: nn.Module) -> dict[str, tuple[nn.Module, Adapter]]:
    known = adapters()
    layers: dict[str, tuple[nn.Module, Adapter]] = {}
    # It reads the weight of this layer and never calls it.
    bypassed = {
        id(module.out_proj)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
    }
    for name, module in model.named_modules():
        if id(module) in bypassed:
            continue
        adapter = next((adapter for adapter in known if adapter.claims(module)), None)
        if adapter is not None:
            layers[plain_name(name) or type(module).__name__] = (module, adapter)
    return layers


def is_watched(model: nn.Module) -> bool:
    """Whether a watcher hangs on the model or on a part of it."""
    return any(
        isinstance(hook, Hook)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Whom the hooks on a model tell what.

    Attributes:
        forward: The first training forward pass of a step begins.
        micro_batch: Any one begins; called before `forward`.
        endless: There have been `MOST_MICRO_BATCHES` more of them in one step.
        loss: The loss that one returned.
    """

    forward: Callable[[], None]
    micro_batch: Callable[[], None]
    endless: Callable[[], None]
    loss: Callable[[torch.Tensor], None]


class ModelHooks:
    """The hooks of one model.

    Args:
        model: Its forward delimits micro-batches.
        layers: Layers by name, each with its adapter.
        collector: Takes the tensors.
        guard: Around every hook.
        callbacks: Whom to tell.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, tuple[nn.Module, Adapter]],
        collector: Collector,
        guard: Containment,
        *,
        callbacks: Callbacks,
    ) -> None:
        self._callbacks = callbacks
        self._begun = False
        self._told = False
        self._collector = collector
        collector.on_begin = self._pass_begins
        collector.on_loss = callbacks.loss
        self._context = HookContext(collector, guard, self._begin, lambda: self._begun)
        self._handle = collector.handle
        self._handles = [
            model.register_forward_pre_hook(
                self._context.hook(self._model_begins, self._traced_begin), with_kwargs=True
            ),
            model.register_forward_hook(
                self._context.hook(self._model_returns, self._traced_return)
            ),
        ]
        # Weakly: a layer that the model has let go of must not stay in memory.
        self._layers: dict[str, tuple[ref[nn.Module], Sequence[Handle]]] = {}
        self._switched: list[Switched] = []
        self._on = True
        # Whether the model's forward tells of passes; without it the layers' hooks must.
        self._heard = False
        self._compiled = False
        try:
            self.attach_new(layers)
        except BaseException:
            self.detach()
            raise

    def attach_new(self, layers: Mapping[str, tuple[nn.Module, Adapter]]) -> list[str]:
        """Watch those layers that are not watched yet, or have come in place of another.

        Returns:
            Their names.
        """
        new = []
        for name, (module, adapter) in layers.items():
            held, old = self._layers.get(name, (_nobody, ()))
            if held() is module:
                continue
            for handle in old:
                handle.remove()
            self._layers[name] = ref(module), adapter.attach(name, module, self._context)
            new.append(name)
        of_layers = (handle for _, handles in self._layers.values() for handle in handles)
        self._switched = [handle for handle in of_layers if isinstance(handle, Switched)]
        self._on = True
        return new

    def start_step(self) -> None:
        """Begin the next step."""
        self._begun = False
        self._context.new_micro_batch()
        self._switch(on=self._collector.wants or not self._heard or self._compiled)

    def _switch(self, *, on: bool) -> None:
        if on != self._on:
            self._on = on
            for handle in self._switched:
                handle.switch(on=on)

    def micro_batch(self) -> None:
        """A micro-batch begins; from now on the model's forward no longer says so."""
        self._told = True
        self._start_micro_batch()

    def detach(self) -> None:
        """Remove the hooks; output gradients of graphs still alive are no longer measured."""
        of_layers = (handle for _, handles in self._layers.values() for handle in handles)
        for handle in (*self._handles, *of_layers):
            handle.remove()
        self._handles, self._layers = [], {}
        self._collector.stop()

    def _model_begins(self, module: nn.Module, args: object, kwargs: object) -> None:
        # A graph that is captured or compiled now is run at steps that look.
        self._compiled = self._compiled or get_eval_frame_callback() is not None
        if not self._on and (self._compiled or self._collector.recording):
            self._switch(on=True)
        if self._context.model_begins(module) and not self._told:
            self._heard = True
            self._start_micro_batch()
            collector = self._collector
            collector.lasting = collector.measuring and not collector.recording and autocast_is_on()
            self._context.updates = False

    def _start_micro_batch(self) -> None:
        self._pass_begins()
        self._context.new_micro_batch()
        if self._collector.micro_batch >= MOST_MICRO_BATCHES:
            self._callbacks.endless()
        self._collector.start_micro_batch()

    def _model_returns(self, module: nn.Module, args: object, output: object) -> None:
        # Where the model returns, or a context around it ends, its scales may change.
        self._collector.lasting = False
        self._collector.flush()
        if self._context.model_returns(module):
            loss = find_loss(output)
            if loss is not None and not is_batched(loss):
                self._callbacks.loss(loss)

    def _traced_begin(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        values = (*args, *kwargs.values())
        token = next((value for value in values if isinstance(value, torch.Tensor)), None)
        if module.training and torch.is_grad_enabled() and token is not None:
            ops.begin(token, self._handle)

    def _traced_return(self, module: nn.Module, args: object, output: object) -> None:
        loss = find_loss(output)
        if module.training and torch.is_grad_enabled() and loss is not None:
            ops.observe(loss, None, self._handle, 0, -1)

    def _pass_begins(self) -> None:
        self._callbacks.micro_batch()
        self._begin()

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._callbacks.forward()


def _nobody() -> None:
    """No layer under this name yet."""
