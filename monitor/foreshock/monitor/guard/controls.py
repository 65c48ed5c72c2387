"""What a loop lets a guard do: the protocol, and an implementation for any PyTorch loop.

Snapshots are kept in host memory and not on disk: they are for going back within this process, and
the loop's own checkpoints remain what survives it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils._pytree import tree_map

__all__ = ["CONTROLS", "Controls", "Switchable", "TorchControls"]

CONTROLS: Final = ("rate", "snapshots", "data", "precision", "scales")
"""Learning rate; snapshot and restore; skipping data; bfloat16 and back; margin and history."""


class Controls(Protocol):
    """What a guard calls, in the training thread, between two steps.

    What a loop cannot do stays out of `offers`; it is then never called, and said to be left out.
    """

    @property
    def offers(self) -> frozenset[str]:
        """Some of `CONTROLS`."""

    def rate(self) -> float | None:
        """Learning rate that the loop asked for at its last step; None before the first."""

    def limit_rate(self, ceiling: float | None) -> None:
        """From the next step on the learning rate is at most this; None lifts the limit."""

    def snapshot(self, step: int) -> None:
        """Keep the state before `step`."""

    def forget(self, step: int) -> None:
        """Drop a snapshot; of one that is not there, nothing happens."""

    def restore(self, step: int) -> None:
        """Go back to the state before `step`, in place."""

    def skip_data(self, count: int) -> None:
        """Leave out the data of so many steps from here on."""

    def use_bf16(self, layers: Sequence[str]) -> int:
        """Compute layers (glob patterns) in bfloat16; returns how many were found."""

    def use_fp8(self, layers: Sequence[str]) -> int:
        """Undo it; returns how many were found."""

    def rescale(self, layers: Sequence[str], margin: int, history: int) -> int:
        """Margin and amax history for the scales of layers; returns how many were found."""


@runtime_checkable
class Switchable(Protocol):
    """A layer whose precision can change between steps, such as the trainer's `Fp8Linear`."""

    def to_bf16(self) -> None:
        """Compute in bfloat16 from the next forward on."""

    def to_fp8(self) -> None:
        """Undo it."""

    def set_margin(self, margin: int) -> None:
        """Lower the scales by so many powers of two."""

    def set_history(self, length: int) -> None:
        """Length of the amax history."""


class _Stateful(Protocol):
    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> object: ...


class TorchControls:
    """Controls of a model and its optimizer, for any loop in PyTorch.

    The learning rate is limited by hooks around each optimizer step, so that schedulers neither
    notice nor undo it. Make it before the watch: the record then holds the rate that was used.

    Args:
        model: Of this process; what has `Switchable`'s methods can change its precision.
        optimizer: One, or all of the loop's.
        extra: What else belongs to the state and has `state_dict` and `load_state_dict`: a
            GradScaler, a data loader; a scheduler only where the loop's steps go back too.
        skip: Called with a number of steps whose data to leave out; None where the loop goes on
            with new data by itself, which is a skip already.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        extra: Iterable[_Stateful] = (),
        skip: Callable[[int], None] | None = None,
    ) -> None:
        single = isinstance(optimizer, torch.optim.Optimizer)
        self._optimizers: list[torch.optim.Optimizer] = (
            [optimizer] if single else list(optimizer)  # type: ignore[list-item, arg-type]
        )
        self._model = model
        self._parts: list[_Stateful] = [model, *self._optimizers, *extra]
        self._schedulers_go_back = any(hasattr(part, "get_last_lr") for part in self._parts)
        self._skip = skip
        self._kept: dict[int, tuple[list[Any], list[torch.Tensor]]] = {}
        self._ceiling: float | None = None
        self._asked: float | None = None
        self._before: dict[int, list[Any]] = {}
        self._layers = {n: m for n, m in model.named_modules() if isinstance(m, Switchable)}
        self._handles = [
            handle
            for o in self._optimizers
            for handle in (
                o.register_step_pre_hook(self._lower),
                o.register_step_post_hook(self._put_back),
            )
        ]

    @property
    def offers(self) -> frozenset[str]:
        """Precision and scales only where layers can change theirs."""
        offered = {"rate", "snapshots"}
        if self._layers:
            offered |= {"precision", "scales"}
        if self._skip is not None:
            offered.add("data")
        return frozenset(offered)

    def rate(self) -> float | None:
        """Of the first group of the first optimizer."""
        return self._asked

    def limit_rate(self, ceiling: float | None) -> None:
        """Of every group."""
        self._ceiling = ceiling

    def snapshot(self, step: int) -> None:
        """Copy weights, optimizer states and random state to host memory."""
        states = [_copied(part.state_dict()) for part in self._parts]
        self._kept[step] = (states, _random_states())

    def forget(self, step: int) -> None:
        """Drop a copy."""
        self._kept.pop(step, None)

    def restore(self, step: int) -> None:
        """Load a copy; it is kept, for a second time.

        The learning rates stay what the loop's scheduler has made them, unless a scheduler is
        among `extra` and goes back too.

        Raises:
            KeyError: There is none.
        """
        states, random = self._kept[step]
        groups = [group for o in self._optimizers for group in o.param_groups]
        rates = [group["lr"] for group in groups]
        for part, state in zip(self._parts, states, strict=True):
            # Optimizers keep what they are given.
            part.load_state_dict(_copied(state))
        groups = [group for o in self._optimizers for group in o.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            if not self._schedulers_go_back:
                group["lr"] = rate
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        _set_random_states(random)

    def skip_data(self, count: int) -> None:
        """Ask the loop."""
        if self._skip is not None:
            self._skip(count)

    def use_bf16(self, layers: Sequence[str]) -> int:
        """Of layers that are `Switchable`."""
        return self._each(layers, lambda layer: layer.to_bf16())

    def use_fp8(self, layers: Sequence[str]) -> int:
        """Of layers that are `Switchable`."""
        return self._each(layers, lambda layer: layer.to_fp8())

    def rescale(self, layers: Sequence[str], margin: int, history: int) -> int:
        """Of layers that are `Switchable`."""

        def change(layer: Switchable) -> None:
            layer.set_margin(margin)
            layer.set_history(history)

        return self._each(layers, change)

    def close(self) -> None:
        """Let go of the optimizers and of the copies; the limit no longer holds."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._kept.clear()

    def _each(self, patterns: Sequence[str], change: Callable[[Switchable], None]) -> int:
        # A wrapper (DDP) puts a prefix before the names that records hold.
        found = [
            layer
            for name, layer in self._layers.items()
            if any(fnmatch.fnmatchcase(_bare(name), p) for p in patterns)
        ]
        for layer in found:
            change(layer)
        return len(found)

    def _lower(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if optimizer is self._optimizers[0]:
            self._asked = float(optimizer.param_groups[0]["lr"])
        # A step within a step has lowered it already.
        if self._ceiling is None or id(optimizer) in self._before:
            return
        self._before[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            rate = group["lr"]
            if isinstance(rate, torch.Tensor):
                group["lr"] = rate.clamp(max=self._ceiling)
            else:
                group["lr"] = min(rate, self._ceiling)

    def _put_back(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        before = self._before.pop(id(optimizer), None)
        for group, rate in zip(optimizer.param_groups, before or (), strict=False):
            group["lr"] = rate


def _bare(name: str) -> str:
    for wrapper in ("module.", "_orig_mod."):
        name = name.removeprefix(wrapper)
    return name


def _copied(state: Any) -> Any:
    return tree_map(
        lambda x: x.detach().to("cpu", copy=True) if isinstance(x, torch.Tensor) else x, state
    )


def _random_states() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return states + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def _set_random_states(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
