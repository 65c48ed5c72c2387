"""A fitted forecaster on disk: a skops file and a model card beside it.

Nothing is unpickled: skops rebuilds only the types listed here. Fitting is deliberately elsewhere.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from foreshock.api.alerts import AlertSettings
from foreshock.api.features import FEATURES, FeatureSettings
from foreshock.api.forecaster import DivergenceForecaster
from foreshock.api.model_card import CARD_FILE, FIRST_HEADS, HEADS, SHIPPED
from foreshock.api.skops_import import import_skops

__all__ = [
    "HEADS",
    "Artifact",
    "ArtifactError",
    "Head",
    "load",
    "load_shipped",
    "save",
]

skops_io: Final = import_skops()

_TRUSTED: Final = (
    "foreshock.api.forecaster.DivergenceForecaster",
    "foreshock.api.proportional.CoxForecaster",
    "foreshock.api.trees.BoostedForecaster",
    "foreshock.api.trees.ForestForecaster",
)
_MODEL_FILE: Final = "forecaster.skops"
_FORMAT: Final = 1


class ArtifactError(ValueError):
    """The artifact cannot be used by this version; says why."""


@dataclass(frozen=True, slots=True)
class Head:
    """One fitted forecaster with its alarm thresholds.

    Attributes:
        forecaster: Fitted on `features`.
        thresholds: Alarm budget (false alarms per 10,000 healthy steps, as text) to the probability
            at `alarm_horizon` that keeps it; None where the data cannot support the budget.
        reasons: Budget to the reason of a None.
        alarm_horizon: The horizon in steps whose probability is compared; None without one.
        features: Names of the features that it sees, in order.
    """

    forecaster: DivergenceForecaster
    thresholds: Mapping[str, float | None]
    reasons: Mapping[str, str] = field(default_factory=dict)
    alarm_horizon: int | None = None
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """Everything a scorer needs, and what people must know about it.

    Attributes:
        heads: Name in `HEADS` to head; a name may be missing.
        version: Goes into every answer.
        budget: The alarm budget in force, a key of `Head.thresholds`.
        fingerprints: Config fingerprints of every run it was fitted or calibrated on.
        card: The model card: data, figures, limits.
        features: Settings of the features it was fitted on.
        alerts: Hysteresis that the thresholds were chosen with.
    """

    heads: Mapping[str, Head]
    version: str
    budget: str
    fingerprints: frozenset[str]
    card: Mapping[str, Any] = field(default_factory=dict)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    alerts: AlertSettings = field(default_factory=AlertSettings)

    def trained_on(self, fingerprint: str) -> bool:
        """Whether a run with this config fingerprint was used for fitting or calibration."""
        return fingerprint in self.fingerprints


def save(artifact: Artifact, folder: Path) -> None:
    """Write `forecaster.skops` and `model_card.json` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    skops_io.dump({n: h.forecaster for n, h in artifact.heads.items()}, folder / _MODEL_FILE)
    document = {
        "format": _FORMAT,
        "version": artifact.version,
        "budget": artifact.budget,
        "features": {"names": list(FEATURES), "half_lives": list(artifact.features.half_lives)},
        "heads": {
            name: {
                "thresholds": dict(head.thresholds),
                "reasons": dict(head.reasons),
                "alarm_horizon": head.alarm_horizon,
                "features": list(head.features),
            }
            for name, head in artifact.heads.items()
        },
        "card": dict(artifact.card),
        "fingerprints": sorted(artifact.fingerprints),
    }
    text = json.dumps(document, indent=1, allow_nan=False)
    (folder / CARD_FILE).write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> Artifact:
    """Read an artifact.

    Raises:
        ArtifactError: No artifact there, types that are not trusted, or other features than this
            version's.
    """
    try:
        document = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        body = (folder / _MODEL_FILE).read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"no artifact in {folder}: {error.filename} is missing") from None
    except ValueError as error:
        raise ArtifactError(f"{folder / CARD_FILE} is not JSON: {error}") from None
    if document.get("format") != _FORMAT:
        raise ArtifactError(f"artifact format {document.get('format')}; this version reads 1")
    if not set(document["features"]["names"]) <= set(FEATURES):
        raise ArtifactError(
            "the artifact was fitted on other features than this version computes: fit again"
        )
    forecasters = _trusted(body)
    half_lives = tuple(float(h) for h in document["features"]["half_lives"])
    return Artifact(
        heads={
            name: Head(
                forecasters[name],
                h["thresholds"],
                h["reasons"],
                h["alarm_horizon"],
                tuple(h.get("features") or FIRST_HEADS[name]),
            )
            for name, h in document["heads"].items()
        },
        version=document["version"],
        budget=document["budget"],
        fingerprints=frozenset(document["fingerprints"]),
        card=document["card"],
        features=FeatureSettings(half_lives=half_lives),  # type: ignore[arg-type]
    )


def _trusted(body: bytes) -> Mapping[str, DivergenceForecaster]:
    """The model, if nothing in it is of a type that others wrote.

    Raises:
        ArtifactError: Something is, or the file is not skops's.
    """
    try:
        unknown = set(skops_io.get_untrusted_types(data=body)) - set(_TRUSTED)
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ArtifactError(f"{_MODEL_FILE} is damaged: {error}") from None
    if unknown:
        raise ArtifactError(f"the artifact holds types that are not trusted: {sorted(unknown)}")
    found: Mapping[str, DivergenceForecaster] = skops_io.loads(body, trusted=list(_TRUSTED))
    return found


def load_shipped() -> Artifact | None:
    """The artifact that comes with the package; None where there is none."""
    return load(SHIPPED) if (SHIPPED / CARD_FILE).exists() else None
