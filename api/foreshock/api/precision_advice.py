"""What to change about precision when a diagnosis says so: for Transformer Engine and for torchao.

Text that can be used as it stands; whether to use it is a person's decision. Learning rates and bad
data are no matter of precision, and get none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from foreshock.api.diagnosis import Cause

__all__ = ["ABSTAIN_BELOW", "PrecisionAdvice", "abstains", "precision_advice"]

ABSTAIN_BELOW: Final = 0.5
"""A likeliest cause below this probability is not taken for an answer."""

_RECIPES: Final = {
    "scale": (
        "from transformer_engine.common.recipe import DelayedScaling, Format\n\n"
        "recipe = DelayedScaling(\n"
        "    margin=1, amax_history_len=1024, amax_compute_algo='max', fp8_format=Format.HYBRID\n"
        ")\n",
        "a margin of one binary digit and a longer amax history keep scales from saturating when"
        " the amax jumps; FOG (2505.20524) trains with a history of 1024",
    ),
    "underflow": (
        "from transformer_engine.common.recipe import Float8CurrentScaling, Format\n\n"
        "recipe = Float8CurrentScaling(fp8_format=Format.HYBRID)\n",
        "current scaling follows a tensor that shrinks at once, and gradients in E5M2 reach"
        " further down; FP8-LM (2310.18313) on gradients that underflow",
    ),
    "outlier": (
        "from transformer_engine.common.recipe import Float8BlockScaling\n\n"
        "recipe = Float8BlockScaling()\n",
        "with a scale per block an outlier coarsens its own block only; Fishman et al."
        " (2409.12517) on outliers of SwiGLU",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionAdvice:
    """Precision for the layers that a diagnosis names.

    Attributes:
        cause: The cause it is for.
        layers: Qualified names.
        why: What it is expected to do, and its source.
        transformer_engine_recipe: Python that makes a recipe for all layers.
        transformer_engine_debug: YAML for `nvdlfw_inspect.api.initialize(config_file=...)`: these
            layers in high precision, the others as they are.
        torchao_filter: Python with a `module_filter_fn` for `convert_to_float8_training`.
    """

    cause: str
    layers: tuple[str, ...]
    why: str
    transformer_engine_recipe: str
    transformer_engine_debug: str
    torchao_filter: str


def abstains(causes: Sequence[Cause]) -> bool:
    """Whether a diagnosis names no cause: none stands out, or none is known."""
    if not causes:
        return True
    return causes[0].name == "unknown" or causes[0].probability < ABSTAIN_BELOW


def precision_advice(causes: Sequence[Cause]) -> PrecisionAdvice | None:
    """Advice for the likeliest cause; None where it is no matter of precision, or none stands out.

    Args:
        causes: Likeliest first, as `diagnose` gives them.
    """
    if abstains(causes) or causes[0].name not in _RECIPES or not causes[0].layers:
        return None
    cause = causes[0]
    recipe, why = _RECIPES[cause.name]
    return PrecisionAdvice(
        cause=cause.name,
        layers=cause.layers,
        why=f"these layers in bfloat16 until it is understood; for all layers: {why}",
        transformer_engine_recipe=recipe,
        transformer_engine_debug=_debug_config(cause.layers),
        torchao_filter=_filter(cause.layers),
    )


def _debug_config(layers: Sequence[str]) -> str:
    # Names there begin with the model's own; JSON's strings are YAML's.
    pattern = "(^|.*\\.)(" + "|".join(re.escape(layer) for layer in layers) + ")$"
    quoted = pattern.replace("'", "''")
    return (
        "foreshock_high_precision:\n"
        "  enabled: True\n"
        "  layers:\n"
        f"    layer_name_regex_pattern: '{quoted}'\n"
        "  transformer_engine:\n"
        "    DisableFP8Layer:\n"
        "      enabled: True\n"
    )


def _filter(layers: Sequence[str]) -> str:
    names = "".join(f"    {layer!r},\n" for layer in layers)
    return (
        "from torchao.float8 import convert_to_float8_training\n\n"
        f"HIGH_PRECISION = {{\n{names}}}\n\n\n"
        "def module_filter_fn(module, fqn):\n"
        "    return fqn not in HIGH_PRECISION\n\n\n"
        "# convert_to_float8_training(model, module_filter_fn=module_filter_fn)\n"
    )
