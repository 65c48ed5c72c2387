"""How a kind of layer is watched: what an adapter promises, and what the monitor lends it.

An adapter knows one kind of module and nothing of records, steps or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol
from weakref import ref

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.eval_frame import skip_code
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from foreshock.monitor.collector import Collector
from foreshock.monitor.containment import Containment

__all__ = ["Adapter", "Handle", "Hook", "HookContext", "Switched", "tensors_in"]


def _inert(*_: object) -> None:
    """What a hook becomes in a copy of the model."""


def _get_inert() -> Callable[..., None]:
    return _inert


class Hook:
    """A hook that never raises into the training and does not travel.

    Copying or pickling the model leaves a function that does nothing in its place.

    Args:
        guard: Around the function.
        function: Runs eagerly.
        traced: Runs instead while torch.compile traces; None traces as doing nothing.
        idle: Whether there is nothing to do now; None always runs.
    """

    __slots__ = ("_run", "function", "guard", "idle", "traced")

    def __init__(
        self,
        guard: Containment,
        function: Callable[..., None],
        traced: Callable[..., None] | None = None,
        idle: Callable[[], bool] | None = None,
    ) -> None:
        self.idle = idle
        self.guard = guard
        self.function = function
        self.traced = traced
        self._run = torch.compiler.disable(self._guarded)  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any) -> None:
        """As a hook is called."""
        # A guard is no part of a graph: what is traced must be plain tensor work.
        if torch.compiler.is_compiling():
            if self.traced is not None:
                self.traced(*args)
            return
        if self.idle is not None and self.idle():
            return
        # Switching the compiler off costs as much as a hook; mostly there is nothing to switch.
        if get_eval_frame_callback() is None:
            self._guarded(*args)
        else:
            self._run(*args)

    @property
    def __name__(self) -> str:
        # Asked by torch.jit.script, which compiles hooks and fails on what is no plain function.
        raise AttributeError(
            "a watched model cannot be compiled by torch.jit.script; close the watch first, or "
            "script a copy.deepcopy of the model made before the watch"
        )

    def _guarded(self, *args: Any) -> None:
        with self.guard:
            if not torch._C._len_torch_dispatch_stack():
                self.function(*args)
                return
            # Whoever looks at the training's operations must not see ours: a selective checkpoint
            # takes what it kept by the order of operations, and would give one of ours back.
            with _disable_current_modes():
                self.function(*args)

    def __deepcopy__(self, memo: dict[int, object]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> str | tuple[Any, ...]:
        return (_get_inert, ())


# A hook of the outermost module, or beside a graph break, is called by itself: it must not become
# a graph of its own. Inside a graph it is traced all the same.
skip_code(Hook.__call__.__code__)


class HookContext:
    """What an adapter works with.

    Attributes:
        collector: Takes the tensors.
        calls: How often each layer has been called in the micro-batch, where a call counted.
        updates: Whether a layer of the forward pass in progress will, at the end of its backward
            pass, have the scales of all gradients made anew.
    """

    def __init__(
        self,
        collector: Collector,
        guard: Containment,
        begins: Callable[[], None],
        begun: Callable[[], bool] = lambda: False,
    ) -> None:
        self.collector = collector
        self.updates = False
        self.begins = begins
        self._begun = begun
        self._guard = guard
        self.calls: dict[str, int] = {}
        # Calls in training mode that kept no graph, since the model's forward began.
        self._without_graph: dict[nn.Module, int] = {}
        # The whole model runs without gradients, for its values; or again, for its graph.
        self._for_values = False
        self._for_graph = False

    def model_begins(self, model: nn.Module) -> bool:
        """A pass of the whole model begins; whether it counts."""
        self._for_values = self._for_graph = False
        counts = self.counts(model)
        self._for_values = not torch.is_grad_enabled()
        self._for_graph = counts and torch._C._current_graph_task_id() != -1
        return counts

    def model_returns(self, model: nn.Module) -> bool:
        """It is over; whether it counted."""
        counts = self.counts(model)
        self._for_values = self._for_graph = False
        return counts

    def counts(self, module: nn.Module) -> bool:
        """Whether this call is training, and the one of its kind: asked once per call.

        Evaluation is none. Activation checkpoints run a layer again inside the backward pass: where
        the first run kept a graph, the second is a repetition; where it did not (reentrant
        checkpoints run it without gradients), the second is the one that gradients come through.
        """
        if not module.training or torch._C._is_tracing():
            return False
        if not torch.is_grad_enabled():
            # A pass of the whole model for its values alone is never repeated.
            if not self._for_values:
                self._note_values(module)
            return False
        # Inside a backward pass a forward runs only to recompute what was not kept.
        if torch._C._current_graph_task_id() == -1 or self._for_graph:
            return True
        waiting = self._without_graph.get(module, 0)
        self._without_graph[module] = max(waiting - 1, 0)
        return waiting > 0

    def _note_values(self, module: nn.Module) -> None:
        """A call without gradients: one more to come again with them, or such a one come again."""
        waiting = self._without_graph.get(module, 0)
        if torch._C._current_graph_task_id() != -1:
            self._without_graph[module] = max(waiting - 1, 0)
        elif not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled()):
            # A reentrant checkpoint is an autograd function, in which both kinds of gradients are
            # off; a call under torch.no_grad is for its values, and stays so when it is repeated.
            self._without_graph[module] = waiting + 1

    def next_call(self, name: str) -> int:
        """0-based count of the layer's calls within the micro-batch."""
        index = self.calls.get(name, 0)
        self.calls[name] = index + 1
        return index

    def new_micro_batch(self) -> None:
        """Count calls from 0 again."""
        self.calls = {}
        self._without_graph = {}

    def hook(
        self, function: Callable[..., None], traced: Callable[..., None] | None = None
    ) -> Hook:
        """The function as something that may hang on a module or a tensor."""
        return Hook(self._guard, function, traced)

    def layer_hook(
        self, function: Callable[..., None], traced: Callable[..., None] | None = None
    ) -> Hook:
        """The same for a layer, whose hook has nothing to do while nothing is looked at."""
        return Hook(self._guard, function, traced, self._idle)

    def _idle(self) -> bool:
        return self._begun() and not self.collector.wants


class Switched:
    """A forward hook that is on its module only while something is looked at.

    For layers that torch.compile never traces: a graph made in between would lack it. Costs a
    module nothing while it is off.

    Args:
        module: Its layer.
        hook: As `nn.Module.register_forward_hook` takes it, with keyword arguments.
    """

    def __init__(self, module: nn.Module, hook: Hook) -> None:
        # Weakly: a layer that the model has let go of must not stay in memory.
        self._module = ref(module)
        self._hook = hook
        self._handle: RemovableHandle | None = None
        self._removed = False
        self.switch(on=True)

    def switch(self, *, on: bool) -> None:
        """Put the hook on its module, first of all, or take it off."""
        module = self._module()
        if on and self._handle is None and module is not None and not self._removed:
            self._handle = module.register_forward_hook(self._hook, prepend=True, with_kwargs=True)
        elif not on and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def remove(self) -> None:
        """Take it off for good."""
        self.switch(on=False)
        self._removed = True


class Handle(Protocol):
    """What takes hooks off."""

    def remove(self) -> None:
        """For good."""
        ...


class Adapter(Protocol):
    """Watches one kind of layer."""

    def claims(self, module: nn.Module) -> bool:
        """Whether the module is of this kind; the first adapter that says so has it."""
        ...

    def attach(self, name: str, module: nn.Module, context: HookContext) -> Sequence[Handle]:
        """Put hooks on the module; the handles take them off."""
        ...


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The floating tensors among a layer's arguments or outputs, in order."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
