"""Hooks on a model and its layers: from a training step to the collector.

Knows no records and no host values. A hook never returns anything, so it cannot change a value of
the training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import nn

from foreshock.monitor import ops
from foreshock.monitor.collector import Collector
from foreshock.monitor.guard import Guard
from foreshock.monitor.layers import Adapter, HookContext, adapters
from foreshock.monitor.layers.adapter import Hook
from foreshock.monitor.notices import MOST_MICRO_BATCHES
from foreshock.monitor.placement import is_batched
from foreshock.monitor.scalars import find_loss

__all__ = ["ModelHooks", "count_modules", "find_layers", "is_watched", "plain_name", "unwrapped"]

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


def count_modules(model: nn.Module) -> int:
    """The model and everything in it."""
    return sum(1 for _ in model.modules())


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


def _claimed(model: nn.Module) -> dict[str, tuple[nn.Module, Adapter]]:
    known = adapters()
    layers: dict[str, tuple[nn.Module, Adapter]] = {}
    for name, module in model.named_modules():
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


class ModelHooks:
    """The hooks of one model.

    Args:
        model: Its forward delimits micro-batches.
        layers: Layers by name, each with its adapter.
        collector: Takes the tensors.
        guard: Around every hook.
        on_forward: Called when a training forward pass of the model begins.
        on_endless: Called after every `MOST_MICRO_BATCHES` of them in one step.
        on_loss: Called with the loss that a training forward pass of the model returned.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, tuple[nn.Module, Adapter]],
        *,
        collector: Collector,
        guard: Guard,
        on_forward: Callable[[], None],
        on_endless: Callable[[], None],
        on_loss: Callable[[torch.Tensor], None],
    ) -> None:
        self._on_forward, self._on_loss = on_forward, on_loss
        self._on_endless = on_endless
        self._begun = False
        self._told = False
        self._collector = collector
        collector.on_begin = self._begin
        collector.on_loss = on_loss
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
        self._names: set[str] = set()
        self.attach_new(layers)

    def attach_new(self, layers: Mapping[str, tuple[nn.Module, Adapter]]) -> list[str]:
        """Watch those layers that are not watched yet; their names."""
        new = [name for name in layers if name not in self._names]
        for name in new:
            module, adapter = layers[name]
            self._handles += adapter.attach(name, module, self._context)
        self._names |= set(new)
        return new

    def start_step(self) -> None:
        """Begin the next step."""
        self._begun = False
        self._context.new_micro_batch()

    def micro_batch(self) -> None:
        """A micro-batch begins; from now on the model's forward no longer says so."""
        self._told = True
        self._start_micro_batch()

    def detach(self) -> None:
        """Remove the hooks; output gradients of graphs still alive are no longer measured."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._collector.stop()

    def _model_begins(self, module: nn.Module, args: object, kwargs: object) -> None:
        if self._context.model_begins(module) and not self._told:
            self._start_micro_batch()

    def _start_micro_batch(self) -> None:
        self._begin()
        self._context.new_micro_batch()
        if self._collector.micro_batch >= MOST_MICRO_BATCHES:
            self._on_endless()
        self._collector.start_micro_batch()

    def _model_returns(self, module: nn.Module, args: object, output: object) -> None:
        if self._context.model_returns(module):
            loss = find_loss(output)
            if loss is not None and not is_batched(loss):
                self._on_loss(loss)

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

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._on_forward()
