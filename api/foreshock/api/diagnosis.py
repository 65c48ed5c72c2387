"""Why a run goes bad, and in which layers: ranked causes from statistics and scalars only.

A reader of evidence: every cause rests on a rule with a sentence that a person can check
(`diagnosis_rules`), and only how much each rule is worth was fitted (`diagnosis_odds`). It never
sees a configuration, a fault's name or a step that it was not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from foreshock.api.diagnosis_odds import CAUSES, shares
from foreshock.api.diagnosis_rules import Finding, RunWindow, findings_of
from foreshock.api.movement import Movements

__all__ = ["CAUSES", "Cause", "RunWindow", "diagnose"]

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
    "optimizer_state": (
        "start again from a checkpoint with the optimizer's moments, scales and place in the data;"
        " where there is none, warm the learning rate up again over 2 / (1 - beta2) steps",
        "Ma & Yarats (1910.04209): untuned warm-up of Adam; torch, saving a general checkpoint",
    ),
    "attention": (
        "normalise queries and keys, or keep the attention products in bf16; until then lower the"
        " learning rate",
        "Dehghani et al. (2302.05442), Wortsman et al. (2309.14322): growing attention logits; FOG"
        " 2505.20524",
    ),
    "unknown": (
        "lower the learning rate, keep a checkpoint from before the rise, and log tensor statistics"
        " of more layers",
        "GLM-130B training log: instabilities without a named cause",
    ),
}


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
    cases, moves = findings_of(window)
    findings = (*cases, Finding("unknown", 0.0, _what_moved(window, moves), moves.broadest()))
    share = shares({finding.name: finding.strength for finding in findings})
    ordered = sorted(findings, key=lambda finding: -share[finding.name])
    return tuple(_cause(finding, share[finding.name], window, moves) for finding in ordered)


def _cause(finding: Finding, share: float, window: RunWindow, moves: Movements) -> Cause:
    remedy, source = _REMEDIES[finding.name]
    layers = dict.fromkeys(window.identities[row].layer for row in finding.rows)
    role = window.identities[finding.rows[0]].role if finding.rows else None
    since = finding.since
    if since is None and finding.rows:
        since = moves.since(finding.rows[0])
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


def _what_moved(window: RunWindow, moves: Movements) -> str:
    rows = moves.broadest()
    if rows:
        return f"{moves.name(rows[0])} moved first; no pattern of a known cause"
    return f"no tensor moved within the last {len(window.steps)} records"
