"""Activation checkpointing that leaves the scales of FP8 layers as the first pass left them.

A recomputed block must cast with the scales of its first pass and must not show its tensors to the
amax history twice. Dropout does not exist here, so no generator needs a replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute_in_backward"]

_Buffers = list[tuple[nn.Module, str, torch.Tensor]]


def recompute_in_backward(block: nn.Module) -> None:
    """Let a block keep its inputs alone and compute the rest again in backward, in place.

    Names of parameters and buffers stay as they are.
    """
    forward = block.forward

    def recomputed(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(
            forward,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=_contexts(block),
        )

    block.forward = recomputed


def _contexts(
    block: nn.Module,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    def make() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _as_before(block, _copies(block))

    return make


@contextmanager
def _as_before(block: nn.Module, first: _Buffers) -> Iterator[None]:
    now = _copies(block)
    _restore(first)
    try:
        yield
    finally:
        _restore(now)


def _copies(block: nn.Module) -> _Buffers:
    # Some layers replace their buffers and some write into them: copies serve both.
    return [
        (module, name, buffer.clone())
        for module in block.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]


def _restore(buffers: _Buffers) -> None:
    for module, name, value in buffers:
        setattr(module, name, value)
