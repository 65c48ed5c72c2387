"""Whether probabilities mean what they say: ranking, Brier skill, calibration, pooled and per run.

Rows whose run ended inside the window without an onset are left out, not counted as negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score

from foreshock.api.corpus import CorpusRun

__all__ = ["RiskQuality", "risk_quality"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskQuality:
    """Quality of one head's probability at one horizon, on held-out runs.

    Attributes:
        rows: Scored.
        base_rate: Share of rows with an onset within the horizon.
        average_precision: Area under precision and recall; chance is the base rate.
        auroc: Pooled over runs.
        auroc_within: Mean over runs that have rows of both kinds.
        brier_skill: 1 - Brier / Brier of the base rate.
        brier_skill_time: 1 - Brier / Brier of the time-only hazard, where there is one.
        calibration: Ten equal bins: (mean forecast, share observed).
        calibration_error: Mean absolute difference of the bins.
    """

    rows: int
    base_rate: float
    average_precision: float | None
    auroc: float | None
    auroc_within: float | None
    brier_skill: float | None
    brier_skill_time: float | None
    calibration: list[tuple[float, float]]
    calibration_error: float | None


def risk_quality(
    answers: Sequence[tuple[CorpusRun, FloatArray, FloatArray | None]], horizon: int, gap: int
) -> RiskQuality:
    """Score probabilities against what came.

    Args:
        answers: Per run: probabilities (T,) and those of the time-only hazard (T,) or None.
        horizon: Steps; the window is (t + gap, t + gap + horizon].
        gap: Steps.
    """
    forecast, truth, clock, within = [], [], [], []
    for run, risk, by_time in answers:
        time, observed = run.times()
        event = (time > gap) & (time <= gap + horizon)
        known = event | ((time > gap + horizon) & (observed >= gap + horizon))
        rows = run.judged & known & np.isfinite(risk)
        forecast.append(risk[rows])
        truth.append(event[rows])
        clock.append(by_time[rows] if by_time is not None else np.full(rows.sum(), np.nan))
        if event[rows].any() and not event[rows].all():
            within.append(float(roc_auc_score(event[rows], risk[rows])))
    p, y, c = np.concatenate(forecast), np.concatenate(truth), np.concatenate(clock)
    base = float(y.mean()) if y.size else 0.0
    mixed = 0 < base < 1
    bins = _reliability(p, y)
    brier = float(np.mean((p - y) ** 2)) if y.size else 0.0
    return RiskQuality(
        rows=int(y.size),
        base_rate=base,
        average_precision=float(average_precision_score(y, p)) if mixed else None,
        auroc=float(roc_auc_score(y, p)) if mixed else None,
        auroc_within=float(np.mean(within)) if within else None,
        brier_skill=1 - brier / (base * (1 - base)) if mixed else None,
        brier_skill_time=_against(brier, c, y) if mixed else None,
        calibration=bins,
        calibration_error=float(np.mean([abs(a - b) for a, b in bins])) if bins else None,
    )


def _against(brier: float, clock: FloatArray, truth: npt.NDArray[np.bool_]) -> float | None:
    if not np.isfinite(clock).all():
        return None
    other = float(np.mean((clock - truth) ** 2))
    return 1 - brier / other if other > 0 else None


def _reliability(p: FloatArray, y: npt.NDArray[np.bool_]) -> list[tuple[float, float]]:
    order = np.argsort(p, kind="stable")
    parts = [part for part in np.array_split(order, 10) if part.size]
    return [(float(p[part].mean()), float(y[part].mean())) for part in parts]
