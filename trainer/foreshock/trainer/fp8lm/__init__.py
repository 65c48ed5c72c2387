"""FP8-LM (Peng et al., "FP8-LM: Training FP8 Large Language Models", arXiv:2310.18313), made anew.

    from foreshock.trainer.fp8lm import StatesConfig, fp8_optimizer
    optimizer = fp8_optimizer(model, StatesConfig(level="O2"), lr=2e-3)

O1: gradients and their reduction in FP8. O2: optimizer states in FP8 and FP16. O3: weights in FP8,
sharded and gathered. torch operations only, on any device; GEMMs are `foreshock.trainer.precision`.
"""

from foreshock.trainer.fp8lm.levels import fp8_optimizer
from foreshock.trainer.fp8lm.optimizer import Fp8AdamW
from foreshock.trainer.fp8lm.weights import ScaledWeight, scale_weights
from foreshock.trainer.states_config import CommunicationConfig, Level, StatesConfig

__all__ = [
    "CommunicationConfig",
    "Fp8AdamW",
    "Level",
    "ScaledWeight",
    "StatesConfig",
    "fp8_optimizer",
    "scale_weights",
]
