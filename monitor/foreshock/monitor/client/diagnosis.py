"""What the service says of why a run is at risk: causes, evidence, advice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foreshock.monitor.record import decode_number

__all__ = ["Cause", "Diagnosis", "PrecisionAdvice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One likely cause, with its evidence and what to do."""

    name: str
    probability: float | None
    layers: tuple[str, ...]
    role: str | None
    statistic: str | None
    since_step: int | None
    evidence: str
    remedy: str
    source: str

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Cause:
        """From JSON."""
        plain = ("name", "role", "statistic", "since_step", "evidence", "remedy", "source")
        return cls(
            **{name: body.get(name) for name in plain},  # type: ignore[arg-type]
            probability=decode_number(body.get("probability"), "probability"),
            layers=tuple(body.get("layers") or ()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionAdvice:
    """Precision for the layers of the likeliest cause: texts to use as they stand."""

    cause: str
    layers: tuple[str, ...]
    why: str
    transformer_engine_recipe: str
    transformer_engine_debug: str
    torchao_filter: str

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> PrecisionAdvice:
        """From JSON."""
        texts = ("transformer_engine_recipe", "transformer_engine_debug", "torchao_filter")
        return cls(
            cause=body["cause"],
            layers=tuple(body["layers"]),
            why=body["why"],
            **{name: body[name] for name in texts},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Causes as of a step, most likely first; no step before the first record.

    `abstains`: no cause stands out. `precision` is None where the cause is none of precision.
    """

    step: int | None
    causes: tuple[Cause, ...]
    abstains: bool = True
    precision: PrecisionAdvice | None = None

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Diagnosis:
        """From JSON; a service of before says neither of the last two."""
        advice = body.get("precision")
        return cls(
            step=body["step"],
            causes=tuple(Cause.read(cause) for cause in body["causes"]),
            abstains=bool(body.get("abstains", True)),
            precision=None if advice is None else PrecisionAdvice.read(advice),
        )
