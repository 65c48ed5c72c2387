"""The learning rate of any step: linear warm-up, stable, 1-sqrt decay, times a ramp fault.

A function of the configuration and the step alone: no scheduler object, so nothing to save.
"""

from __future__ import annotations

import math

from foreshock.trainer.config import RunConfig
from foreshock.trainer.faults import LearningRateRamp

__all__ = ["learning_rate"]


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of the optimizer step `step` (0-based).

    The decay is lr (1 - sqrt(p)), p the progress within the decay phase, of Hägele et al.,
    "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations" (2024).
    """
    schedule = config.schedule
    rate = config.optimizer.learning_rate
    if step < schedule.warmup_steps:
        rate *= (step + 1) / schedule.warmup_steps
    decay_steps = round(schedule.decay_share * config.steps)
    into_decay = step - (config.steps - decay_steps)
    if decay_steps and into_decay > 0:
        rate *= 1 - math.sqrt(min(1.0, into_decay / decay_steps))
    if schedule.drop_at and step >= schedule.drop_at:
        rate *= schedule.drop_to
    if isinstance(config.fault, LearningRateRamp):
        rate *= config.fault.multiplier(step)
    return rate
