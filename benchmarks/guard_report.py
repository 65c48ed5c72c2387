"""The guard study's judgement and its tables; `guard_study` runs the subjects."""

from __future__ import annotations

import math
import statistics
from typing import Any, Final

GROUPS: Final = ("runaway rate", "bad batches", "scale fault", "natural rate", "healthy")
STEPS: Final = 400
LOST: Final = 0.25
SAVED: Final = 0.05


def lost(found: dict[str, Any]) -> bool:
    """Whether the run is lost without a guard."""
    twin, off = (found["arms"][arm]["loss"] for arm in ("twin", "off"))
    return off is None or off > twin + LOST


def saved(found: dict[str, Any], arm: str) -> bool:
    """Whether an arm ends as well as the twin."""
    loss, twin = found["arms"][arm]["loss"], found["arms"]["twin"]["loss"]
    return loss is not None and loss <= twin + SAVED


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    z, share = 1.96, hits / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def report(document: dict[str, Any]) -> str:
    """The study in Markdown."""
    subjects = document["subjects"]
    lines = [
        "# Guard study",
        "",
        f"{len(subjects)} subjects of {STEPS} steps, seeds from {_base(document)} * 2^40 on,"
        " none fitted on."
        f" Forecaster {document['version']}, sha256 of its file {document['digest'][:16]}."
        f" `{document['command']}`, {document['processes']} processes, {document['device']}.",
        "",
        "A run is lost if without a guard it ends non-finite or more than"
        f" {LOST} nat over its healthy twin (held-out loss); saved if it ends within {SAVED} nat of"
        " it, or below. The twin of a rate that is too high by nature has a calm rate. In brackets"
        " 95 % intervals (Wilson).",
        "",
        "| group | lost without | saved by the naive rule | saved by the guard"
        " | median gap to the twin: off, naive, guard | median steps wasted: naive, guard |",
        "|---|---|---|---|---|---|",
    ]
    for group in (*GROUPS[:-1], "all"):
        mine = [s for s in subjects if s["group"] != "healthy" and group in (s["group"], "all")]
        bad = [s for s in mine if lost(s)]
        lines.append(_row(group, len(mine), bad))
    lines += ["", *_harm(subjects), "", *_rest(subjects), ""]
    return "\n".join(lines)


def _base(document: dict[str, Any]) -> int:
    # The first published study did not say it.
    seeds: int = document.get("seeds", 3 << 40)
    return seeds >> 40


def _row(group: str, count: int, bad: list[dict[str, Any]]) -> str:
    shares = []
    for arm in ("naive", "guard"):
        hits = sum(saved(s, arm) for s in bad)
        low, high = wilson(hits, len(bad))
        text = f"{hits / len(bad):.0%} [{low:.0%}, {high:.0%}]" if bad else "-"
        shares.append(f"{hits}: {text}")
    gaps = ", ".join(_median_gap(bad, arm) for arm in ("off", "naive", "guard"))
    waste = ", ".join(
        f"{statistics.median(s['arms'][arm]['wasted'] for s in bad):g}" if bad else "-"
        for arm in ("naive", "guard")
    )
    return f"| {group} | {len(bad)} of {count} | {shares[0]} | {shares[1]} | {gaps} | {waste} |"


def _median_gap(bad: list[dict[str, Any]], arm: str) -> str:
    if not bad:
        return "-"
    gaps = [
        math.inf
        if s["arms"][arm]["loss"] is None
        else s["arms"][arm]["loss"] - s["arms"]["twin"]["loss"]
        for s in bad
    ]
    return f"{statistics.median(gaps):.3f}"


def _harm(subjects: list[dict[str, Any]]) -> list[str]:
    healthy = [s for s in subjects if s["group"] == "healthy"]
    if not healthy:
        return ["No healthy run was finished."]
    lines = [
        "| healthy runs | extra steps | touched | mean gap to the twin | worst gap |",
        "|---|---|---|---|---|",
    ]
    for arm in ("naive", "guard"):
        extra = sum(s["arms"][arm]["wasted"] for s in healthy) / (STEPS * len(healthy))
        touched = sum(
            bool(s["arms"][arm]["rollbacks"] or s["arms"][arm]["interventions"]) for s in healthy
        )
        low, high = wilson(touched, len(healthy))
        gaps = [(s["arms"][arm]["loss"] or math.inf) - s["arms"]["twin"]["loss"] for s in healthy]
        lines.append(
            f"| {arm} | {extra:.1%} | {touched} of {len(healthy)} [{low:.0%}, {high:.0%}] |"
            f" {statistics.fmean(gaps):+.4f} | {max(gaps):+.4f} |"
        )
    kinds = sorted({s.get("hard") or "plain" for s in healthy})
    lines += ["", "| healthy by kind | runs | touched | extra steps | worst gap |"]
    lines += ["|---|---|---|---|---|", *(_kind_row(k, healthy) for k in kinds)]
    return lines


def _kind_row(kind: str, healthy: list[dict[str, Any]]) -> str:
    mine = [s for s in healthy if (s.get("hard") or "plain") == kind]
    arms = [s["arms"]["guard"] for s in mine]
    touched = sum(bool(a["rollbacks"] or a["interventions"]) for a in arms)
    gaps = [(s["arms"]["guard"]["loss"] or math.inf) - s["arms"]["twin"]["loss"] for s in mine]
    extra = sum(a["wasted"] for a in arms) / (STEPS * len(mine))
    return f"| {kind} | {len(mine)} | {touched} | {extra:.1%} | {max(gaps):+.4f} |"


def _rest(subjects: list[dict[str, Any]]) -> list[str]:
    mild = [s for s in subjects if s["group"] != "healthy" and not lost(s)]
    worse = [
        s["subject"]
        for s in mild
        if s["arms"]["guard"]["loss"] is None
        or s["arms"]["guard"]["loss"] - SAVED
        > max(s["arms"]["off"]["loss"], s["arms"]["twin"]["loss"])
    ]
    missed = [s["subject"] for s in subjects if lost(s) and not saved(s, "guard")]
    failures = sum(s["arms"]["guard"]["failures"] for s in subjects)
    return [
        f"Of {len(mild)} broken runs that get over it by themselves the guard made {len(worse)}"
        f" worse by more than {SAVED} nat ({worse}). Lost with the guard: {missed}. Failures inside"
        f" the guard: {failures}.",
    ]
