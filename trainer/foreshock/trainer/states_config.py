"""What a run keeps in low precision, and how it sums gradients over processes.

Apart from `fp8lm`, which needs torch: the command line reads configurations where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foreshock.trainer.config_fields import later

__all__ = ["CommunicationConfig", "Level", "StateFormat", "StatesConfig"]

StateFormat = Literal["e4m3", "e5m2", "fp16", "bf16", "fp32"]
Level = Literal["O0", "O1", "O2", "O3"]
"""FP8-LM's levels: O0 none, O1 gradients and their reduction, O2 optimizer states too, O3 weights
too."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatesConfig:
    """Formats of what training keeps from step to step (FP8-LM, section 2.2).

    Matrices have them; gains and biases stay float32. Formats left at None follow the level:

    | level | weight | master | gradient | exp_avg | exp_avg_sq |
    |---|---|---|---|---|---|
    | O1 | fp16, scaled: its own master | - | e4m3 | fp32 | fp32 |
    | O2 | as O1 | - | e4m3 | e4m3 | fp16 |
    | O3 | e4m3 | fp16, scaled | e4m3 | e4m3 | fp16 |

    Attributes:
        level: O0 leaves all of it alone: float32 weights, torch's AdamW.
        exp_avg, exp_avg_sq, master: Formats that differ from the level's; e4m3, e5m2 and fp16 have
            a scale.
        block: 0 = one scale per tensor; else FP8 moments have one per so many elements.
        range_expansion: FP8 moments in COAT's f(x) = sign(x) |x|^k; needs `block`.
        stochastic_rounding: Round an fp16 or bf16 master up or down by chance, unbiased.
        rounding_seed: Of that chance.
        parameters: Of level O0: float32, or bfloat16 matrices (GEMMs, embedding, head) and their
            gradients, with a float32 master each in the optimizer, as mixed precision usually is.
        accumulate: How micro-batches add up: e4m3 (add in float32, store FP8 each time), bf16, or
            fp32; the last two are cast to FP8 once, before the reduction.
    """

    level: Level = "O0"
    exp_avg: StateFormat | None = None
    exp_avg_sq: StateFormat | None = None
    master: StateFormat | None = None
    block: int = 0
    range_expansion: bool = False
    stochastic_rounding: bool = False
    rounding_seed: int = 0
    accumulate: Literal["e4m3", "bf16", "fp32"] = "e4m3"
    parameters: Literal["float32", "bfloat16"] = later("float32")

    def __post_init__(self) -> None:
        levels = ("O0", "O1", "O2", "O3")
        _require(self.level in levels, f"level is {self.level!r}; allowed: {', '.join(levels)}")
        _require(self.block >= 0, f"block is {self.block}; allowed: 0 or more")
        formats = ("e4m3", "e5m2", "fp16", "bf16", "fp32")
        for name in ("exp_avg", "exp_avg_sq", "master"):
            value = getattr(self, name)
            _require(
                value is None or value in formats,
                f"{name} is {value!r}; allowed: None, {', '.join(formats)}",
            )
        _require(
            self.block > 0 or not self.range_expansion,
            "range_expansion needs block; COAT's is 128",
        )
        kinds = ("float32", "bfloat16")
        _require(self.parameters in kinds, f"parameters is {self.parameters!r}; allowed: {kinds}")
        _require(
            self.parameters == "float32" or self.level == "O0",
            f"parameters is bfloat16 at level {self.level}, which has a format of its own for "
            "weights; allowed there: float32",
        )
        ways = ("e4m3", "bf16", "fp32")
        _require(self.accumulate in ways, f"accumulate is {self.accumulate!r}; allowed: {ways}")

    @property
    def exp_avg_format(self) -> StateFormat:
        """Of the first moment, the level's unless given."""
        return self.exp_avg or ("fp32" if self.level in ("O0", "O1") else "e4m3")

    @property
    def exp_avg_sq_format(self) -> StateFormat:
        """Of the second moment, the level's unless given."""
        return self.exp_avg_sq or ("fp32" if self.level in ("O0", "O1") else "fp16")

    @property
    def master_format(self) -> StateFormat:
        """Of the weight that steps are added to, the level's unless given."""
        return self.master or ("fp32" if self.level == "O0" else "fp16")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommunicationConfig:
    """How FP8 gradients of several processes become their mean (FP8-LM, section 2.1).

    Attributes:
        reduction: fp8_sum (sums are FP8 at every step, as NCCL's are), or fp32_sum (FP8 on the
            wire, added in float32, cast to FP8 once more to be gathered).
        scaling: What fp8_sum multiplies gradients by: pre (1/N: small ones are lost), post (1:
            sums saturate), auto (mu, per tensor).
        mu_threshold: Share of elements at the largest code above which mu is halved.
        mu_doubling_steps: In how many quiet steps mu doubles.
        mu_power_of_two: Use the power of two below mu, so that moving codes to the shared scale
            rounds none of them again.
        skip_nonfinite: Leave a step out whose gradients are not finite on any process, before or
            after the sum.
    """

    reduction: Literal["fp8_sum", "fp32_sum"] = "fp8_sum"
    scaling: Literal["pre", "post", "auto"] = "auto"
    mu_threshold: float = 1e-5
    mu_doubling_steps: int = 1000
    mu_power_of_two: bool = True
    skip_nonfinite: bool = True

    def __post_init__(self) -> None:
        ways, scalings = ("fp8_sum", "fp32_sum"), ("pre", "post", "auto")
        _require(self.reduction in ways, f"reduction is {self.reduction!r}; allowed: {ways}")
        _require(self.scaling in scalings, f"scaling is {self.scaling!r}; allowed: {scalings}")
        _require(
            0 <= self.mu_threshold < 1,
            f"mu_threshold is {self.mu_threshold}; allowed: [0, 1)",
        )
        _require(
            self.mu_doubling_steps >= 1,
            f"mu_doubling_steps is {self.mu_doubling_steps}; allowed: 1 or more",
        )
