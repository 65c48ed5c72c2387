"""The case for each cause: one rule per named failure mode, with what a person can check.

Every rule gives a strength (about log-odds, before `diagnosis_odds` makes probabilities of them)
and a sentence with numbers. It sees statistics, scalars and events; no configuration, no name of a
fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from foreshock.api.movement import Movements, ScalarMove, move_of, movements_of
from foreshock.monitor.record import TensorIdentity

__all__ = ["Finding", "RunWindow", "findings_of"]

FloatArray = npt.NDArray[np.float64]

_MANY: Final = 2.0
"""Rise (log2) from which on outliers need not lead those of other layers."""
_RESTARTS: Final = ("restart", "rollback")


@dataclass(frozen=True, slots=True)
class RunWindow:
    """The latest records of a run, as arrays.

    Attributes:
        steps: (T,) rising.
        scalars: Name to (T,), NaN = not measured or not finite.
        identities: One per tensor row.
        statistics: Name to (T, rows), NaN where not measured.
        events: What is on record, (step, kind).
    """

    steps: npt.NDArray[np.int64]
    scalars: Mapping[str, FloatArray]
    identities: Sequence[TensorIdentity] = ()
    statistics: Mapping[str, FloatArray] | None = None
    events: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """The case for one cause.

    Attributes:
        name: Of the cause.
        strength: About log-odds against "unknown"; below 0 speaks against it.
        evidence: What it rests on.
        rows: Tensor rows that show it, first and furthest first.
        statistic: Statistic or scalar that shows it most.
        since: When that began to move; None leaves it to the first row.
    """

    name: str
    strength: float
    evidence: str
    rows: tuple[int, ...] = ()
    statistic: str | None = None
    since: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """A window, and how each thing in it moved."""

    window: RunWindow
    moves: Movements
    loss: ScalarMove | None
    gradient: ScalarMove | None
    rate: ScalarMove | None
    update: ScalarMove | None
    logit: ScalarMove | None

    @property
    def rate_rose(self) -> bool:
        return self.rate is not None and self.rate.change > 0.2

    @property
    def restart(self) -> int | None:
        """The last step at which the run began anew: said by an event, or by a gap."""
        told = [step for step, kind in self.window.events if kind in _RESTARTS]
        gaps = np.diff(self.window.steps)
        jumps = np.flatnonzero(gaps > 3 * np.median(gaps))
        told += [int(self.window.steps[i + 1]) for i in jumps]
        return max(told, default=None)


def findings_of(window: RunWindow) -> tuple[tuple[Finding, ...], Movements]:
    """The case for every cause but "unknown", and the movements that the cases speak of."""
    moves = movements_of(window.steps, window.identities, window.statistics or {})

    def move(name: str, *, log: bool = True) -> ScalarMove | None:
        return move_of(window.steps, window.scalars.get(name), log=log)

    seen = _Seen(
        window=window,
        moves=moves,
        loss=move("loss", log=False),
        gradient=move("grad_norm"),
        rate=move("learning_rate"),
        update=move("update_ratio"),
        logit=move("max_attention_logit"),
    )
    return tuple(finding for rule in _RULES for finding in rule(seen)), moves


def _learning_rate(seen: _Seen) -> tuple[Finding, ...]:
    rate, update, moves = seen.rate, seen.update, seen.moves
    strength, parts, statistic, since = 0.0, [], None, None
    if rate is not None and rate.change > 0.2:
        strength += 2.0 + 3.0 * min(rate.change, 1.0)
        statistic, since = "learning_rate", rate.since
        parts.append(f"the learning rate is {2**rate.change:.3g} times its usual value")
    elif rate is not None:
        strength -= 1.0
        parts.append("the learning rate did not rise")
    if update is not None and update.change > 0.5 and update.sigmas > 5:
        strength += 2.0
        statistic, since = statistic or "update_ratio", since or update.since
        parts.append(f"updates are {2**update.change:.3g} times as large as usual")
    if moves.breadth() > 0.5:
        strength += 1.0
        parts.append(f"{moves.breadth():.0%} of the tensors moved together")
    text = "; ".join(parts) or "neither learning rate nor update size was measured"
    return (Finding("learning_rate", strength, text, moves.broadest(), statistic, since),)


def _scale(seen: _Seen) -> tuple[Finding, ...]:
    """Headroom moved while amax did not, or the scale stands still while amax moves.

    Downwards a tensor saturates, upwards it is flushed to zero: two causes, of which the strongest
    mover decides; the other one keeps the base strength.
    """
    moves = seen.moves
    headroom, amax, scale = (moves.change(name) for name in ("headroom_log2", "amax", "scale_log2"))
    # A scale that has come down for a peak of the amax follows it, however brief the peak was.
    peak = np.where(headroom > 0, np.fmax(moves.peak_change("amax"), 0.0), 0.0)
    own = np.abs(headroom) - 1.5 * np.fmax(np.abs(amax), peak)
    drifted = (np.abs(headroom) > 0.3) & (moves.sigmas("headroom_log2") > 6)
    alone = drifted & (own > 0.2)
    stuck = drifted & moves.stuck("scale_log2") & (np.abs(amax) > 0.15)
    hit = np.flatnonzero(alone | stuck)
    if hit.size == 0:
        known = np.isfinite(headroom).any()
        text = "scales follow the amax" if known else "no scales were measured"
        base = -1.0 if known else -3.0
        return Finding("scale", base, text), Finding("underflow", base, text)
    ranked = moves.ranked(hit, "headroom_log2")
    top = ranked[0]
    lost = moves.worst_change("overflow_ratio", hit), moves.worst_change("underflow_ratio", hit)
    size = float(np.abs(headroom[hit]).max())
    strength = 3.0 + min(3.0, size) + (1.0 if max(lost) > 0.01 else 0.0)
    how = "stands still" if stuck[top] and not alone[top] else f"moved by {scale[top]:+.2f}"
    text = (
        f"headroom of {moves.name(top)} went from {moves.before('headroom_log2', top):.2f} to"
        f" {moves.after('headroom_log2', top):.2f} (log2) while its amax moved by {amax[top]:+.2f}"
        f" and its scale {how}; {hit.size} of {headroom.size} tensors affected"
    )
    rose = headroom[top] > 0
    since = moves.since(top, "headroom_log2")
    name, against = ("underflow", "scale") if rose else ("scale", "underflow")
    other = "rose" if rose else "fell"
    return (
        Finding(name, strength, text, ranked, "headroom_log2", since),
        Finding(against, -1.0, f"no: the headroom {other}"),
    )


def _outlier(seen: _Seen) -> tuple[Finding, ...]:
    """One layer's outlier channels grow far ahead of the others'.

    Outlier features are of activations and weights; a gradient is spiky after any trouble. Large
    updates make outliers too, so they weigh less where the learning rate rose.
    """
    moves = seen.moves
    best = Finding("outlier", -1.0, "no layer's outliers stand out")
    penalty = 2.5 if seen.rate_rose else 0.5
    update = seen.update
    calm = not seen.rate_rose and (update is None or (update.jump is None and update.change < 0.5))
    features = np.array([i.role != "grad_output" for i in moves.identities], dtype=np.bool_)
    for statistic in ("channel_kurtosis", "kurtosis", "top_channel_share"):
        change = np.where(features, moves.peak_change(statistic), np.nan)
        if not np.isfinite(change).any():
            continue
        (_, row), *others = moves.largest_by_layer(change)
        lead = float(change[row]) - (float(change[others[0][1]]) if others else 0.0)
        # Outliers of many layers at once stand out beside none, but are far from usual.
        ahead = max(lead, 0.7 if calm and change[row] > _MANY else 0.0)
        strength = 2.5 * min(float(change[row]), 2.0) * min(ahead, 1.0) - penalty
        if change[row] > 0.5 and moves.sigmas(statistic)[row] > 5 and strength > best.strength:
            text = (
                f"{statistic} of {moves.name(row)} rose {2 ** float(change[row]):.3g} times over"
                f" its usual value, {2**lead:.3g} times as much as the next layer"
            )
            ranked = (row, *(r for _, r in others[:2] if change[r] > 0.5))
            best = Finding("outlier", strength, text, ranked, statistic)
    return (best,)


def _bad_data(seen: _Seen) -> tuple[Finding, ...]:
    """Loss and gradient jump within two records, and neither updates nor tensors moved before."""
    loss, gradient, moves = seen.loss, seen.gradient, seen.moves
    if loss is None or loss.jump is None:
        return (Finding("bad_data", -1.0, "the loss did not jump"),)
    jump = gradient.jump if gradient is not None else None
    together = jump is not None and abs(jump - loss.jump) <= 4
    earlier = moves.moved_before(loss.jump - 8)
    strength = 2.5 + (2.0 if together else 0.0) - 6.0 * earlier
    text = (
        f"the loss jumped by {loss.jump_sigmas:.3g} times its noise at step {loss.jump}"
        + (", the gradient norm with it" if together else "")
        + f"; {earlier:.0%} of the tensors had moved before"
    )
    update = seen.update.jump if seen.update is not None else None
    if update is not None and update < loss.jump:
        # What the data do to the weights comes after the loss has seen them.
        strength -= 4.0
        text += f"; but the updates had jumped at step {update}"
    return (Finding("bad_data", strength, text, moves.broadest(), "loss", loss.jump),)


def _optimizer_state(seen: _Seen) -> tuple[Finding, ...]:
    """Updates jump at once though neither the rate nor the loss had: the moments are gone.

    Adam without a history moves every weight by the whole learning rate (Kingma & Ba 2015, section
    2.1), so the updates of the first step are already large, and the loss jumps a step later. Bad
    data move the loss first; a jump of the rate is on record.
    """
    update, rate, loss = seen.update, seen.rate, seen.loss
    restart = seen.restart
    if update is None or update.jump is None:
        text = "the size of the updates did not jump" if update else "no size of updates is known"
        if restart is None:
            return (Finding("optimizer_state", -2.0, text),)
        told = f"the run began anew at step {restart}, but {text}"
        return (Finding("optimizer_state", -1.0, told, (), "update_ratio", restart),)
    at = update.jump
    strength = 2.0
    size = 2**update.jump_height
    text = f"updates were {size:.3g} times as large from one step to the next at step {at}"
    if rate is not None and rate.jump is not None and abs(rate.jump - at) <= 2:
        strength -= 4.0
        text += ", but so was the learning rate"
    if loss is not None and loss.jump is not None and loss.jump <= at:
        strength -= 3.0
        text += f", but the loss had jumped at step {loss.jump}"
    if restart is not None and abs(restart - at) <= 4:
        strength += 3.0
        text += f"; the run began anew at step {restart}"
    return (Finding("optimizer_state", strength, text, seen.moves.broadest(), "update_ratio", at),)


def _attention(seen: _Seen) -> tuple[Finding, ...]:
    """Queries and keys grow ahead of everything else, or the largest logit does."""
    moves, logit = seen.moves, seen.logit
    cores = np.array([i.role in ("query", "key") for i in moves.identities], dtype=np.bool_)
    change = moves.change("amax")
    best = Finding("attention", -2.0, "neither attention logits nor queries and keys stand out")
    if logit is not None and logit.change > 0.5 and logit.sigmas > 5:
        text = f"the largest attention logit is {2**logit.change:.3g} times its usual value"
        best = Finding(
            "attention", 1.0 + min(logit.change, 3.0), text, (), "max_attention_logit", logit.since
        )
    if not cores.any() or not np.isfinite(change[cores]).any():
        return (best,)
    row = int(np.nanargmax(np.where(cores, change, np.nan)))
    rest = change[~cores]
    lead = float(change[row]) - (float(np.nanmedian(rest)) if np.isfinite(rest).any() else 0.0)
    strength = 2.0 * min(lead, 2.0) - 1.0 - (1.5 if seen.rate_rose else 0.0)
    if change[row] > 0.5 and moves.sigmas("amax")[row] > 5 and strength > best.strength:
        text = (
            f"amax of {moves.name(row)} is {2 ** float(change[row]):.3g} times its usual value,"
            f" {2**lead:.3g} times as much as that of the other tensors"
        )
        best = Finding("attention", strength, text, (row,), "amax")
    return (best,)


_RULES: Final[tuple[Callable[[_Seen], tuple[Finding, ...]], ...]] = (
    _learning_rate,
    _scale,
    _outlier,
    _bad_data,
    _optimizer_state,
    _attention,
)
