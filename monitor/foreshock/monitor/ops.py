"""The operation that a compiled graph calls where a hook stands.

torch.compile keeps an operation with an ordered effect: it is neither dropped nor doubled nor moved
past another one, in forward and in backward, and needs no graph break. Its body is ordinary
Python that runs whenever the graph does, and once, at capture, in a CUDA graph.
"""

from __future__ import annotations

import itertools
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from torch._higher_order_ops.effects import _register_effectful_op
from torch._library.effects import EffectType

__all__ = ["Receiver", "begin", "observe", "register"]


class Receiver:
    """What an operation in a graph hands its tensor to."""

    def receive(self, x: torch.Tensor, scale: torch.Tensor | None, key: int, code: int) -> None:
        """Take a tensor.

        Args:
            x: The tensor.
            scale: Scale in force, or None.
            key: Which tensor it is, an index of the receiver's own.
            code: The receiver's own word about this call.
        """
        raise NotImplementedError

    def begin(self) -> None:
        """A training forward pass of the model begins."""
        raise NotImplementedError


# An operation is known to the whole process by its name; a graph holds numbers and tensors only.
# So the way from a graph back to a watch goes through this table, which keeps nobody alive.
_RECEIVERS: Final[WeakValueDictionary[int, Receiver]] = WeakValueDictionary()
_NUMBERS: Final = itertools.count()

# The version is part of the name: a cache of compiled graphs may outlive this code.
_LIBRARY: Final = torch.library.Library("foreshock", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("observe_v1(Tensor x, Tensor? scale, int handle, int key, int code) -> ()")  # type: ignore[no-untyped-call]
_LIBRARY.define("begin_v1(Tensor token, int handle) -> ()")  # type: ignore[no-untyped-call]


def _observe(x: torch.Tensor, scale: torch.Tensor | None, handle: int, key: int, code: int) -> None:
    receiver = _RECEIVERS.get(handle)
    if receiver is not None:
        receiver.receive(x, scale, key, code)


def _begin(token: torch.Tensor, handle: int) -> None:
    receiver = _RECEIVERS.get(handle)
    if receiver is not None:
        receiver.begin()


def _nothing(*_: Any) -> None:
    """Shapes do not change."""


for _name, _body in (("observe_v1", _observe), ("begin_v1", _begin)):
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _nothing, "Meta")  # type: ignore[no-untyped-call]
    _register_effectful_op(getattr(torch.ops.foreshock, _name).default, EffectType.ORDERED)


def register(receiver: Receiver) -> int:
    """A number under which graphs reach the receiver, as long as it lives."""
    number = next(_NUMBERS)
    _RECEIVERS[number] = receiver
    return number


def observe(x: torch.Tensor, scale: torch.Tensor | None, handle: int, key: int, code: int) -> None:
    """Hand a tensor over from inside a graph."""
    torch.ops.foreshock.observe_v1(x.detach(), scale, handle, key, code)


def begin(token: torch.Tensor, handle: int) -> None:
    """Tell from inside a graph that a forward pass begins; any tensor of the graph is a token."""
    torch.ops.foreshock.begin_v1(token.detach(), handle)
