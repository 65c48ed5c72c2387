"""Which runs train and which are tested: whole groups apart, and what the training never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from foreshock.api.corpus import CorpusRun

__all__ = ["Split", "grouped_folds", "left_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One division of the runs.

    Attributes:
        title: Of all parts that belong together.
        train, test: Runs; no group stands in both.
    """

    title: str
    train: list[CorpusRun]
    test: list[CorpusRun]


def grouped_folds(runs: Sequence[CorpusRun], folds: int, seed: int = 0) -> list[Split]:
    """Every run is tested once, its group held out.

    Raises:
        ValueError: Fewer groups than folds.
    """
    fold_of = _fold_of(runs, folds, seed)
    return [
        Split(
            title="held-out groups",
            train=[run for run in runs if fold_of[run.group] != part],
            test=[run for run in runs if fold_of[run.group] == part],
        )
        for part in range(folds)
    ]


def left_out(runs: Sequence[CorpusRun], seed: int = 0) -> list[Split]:
    """Leave out each family of failures, architecture and recipe, in two parts by groups.

    Of a family the healthy runs of the tested groups are tested beside, as false alarms need them.
    """
    calm = {"healthy"}
    failing = sorted({run.family for run in runs if run.label.diverges} - calm)
    splits: list[Split] = []
    for family in failing:
        splits += _without(runs, family, lambda run: run.family, seed, beside=calm)
    of: tuple[Callable[[CorpusRun], str], ...] = (
        lambda run: run.architecture,
        lambda run: run.recipe,
    )
    for label in of:
        names = sorted({label(run) for run in runs})
        for name in names if len(names) > 1 else ():
            splits += _without(runs, name, label, seed)
    return splits


def _without(
    runs: Sequence[CorpusRun],
    name: str,
    label: Callable[[CorpusRun], str],
    seed: int,
    beside: frozenset[str] | set[str] = frozenset(),
) -> list[Split]:
    fold_of = _fold_of(runs, 2, seed)
    return [
        Split(
            title=f"without {name}",
            train=[r for r in runs if fold_of[r.group] != part and label(r) != name],
            test=[
                r
                for r in runs
                if fold_of[r.group] == part and (label(r) == name or label(r) in beside)
            ],
        )
        for part in range(2)
    ]


def _fold_of(runs: Sequence[CorpusRun], folds: int, seed: int) -> dict[str, int]:
    groups = sorted({run.group for run in runs})
    if len(groups) < folds:
        raise ValueError(f"{len(groups)} groups of runs cannot be split into {folds} folds")
    order = np.random.default_rng(seed).permutation(len(groups))
    return {group: int(order[i]) % folds for i, group in enumerate(groups)}
