"""xIELU on a device in two passes through memory: one forward, one backward with both slopes.

torch.compile makes three of it, and the sums of the two learnable scalars read everything again.
Imported where there is a CUDA device, or Triton's interpreter in tests.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["xielu_on_device"]

_BLOCK: Final = 2048
_PROGRAMS: Final = 1056


def xielu_on_device(x: Tensor, a_p: Tensor, a_n: Tensor) -> Tensor:
    """As `fused.xielu`, with float32 arithmetic for bfloat16 x; a_p and a_n have one element."""
    y: Tensor = _XieluOnDevice.apply(x, a_p, a_n)
    return y


class _XieluOnDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a_p: Tensor, a_n: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        count = x.numel()
        _forward_kernel[(triton.cdiv(count, _BLOCK),)](x, y, a_p, a_n, count, BLOCK=_BLOCK)
        ctx.save_for_backward(x, a_p, a_n)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, a_p, a_n = ctx.saved_tensors
        grad, slope = grad.contiguous(), torch.empty_like(x)
        count = x.numel()
        programs = min(_PROGRAMS, triton.cdiv(count, _BLOCK))
        sums = torch.empty(2, programs, device=x.device)
        _backward_kernel[(programs,)](x, grad, slope, sums, a_p, a_n, count, programs, BLOCK=_BLOCK)
        above, below = sums.sum(-1).unbind()
        return slope, above.view(a_p.shape), below.view(a_n.shape)


@triton.jit
def _forward_kernel(x_ptr, y_ptr, a_p_ptr, a_n_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < count, other=0.0).to(tl.float32)
    # exp - 1 is off by 6e-8, far below bfloat16.
    below = tl.load(a_n_ptr) * (tl.exp(tl.minimum(x, 0.0)) - 1.0 - x)
    y = tl.where(x > 0, tl.load(a_p_ptr) * x * x, below) + 0.5 * x
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), at < count)


@triton.jit
def _backward_kernel(
    x_ptr, grad_ptr, slope_ptr, sums_ptr, a_p_ptr, a_n_ptr, count, programs, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    a_p, a_n = tl.load(a_p_ptr), tl.load(a_n_ptr)
    above = tl.zeros((BLOCK,), tl.float32)
    below = tl.zeros((BLOCK,), tl.float32)
    first = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for start in range(0, count, programs * BLOCK):
        at = first + start
        x = tl.load(x_ptr + at, at < count, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, at < count, other=0.0).to(tl.float32)
        grown = tl.exp(tl.minimum(x, 0.0)) - 1.0
        positive = x > 0
        slope = tl.where(positive, 2.0 * a_p * x, a_n * grown) + 0.5
        tl.store(slope_ptr + at, (grad * slope).to(slope_ptr.dtype.element_ty), at < count)
        above += tl.where(positive, grad * x * x, 0.0)
        below += tl.where(positive, 0.0, grad * (grown - x))
    tl.store(sums_ptr + program, tl.sum(above, 0))
    tl.store(sums_ptr + programs + program, tl.sum(below, 0))
