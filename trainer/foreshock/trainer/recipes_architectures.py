"""More named runs: the other architectures, FP8 attention and FP8-LM's second level.

All have the data, sizes and length of `llama_cpu`, so that what differs is what their name says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from foreshock.trainer.config import (
    Architecture,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    StatesConfig,
)

__all__ = ["ARCHITECTURE_RECIPES"]


def _run(
    name: str,
    architecture: Architecture,
    seed: int,
    precision: PrecisionConfig | None = None,
    states: StatesConfig | None = None,
) -> RunConfig:
    return RunConfig(
        name=name,
        model=ModelConfig(architecture=architecture),
        precision=precision or PrecisionConfig(),
        schedule=ScheduleConfig(decay_share=0.2),
        states=states or StatesConfig(),
        seed=seed,
    )


def llama_bf16_cpu(seed: int = 0) -> RunConfig:
    """`llama_cpu` with bfloat16 linears: the baseline of FP8 runs."""
    return _run("llama-bf16-cpu", "llama3", seed, PrecisionConfig(backend="bf16"))


def smooth_swiglu_cpu(seed: int = 0) -> RunConfig:
    """Llama 3 with Smooth-SwiGLU per channel, as published."""
    return _run("smooth-swiglu-cpu", "llama3_smooth_swiglu", seed)


def olmo2_cpu(seed: int = 0) -> RunConfig:
    """OLMo 2 blocks: norms behind the branches, norms of queries and keys with gains."""
    return _run("olmo2-cpu", "olmo2", seed)


def op_cpu(seed: int = 0) -> RunConfig:
    """Outlier-protected blocks: no norms, scaled residual branches."""
    return _run("op-cpu", "op", seed)


def fog_opt_cpu(seed: int = 0) -> RunConfig:
    """FOG-opt blocks: as FOG-max, with GELU."""
    return _run("fog-opt-cpu", "fog_opt", seed)


def fog_flash_cpu(seed: int = 0) -> RunConfig:
    """FOG-flash blocks: tanh instead of norms on queries and keys."""
    return _run("fog-flash-cpu", "fog_flash", seed)


def fog_swiglu_cpu(seed: int = 0) -> RunConfig:
    """FOG blocks with SwiGLU."""
    return _run("fog-swiglu-cpu", "fog_swiglu", seed)


def fog_moe_cpu(seed: int = 0) -> RunConfig:
    """FOG-max blocks with four experts, two per token."""
    return _run("fog-moe-cpu", "fog_moe", seed)


def fog_fp8dpa_cpu(seed: int = 0) -> RunConfig:
    """FOG-max with attention's products in FP8 too."""
    return _run("fog-fp8dpa-cpu", "fog_max", seed, PrecisionConfig(attention="fp8"))


def fp8lm_cpu(seed: int = 0) -> RunConfig:
    """Llama 3 at FP8-LM's level O2: FP8 gradients, 6 bytes a parameter in all."""
    return _run("fp8lm-cpu", "llama3", seed, states=StatesConfig(level="O2"))


def sft_cpu(seed: int = 0) -> RunConfig:
    """Fine-tunes `llama_cpu` on instructions: --set initial=runs/a/step-00000600.pt."""
    return RunConfig(
        name="sft-cpu",
        optimizer=OptimizerConfig(learning_rate=5e-4),
        schedule=ScheduleConfig(warmup_steps=20, decay_share=0.5),
        data=DataConfig(source="instructions", held_out=0.02),
        evaluation=EvaluationConfig(every=50, cloze=128),
        steps=200,
        seed=seed,
    )


ARCHITECTURE_RECIPES: Final[dict[str, Callable[[int], RunConfig]]] = {
    make.__name__: make
    for make in (
        llama_bf16_cpu,
        smooth_swiglu_cpu,
        olmo2_cpu,
        op_cpu,
        fog_opt_cpu,
        fog_flash_cpu,
        fog_swiglu_cpu,
        fog_moe_cpu,
        fog_fp8dpa_cpu,
        fp8lm_cpu,
        sft_cpu,
    )
}
"""By the name that `foreshock train` knows."""
