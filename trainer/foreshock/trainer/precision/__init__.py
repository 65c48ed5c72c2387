"""How the GEMMs of the blocks are computed: backends behind one kind of linear layer.

Knows neither blocks nor the training loop; a loop sets faults on the layers, step by step.
"""

from foreshock.trainer.precision.attention import (
    AttentionCore,
    HeadSizes,
    PlainAttention,
    attention_core,
)
from foreshock.trainer.precision.block_linear import BlockLinear
from foreshock.trainer.precision.cast import GEMM_DTYPE, quantize, saturating_cast
from foreshock.trainer.precision.factory import around_forward, gemm_linear
from foreshock.trainer.precision.layer_faults import LayerFaults
from foreshock.trainer.precision.linear import (
    Bf16Linear,
    Fp8Linear,
    GemmLinear,
)
from foreshock.trainer.precision.opt_out import describe, leave_in_bf16
from foreshock.trainer.precision.scaling import Scaling, tensor_amax

__all__ = [
    "GEMM_DTYPE",
    "AttentionCore",
    "Bf16Linear",
    "BlockLinear",
    "Fp8Linear",
    "GemmLinear",
    "HeadSizes",
    "LayerFaults",
    "PlainAttention",
    "Scaling",
    "around_forward",
    "attention_core",
    "describe",
    "gemm_linear",
    "leave_in_bf16",
    "quantize",
    "saturating_cast",
    "tensor_amax",
]
