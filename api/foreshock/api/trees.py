"""Hazards by trees: gradient boosting and a random forest, fitted by scikit-learn, kept as arrays.

A fitted ensemble is a handful of flat arrays: no type of scikit-learn's is stored, an artifact does
not depend on its version, and one row costs a few small array operations whatever its size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

from foreshock.api.forecaster import DivergenceForecaster, calibrate, complement

__all__ = ["BoostedForecaster", "ForestForecaster", "flat_scores"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
BoolArray = npt.NDArray[np.bool_]
Flat = dict[str, npt.NDArray[Any]]
_LEAVES: Final = 8
_RATE: Final = 0.08
_DEPTH: Final = 8
Node = tuple[IntArray, FloatArray, IntArray, IntArray, BoolArray, FloatArray]


class _TreeForecaster(DivergenceForecaster):
    """The folds, calibration and band of `DivergenceForecaster` over ensembles of trees."""

    def _prepare(self, data: FloatArray, weight: FloatArray) -> FloatArray:
        del weight
        # scikit-learn cannot bin a column without a single value.
        return np.where(np.isnan(data).all(axis=0), 0.0, data)

    def _fit_interval(
        self,
        basis: FloatArray,
        at_risk: BoolArray,
        event: BoolArray,
        weight: FloatArray,
        fold: IntArray,
        time: FloatArray,
        observed: FloatArray,
    ) -> dict[str, Any]:
        del time, observed
        score = np.full(len(basis), np.nan)
        members: list[Flat] = []
        native = []
        for part in range(self.folds):
            train = at_risk & (fold != part)
            model = self._estimator()
            share = weight[train] / weight[train].mean()
            model.fit(basis[train], event[train], sample_weight=share)
            native.append(model)
            members.append(self._flatten(model))
            held_out = fold == part
            score[held_out] = self._native_scores(model, basis[held_out])
        slope, shift = calibrate(score[at_risk], event[at_risk], weight[at_risk])
        self._native: list[list[Any]] = [*getattr(self, "_native", []), native]
        return _join(members) | {"calibration": np.array([slope, shift])}

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike, **rows: Any) -> Any:
        """As `DivergenceForecaster.fit`."""
        self._native = []
        return super().fit(X, y, **rows)

    def __getstate__(self) -> dict[str, Any]:
        """Without scikit-learn's own models: the arrays say the same."""
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_native"}

    @abstractmethod
    def _estimator(self) -> Any:
        """An unfitted classifier."""

    @abstractmethod
    def _flatten(self, model: Any) -> Flat:
        """Arrays of one fitted classifier."""

    @abstractmethod
    def _native_scores(self, model: Any, data: FloatArray) -> FloatArray:
        """(rows,) log-odds, by scikit-learn's own fast path."""

    @abstractmethod
    def _link(self, sums: FloatArray, count: FloatArray) -> FloatArray:
        """Log-odds from summed leaves; `count` trees each."""

    def _scores(self, data: FloatArray, part: int | None = None) -> FloatArray:
        if not self._models:
            return np.empty((len(data), 0, self.folds if part is None else 1))
        scores = [self._interval_scores(data, index, part) for index in range(len(self._models))]
        return np.stack(scores, axis=1) + self._prior_shift()

    def _interval_scores(self, data: FloatArray, index: int, part: int | None) -> FloatArray:
        chosen = slice(None) if part is None else slice(part, part + 1)
        model = self._models[index]
        slope, shift = model["calibration"]
        native = getattr(self, "_native", None)
        if native:
            raw = [self._native_scores(member, data) for member in native[index][chosen]]
            return np.asarray(slope * np.stack(raw, axis=1) + shift)
        parts = np.array_split(data, len(data) // 512 + 1)
        flat = np.concatenate([self._flat_scores(model, part) for part in parts])
        return np.asarray(slope * flat[:, chosen] + shift)

    def _flat_scores(self, model: Flat, data: FloatArray) -> FloatArray:
        leaves, _ = flat_scores(model, data)
        return self._link(_by_member(model, leaves) + model["baseline"], model["trees"])

    def explain(
        self, row: FloatArray, *, prior: float | None = None
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """As `DivergenceForecaster.explain`; a feature adds what its splits on the path add."""
        horizons = len(self.horizons)
        middle, low, high = (np.full(horizons, np.nan) for _ in range(3))
        contributions = np.zeros(row.size)
        if not self._models:
            return middle, low, high, contributions
        shift = self._prior_shift(prior)
        ends = [1.0, 1.0, 1.0]
        told = min(1, len(self._models) - 1)
        for index, model in enumerate(self._models):
            leaves, parts = flat_scores(model, row[None], parts=index == told)
            sums = _by_member(model, leaves) + model["baseline"]
            slope, offset = model["calibration"].tolist()
            scores = (slope * self._link(sums, model["trees"])[0] + offset).tolist()
            centre = sum(scores) / len(scores)
            variance = sum((s - centre) ** 2 for s in scores) / len(scores)
            spread = 1.96 * math.sqrt((len(scores) - 1) * variance)
            for place, away in enumerate((0.0, -spread, spread)):
                ends[place] *= complement(centre + shift + away)
            middle[index], low[index], high[index] = (1.0 - end for end in ends)
            if parts is not None:
                contributions = slope * parts * self._unit(model)
        return middle, low, high, contributions

    def _unit(self, model: Flat) -> float:
        """Turns a sum over all trees into log-odds of the mean member."""
        return 1.0 / len(model["trees"])


class BoostedForecaster(_TreeForecaster):
    """Histogram gradient boosting for each interval; parameters of `DivergenceForecaster` beside.

    Args:
        rounds: Trees per interval and fold.
        horizons, gap, strength, folds, min_runs, prior, random_state: As there; `strength` is the
            inverse of the leaves' L2 regularisation.
    """

    def __init__(
        self,
        *,
        rounds: int = 60,
        horizons: Sequence[int] = (10, 100, 1000),
        gap: int = 1,
        strength: float = 0.01,
        folds: int = 5,
        min_runs: int = 10,
        prior: float | None = None,
        random_state: int = 0,
    ) -> None:
        super().__init__(
            horizons=horizons,
            gap=gap,
            strength=strength,
            folds=folds,
            min_runs=min_runs,
            prior=prior,
            random_state=random_state,
        )
        self.rounds = rounds

    def _estimator(self) -> HistGradientBoostingClassifier:
        return HistGradientBoostingClassifier(
            max_iter=self.rounds,
            max_leaf_nodes=_LEAVES,
            learning_rate=_RATE,
            l2_regularization=0.1 / self.strength,
            min_samples_leaf=40,
            max_bins=63,
            max_features=0.5,
            early_stopping=False,
            random_state=self.random_state,
        )

    def _native_scores(self, model: Any, data: FloatArray) -> FloatArray:
        return np.asarray(model.decision_function(data), dtype=np.float64)

    def _flatten(self, model: Any) -> Flat:
        nodes = [_histogram_tree(one[0].nodes) for one in model._predictors]
        return _stack(nodes, float(model._baseline_prediction.ravel()[0]))

    def _link(self, sums: FloatArray, count: FloatArray) -> FloatArray:
        del count
        return sums


class ForestForecaster(_TreeForecaster):
    """A random forest for each interval; parameters of `DivergenceForecaster` beside.

    Args:
        trees: Per interval and fold.
        horizons, gap, strength, folds, min_runs, prior, random_state: As there; `strength` is not
            used.
    """

    def __init__(
        self,
        *,
        trees: int = 60,
        horizons: Sequence[int] = (10, 100, 1000),
        gap: int = 1,
        strength: float = 0.01,
        folds: int = 5,
        min_runs: int = 10,
        prior: float | None = None,
        random_state: int = 0,
    ) -> None:
        super().__init__(
            horizons=horizons,
            gap=gap,
            strength=strength,
            folds=folds,
            min_runs=min_runs,
            prior=prior,
            random_state=random_state,
        )
        self.trees = trees

    def _estimator(self) -> RandomForestClassifier:
        return RandomForestClassifier(
            n_estimators=self.trees,
            max_depth=_DEPTH,
            min_samples_leaf=20,
            max_features="sqrt",
            max_samples=0.5,
            random_state=self.random_state,
        )

    def _native_scores(self, model: Any, data: FloatArray) -> FloatArray:
        single = data.astype(np.float32)
        return _log_odds(np.asarray(model.predict_proba(single)[:, 1], dtype=np.float64))

    def _flatten(self, model: Any) -> Flat:
        return _stack([_plain_tree(one.tree_) for one in model.estimators_], 0.0)

    def _link(self, sums: FloatArray, count: FloatArray) -> FloatArray:
        return _log_odds(sums / count)

    def _unit(self, model: Flat) -> float:
        # Near small probabilities a log-odds moves about as a probability over it; said in units
        # of a share of the mean, which is all that a ranking of drivers needs.
        return 10.0 / float(model["trees"].sum())


def flat_scores(
    model: Flat, data: FloatArray, *, parts: bool = False
) -> tuple[FloatArray, FloatArray | None]:
    """Walk every tree at once.

    Args:
        model: Flat arrays of an ensemble.
        data: (rows, features), NaN = missing.
        parts: Whether to add up what each feature's splits contribute, over all trees.

    Returns:
        Leaves (rows, trees), and contributions (features,) of the first row if asked for.
    """
    at = np.broadcast_to(model["roots"], (len(data), model["roots"].size)).copy()
    rows = np.arange(len(data))[:, None]
    added = np.zeros(data.shape[1]) if parts else None
    value, feature, left = model["value"], model["feature"], model["left"]
    for _ in range(int(model["depth"][0])):
        x = data[rows, feature[at]]
        go_left = np.where(np.isnan(x), model["missing_left"][at], x <= model["threshold"][at])
        # A leaf is its own child.
        after = np.where(go_left, left[at], model["right"][at])
        if added is not None:
            np.add.at(added, feature[at[0]], value[after[0]] - value[at[0]])
        at = after
    return value[at], added


def _by_member(model: Flat, leaves: FloatArray) -> FloatArray:
    """(rows, members) sums of leaves."""
    starts = np.concatenate([[0], np.cumsum(model["trees"])[:-1]]).astype(np.intp)
    return np.asarray(np.add.reduceat(leaves, starts, axis=1))


def _histogram_tree(nodes: Any) -> Node:
    leaf = nodes["is_leaf"].astype(np.bool_)
    own = np.arange(len(nodes))
    left = np.where(leaf, own, nodes["left"]).astype(np.intp)
    right = np.where(leaf, own, nodes["right"]).astype(np.intp)
    value = nodes["value"].astype(np.float64)
    count = nodes["count"].astype(np.float64)
    # Inner values are not shrunk as leaves are; children stand behind their parents.
    for index in range(len(nodes) - 1, -1, -1):
        if not leaf[index]:
            a, b = left[index], right[index]
            value[index] = (count[a] * value[a] + count[b] * value[b]) / (count[a] + count[b])
    return (
        np.where(leaf, 0, nodes["feature_idx"]).astype(np.intp),
        np.where(leaf, np.inf, nodes["num_threshold"]).astype(np.float64),
        left,
        right,
        np.where(leaf, 1, nodes["missing_go_to_left"]).astype(np.bool_),
        value,
    )


def _plain_tree(tree: Any) -> Node:
    leaf = tree.children_left < 0
    own = np.arange(tree.node_count)
    share = tree.value[:, 0, :]
    missing = getattr(tree, "missing_go_to_left", np.zeros(tree.node_count))
    # One class alone in a bootstrap sample leaves one column.
    value = share[:, 1] / share.sum(axis=1) if share.shape[1] > 1 else np.zeros(tree.node_count)
    return (
        np.where(leaf, 0, tree.feature).astype(np.intp),
        np.where(leaf, np.inf, tree.threshold).astype(np.float64),
        np.where(leaf, own, tree.children_left).astype(np.intp),
        np.where(leaf, own, tree.children_right).astype(np.intp),
        np.where(leaf, 1, missing).astype(np.bool_),
        np.asarray(value, dtype=np.float64),
    )


def _depth(left: IntArray, right: IntArray) -> int:
    level = np.zeros(len(left), dtype=np.intp)
    for index in range(len(left)):
        for child in (left[index], right[index]):
            if child != index:
                level[child] = level[index] + 1
    return int(level.max())


def _stack(trees: Sequence[Node], baseline: float) -> Flat:
    sizes = np.array([len(tree[0]) for tree in trees])
    roots = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.intp)
    columns = [np.concatenate([tree[i] for tree in trees]) for i in range(6)]
    shift = np.repeat(roots, sizes)
    return {
        "feature": columns[0],
        "threshold": columns[1],
        "left": columns[2] + shift,
        "right": columns[3] + shift,
        "missing_left": columns[4],
        "value": columns[5],
        "roots": roots,
        "trees": np.array([float(len(trees))]),
        "baseline": np.array([baseline]),
        "depth": np.array([max(_depth(tree[2], tree[3]) for tree in trees)]),
    }


def _join(members: Sequence[Flat]) -> Flat:
    """Several ensembles as one."""
    sizes = np.cumsum([0, *(len(m["feature"]) for m in members)])
    joined = {
        name: np.concatenate([m[name] for m in members])
        for name in ("feature", "threshold", "missing_left", "value", "trees", "baseline")
    }
    for name in ("left", "right", "roots"):
        joined[name] = np.concatenate(
            [m[name] + size for m, size in zip(members, sizes[:-1], strict=True)]
        )
    joined["depth"] = np.max([m["depth"] for m in members], axis=0)
    return joined


def _log_odds(share: FloatArray) -> FloatArray:
    share = np.clip(share, 1e-5, 1 - 1e-5)
    return np.asarray(np.log(share / (1 - share)))
