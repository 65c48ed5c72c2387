"""From Transformer Engine's debug statistics to records; pure Python.

Their names are flat, layer, tensor and statistic joined by underscores, and layers have underscores
of their own: a name is read from the right, with the known words. What has a place in a record goes
there (percentages as ratios); everything else becomes a scalar under its own name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from foreshock.monitor.formats import format_named
from foreshock.monitor.record import StepRecord, TensorIdentity, TensorStatistics

__all__ = ["TE_ROLES", "TEStatistic", "parse_te_name", "te_record"]

TE_ROLES: Final = {
    "activation": "input",
    "weight": "weight",
    "gradient": "grad_output",
    "output": "output",
    "wgrad": "grad_weight",
}
"""Transformer Engine's tensors that have a role in a record; its dgrad has none."""

_TENSORS: Final = (*TE_ROLES, "dgrad")
_PLAIN: Final = (
    "min",
    "max",
    "mean",
    "std",
    "l1_norm",
    "l2_norm",
    "cur_amax",
    "dynamic_range",
)
_CAST: Final = ("underflows%", "overflows%", "scale_inv_min", "scale_inv_max", "mse")
# Prefix of a statistic of a recipe: format (None: per tensor, as the tensor's own) and granularity.
_RECIPES: Final[dict[str, tuple[str | None, str]]] = {
    "": (None, "tensor"),
    "fp8_delayed_scaling_": (None, "tensor"),
    "fp8_current_scaling_": (None, "tensor"),
    "mxfp8_": ("mxfp8_e4m3", "block"),
    "fp8_block_scaling_": ("block128_e4m3", "block"),
    "nvfp4_": ("nvfp4", "block"),
}
_KNOWN: Final = {name: ("", name) for name in _PLAIN} | {
    recipe + name: (recipe, name) for recipe in _RECIPES for name in _CAST
}
_AT: Final = re.compile(rf"_({'|'.join(_TENSORS)})_")
_HYBRID: Final = {"grad_output": "e5m2", "grad_weight": "bf16", "output": "bf16"}


@dataclass(frozen=True, slots=True)
class TEStatistic:
    """A name, taken apart.

    Attributes:
        layer: As Transformer Engine calls it.
        tensor: activation, weight, gradient, output, wgrad or dgrad; "" if none was found.
        statistic: Without layer, tensor and recipe.
        recipe: Prefix of the recipe it speaks of; "" is the one in use.
        known: Whether the statistic is in the vocabulary.
    """

    layer: str
    tensor: str
    statistic: str
    recipe: str = ""
    known: bool = False


def parse_te_name(name: str) -> TEStatistic:
    """Take a name apart, from the right."""
    places = [match for at in range(len(name)) if (match := _AT.match(name, at))]
    for place in reversed(places):
        known = _KNOWN.get(name[place.end() :])
        if known is not None:
            return TEStatistic(name[: place.start()], place[1], known[1], known[0], True)
    if places:
        last = places[-1]
        return TEStatistic(name[: last.start()], last[1], name[last.end() :])
    return TEStatistic("", "", name)


@dataclass(slots=True)
class _Tensor:
    """What is known of one tensor under one recipe."""

    found: dict[str, float] = field(default_factory=dict)


def te_record(
    values: Iterable[tuple[str, float]],
    *,
    step: int,
    time: datetime,
    formats: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
) -> StepRecord:
    """One step's statistics as a record.

    Args:
        values: Name and value of each, in any order.
        step: 0-based optimizer step.
        time: When it ended.
        formats: Format by role; left out, e4m3, and e5m2 for output gradients (HYBRID).
        names: Names of layers in the record by Transformer Engine's; left out, the same.
    """
    tensors: dict[TensorIdentity, _Tensor] = {}
    scalars: dict[str, float] = {}
    for name, value in values:
        parsed = parse_te_name(name)
        identity = _identity(parsed, formats or {}, names or {})
        if identity is None or not _has_place(parsed.statistic):
            scalars[f"te/{name}"] = value
        else:
            tensors.setdefault(identity, _Tensor()).found[parsed.statistic] = value
    rows = tuple(_statistics(identity, tensor.found) for identity, tensor in tensors.items())
    return StepRecord(step, time, scalars, rows)


_PLACES: Final = ("cur_amax", "dynamic_range", "underflows%", "overflows%")


def _has_place(statistic: str) -> bool:
    return statistic in _PLACES or statistic.startswith("scale_inv_")


def _identity(
    parsed: TEStatistic, formats: Mapping[str, str], names: Mapping[str, str]
) -> TensorIdentity | None:
    role = TE_ROLES.get(parsed.tensor)
    if role is None or not parsed.known:
        return None
    format, granularity = _RECIPES[parsed.recipe]
    own = formats.get(role, _HYBRID.get(role, "e4m3"))
    return TensorIdentity(
        names.get(parsed.layer, parsed.layer),
        role,
        format or own,
        granularity=granularity,
        what_if=parsed.recipe != "",
    )


def _statistics(identity: TensorIdentity, found: Mapping[str, float]) -> TensorStatistics:
    columns: dict[str, Any] = {}
    for ours, theirs in (("underflow_ratio", "underflows%"), ("overflow_ratio", "overflows%")):
        if theirs in found:
            columns[ours] = found[theirs] / 100
    amax = found.get("cur_amax")
    if amax is not None:
        columns["amax"] = amax
    # The largest inverse scale is the smallest scale.
    smallest, largest = (_minus_log2(found.get(f"scale_inv_{end}")) for end in ("max", "min"))
    columns["scale_log2"] = largest if smallest is None else smallest
    columns["scale_log2_max"] = smallest if largest is None else largest
    if amax is not None and amax > 0:
        if "dynamic_range" in found:
            columns["min_nonzero"] = amax / 2 ** found["dynamic_range"]
        if smallest is not None and identity.granularity == "tensor":
            bound = math.log2(format_named(identity.format).largest)
            columns["headroom_log2"] = bound - math.log2(amax) - smallest
    # How many elements there were is not told.
    return TensorStatistics(identity=identity, numel=0, **columns)


def _minus_log2(value: float | None) -> float | None:
    if value is None or math.isnan(value) or value <= 0:
        return None
    return -math.log2(value)
