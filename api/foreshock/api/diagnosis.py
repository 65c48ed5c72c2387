"""Why a run goes bad, and in which layers: ranked causes from statistics and scalars only.

A reader of evidence, not a trained model: every score is a rule with a sentence that a person can
check. It never sees a configuration, a fault's name or a step that it was not given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from foreshock.api.movement import Movements, move_of, movements_of
from foreshock.monitor.record import TensorIdentity

__all__ = ["CAUSES", "Cause", "RunWindow", "diagnose"]

FloatArray = npt.NDArray[np.float64]

CAUSES: Final = ("learning_rate", "scale", "underflow", "outlier", "bad_data", "unknown")
_TOP_LAYERS: Final = 5

_REMEDIES: Final[Mapping[str, tuple[str, str]]] = {
    "learning_rate": (
        "go back to the last good checkpoint and continue with a learning rate 10 to 33 % lower, or"
        " undo the change of the schedule",
        "OPT-175B logbook (metaseq chronicles): rate cut before perplexity moved",
    ),
    "scale": (
        "let the scale follow the amax again: current scaling or a longer amax history for these"
        " layers, or run them in bf16; check that scales were restored with the checkpoint",
        "Transformer Engine #1047, Megatron-LM #442; FP8-LM (2310.18313)",
    ),
    "underflow": (
        "let the scale rise with what is left of the tensor: current scaling for these layers, or"
        " bf16; for gradients E5M2, or a larger loss scale or mu",
        "FP8-LM (2310.18313), eq. 1 to 6: automatic scaling of gradients that underflow",
    ),
    "outlier": (
        "give the layer finer scales (per row or block), or bf16; Smooth-SwiGLU or an architecture"
        " without outlier features if it returns",
        "Fishman et al. 2409.12517 (SwiGLU outliers); FOG 2505.20524",
    ),
    "bad_data": (
        "skip the batches around the jump and restart from just before it; look at the data of"
        " these steps",
        "PaLM (2204.02311): skip 200 to 500 batches, rewind about 100 steps",
    ),
    "unknown": (
        "lower the learning rate, keep a checkpoint from before the rise, and log tensor statistics"
        " of more layers",
        "GLM-130B training log: instabilities without a named cause",
    ),
}


@dataclass(frozen=True, slots=True)
class RunWindow:
    """The latest records of a run, as arrays.

    Attributes:
        steps: (T,) rising.
        scalars: Name to (T,), NaN = not measured or not finite.
        identities: One per tensor row.
        statistics: Name to (T, rows), NaN where not measured.
    """

    steps: npt.NDArray[np.int64]
    scalars: Mapping[str, FloatArray]
    identities: Sequence[TensorIdentity] = ()
    statistics: Mapping[str, FloatArray] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One likely cause.

    Attributes:
        name: One of `CAUSES`.
        probability: Share of the evidence; the causes add up to 1.
        layers: Layers that moved, first and furthest first.
        role: Tensor role that shows it most, if one does.
        statistic: Statistic or scalar that shows it most.
        since_step: When that began to move.
        evidence: One sentence with numbers.
        remedy: What to do.
        source: Where the remedy comes from.
    """

    name: str
    probability: float
    layers: tuple[str, ...]
    role: str | None
    statistic: str | None
    since_step: int | None
    evidence: str
    remedy: str
    source: str


@dataclass(frozen=True, slots=True)
class _Finding:
    """The case for one cause: log-odds against "unknown", and what it rests on."""

    name: str
    score: float
    evidence: str
    moved: tuple[int, ...] = ()
    statistic: str | None = None
    since: int | None = None


def diagnose(window: RunWindow) -> tuple[Cause, ...]:
    """Rank the causes of trouble at the end of a window.

    Args:
        window: The latest records, the last being the moment of the question; a stretch before its
            middle is taken for normal.

    Returns:
        The likeliest cause first; empty when there are too few records to compare.
    """
    if len(window.steps) < 12:
        return ()
    moves = movements_of(window.steps, window.identities, window.statistics or {})
    findings = (
        _learning_rate(window, moves),
        *_scale(moves),
        _outlier(moves, consequence=_rate_rose(window)),
        _bad_data(window, moves),
        _Finding("unknown", 1.0, _what_moved(window, moves), moves.broadest()),
    )
    weights = np.exp(np.array([f.score for f in findings]))
    shares = weights / weights.sum()
    order = sorted(range(len(findings)), key=lambda i: -shares[i])
    return tuple(_cause(findings[i], float(shares[i]), window, moves) for i in order)


def _cause(finding: _Finding, share: float, window: RunWindow, moves: Movements) -> Cause:
    remedy, source = _REMEDIES[finding.name]
    layers = dict.fromkeys(window.identities[row].layer for row in finding.moved)
    role = window.identities[finding.moved[0]].role if finding.moved else None
    since = finding.since
    if since is None and finding.moved:
        since = moves.since(finding.moved[0])
    return Cause(
        name=finding.name,
        probability=round(share, 4),
        layers=tuple(layers)[:_TOP_LAYERS],
        role=role,
        statistic=finding.statistic,
        since_step=since,
        evidence=finding.evidence,
        remedy=remedy,
        source=source,
    )


def _learning_rate(window: RunWindow, moves: Movements) -> _Finding:
    rate = move_of(window.steps, window.scalars.get("learning_rate"), log=True)
    update = move_of(window.steps, window.scalars.get("update_ratio"), log=True)
    score, parts, statistic, since = 0.0, [], None, None
    if rate is not None and rate.change > 0.2:
        score += 2.0 + 3.0 * min(rate.change, 1.0)
        statistic, since = "learning_rate", rate.since
        parts.append(f"the learning rate is {2**rate.change:.3g} times its usual value")
    elif rate is not None:
        score -= 1.0
        parts.append("the learning rate did not rise")
    if update is not None and update.change > 0.5 and update.sigmas > 5:
        score += 2.0
        statistic, since = statistic or "update_ratio", since or update.since
        parts.append(f"updates are {2**update.change:.3g} times as large as usual")
    if moves.breadth() > 0.5:
        score += 1.0
        parts.append(f"{moves.breadth():.0%} of the tensors moved together")
    text = "; ".join(parts) or "neither learning rate nor update size was measured"
    return _Finding("learning_rate", score, text, moves.broadest(), statistic, since)


def _scale(moves: Movements) -> tuple[_Finding, _Finding]:
    """Headroom moved while amax did not, or the scale stands still while amax moves.

    Downwards a tensor saturates, upwards it is flushed to zero: two causes, of which the strongest
    mover decides; the other one keeps the base score.
    """
    headroom, amax, scale = (moves.change(name) for name in ("headroom_log2", "amax", "scale_log2"))
    own = np.abs(headroom) - 1.5 * np.abs(amax)
    drifted = (np.abs(headroom) > 0.3) & (moves.sigmas("headroom_log2") > 6)
    alone = drifted & (own > 0.2)
    stuck = drifted & moves.stuck("scale_log2") & (np.abs(amax) > 0.15)
    hit = np.flatnonzero(alone | stuck)
    if hit.size == 0:
        known = np.isfinite(headroom).any()
        text = "scales follow the amax" if known else "no scales were measured"
        base = -1.0 if known else -3.0
        return _Finding("scale", base, text), _Finding("underflow", base, text)
    ranked = moves.ranked(hit, "headroom_log2")
    top = ranked[0]
    lost = moves.worst_change("overflow_ratio", hit), moves.worst_change("underflow_ratio", hit)
    score = 3.0 + min(3.0, float(np.abs(headroom[hit]).max())) + (1.0 if max(lost) > 0.01 else 0.0)
    how = "stands still" if stuck[top] and not alone[top] else f"moved by {scale[top]:+.2f}"
    text = (
        f"headroom of {moves.name(top)} went from {moves.before('headroom_log2', top):.2f} to"
        f" {moves.after('headroom_log2', top):.2f} (log2) while its amax moved by {amax[top]:+.2f}"
        f" and its scale {how}; {hit.size} of {headroom.size} tensors affected"
    )
    rose = headroom[top] > 0
    found = _Finding("underflow" if rose else "scale", score, text, ranked, "headroom_log2")
    other = "headroom fell" if not rose else "headroom rose"
    rest = _Finding("scale" if rose else "underflow", -1.0, f"no: the {other}")
    return found, rest


def _rate_rose(window: RunWindow) -> bool:
    rate = move_of(window.steps, window.scalars.get("learning_rate"), log=True)
    return rate is not None and rate.change > 0.2


def _outlier(moves: Movements, *, consequence: bool) -> _Finding:
    """One layer's outlier channels grow far ahead of the others'.

    Large updates make outliers too, so they weigh less where the learning rate rose.
    """
    best = _Finding("outlier", -1.0, "no layer's outliers stand out")
    penalty = 2.5 if consequence else 0.5
    for statistic in ("channel_kurtosis", "kurtosis", "top_channel_share"):
        change = moves.peak_change(statistic)
        if not np.isfinite(change).any():
            continue
        by_layer = moves.largest_by_layer(change)
        (layer, row), *others = by_layer
        del layer
        lead = float(change[row]) - (float(change[others[0][1]]) if others else 0.0)
        score = 2.5 * min(float(change[row]), 2.0) * min(max(lead, 0.0), 1.0) - penalty
        if change[row] > 0.5 and moves.sigmas(statistic)[row] > 5 and score > best.score:
            text = (
                f"{statistic} of {moves.name(row)} rose {2 ** float(change[row]):.3g} times over"
                f" its usual value, {2**lead:.3g} times as much as the next layer"
            )
            ranked = (row, *(r for _, r in others[:2] if change[r] > 0.5))
            best = _Finding("outlier", score, text, ranked, statistic)
    return best


def _bad_data(window: RunWindow, moves: Movements) -> _Finding:
    """Loss and gradient jump within two records, and no weight moved before them."""
    loss = move_of(window.steps, window.scalars.get("loss"), log=False)
    if loss is None or loss.jump is None:
        return _Finding("bad_data", -1.0, "the loss did not jump")
    grad = move_of(window.steps, window.scalars.get("grad_norm"), log=True)
    together = grad is not None and grad.jump is not None and abs(grad.jump - loss.jump) <= 4
    earlier = moves.moved_before(loss.jump - 8)
    score = 2.5 + (2.0 if together else 0.0) - 6.0 * earlier
    text = (
        f"the loss jumped by {loss.jump_sigmas:.3g} times its noise at step {loss.jump}"
        + (", the gradient norm with it" if together else "")
        + f"; {earlier:.0%} of the tensors had moved before"
    )
    return _Finding("bad_data", score, text, moves.broadest(), "loss", loss.jump)


def _what_moved(window: RunWindow, moves: Movements) -> str:
    rows = moves.broadest()
    if rows:
        return f"{moves.name(rows[0])} moved first; no pattern of a known cause"
    return f"no tensor moved within the last {len(window.steps)} records"
