"""Boosted trees as plain arrays: fast for one row, safe to store, and they say why.

Grown by scikit-learn's HistGradientBoostingClassifier, whose own prediction costs a millisecond a
row; here thousands of trees are walked together. It grows nothing by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier

__all__ = ["Forest"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

_CHUNK: Final = 1024


@dataclass(frozen=True, slots=True)
class Forest:
    """Several boosted models on the same features, tree by tree.

    Attributes:
        roots: (models, trees) index of each root among the nodes.
        feature: (nodes,) column that is compared.
        threshold: (nodes,) at most this goes left.
        left, right: (nodes,) next node; a leaf points to itself.
        mean: (nodes,) mean log-odds that the training rows below a node get from its tree.
        start: (models,) log-odds before the first tree.
        depth: Longest way from a root to a leaf.
    """

    roots: IntArray
    feature: IntArray
    threshold: FloatArray
    left: IntArray
    right: IntArray
    mean: FloatArray
    start: FloatArray
    depth: int

    @classmethod
    def of(cls, models: Sequence[HistGradientBoostingClassifier]) -> Forest:
        """Take the trees out of fitted two-class models of equally many iterations."""
        tables, roots, total = [], [], 0
        for model in models:
            # scikit-learn has no public view of these trees; tests compare with its predictions.
            trees = [stage[0].nodes for stage in model._predictors]
            for nodes in trees:
                roots.append(total)
                tables.append(_table(nodes, total))
                total += len(nodes)
        columns = [np.concatenate([table[i] for table in tables]) for i in range(5)]
        depths = [int(stage[0].nodes["depth"].max()) for m in models for stage in m._predictors]
        return cls(
            roots=np.array(roots, dtype=np.int32).reshape(len(models), -1),
            feature=columns[0].astype(np.int32),
            threshold=columns[1],
            left=columns[2].astype(np.int32),
            right=columns[3].astype(np.int32),
            mean=columns[4],
            start=np.array([float(np.ravel(m._baseline_prediction)[0]) for m in models]),
            depth=max(depths),
        )

    def scores(self, data: FloatArray) -> FloatArray:
        """Log-odds of every model: (rows, models).

        Args:
            data: (rows, features), finite.
        """
        parts = [self._chunk(data[i : i + _CHUNK]) for i in range(0, len(data), _CHUNK)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.start)))

    def _chunk(self, data: FloatArray) -> FloatArray:
        rows = np.arange(len(data))[:, None]
        node = np.broadcast_to(self.roots.ravel(), (len(data), self.roots.size))
        for _ in range(self.depth):
            goes_left = data[rows, self.feature[node]] <= self.threshold[node]
            node = np.where(goes_left, self.left[node], self.right[node])
        leaves = self.mean[node].reshape(len(data), *self.roots.shape)
        return np.asarray(self.start + leaves.sum(axis=-1))

    def explain(self, row: FloatArray) -> tuple[FloatArray, FloatArray]:
        """One row: log-odds of every model (models,), and each feature's part (features,).

        A feature's part is what its comparisons on the way from the roots to the leaves add to the
        mean log-odds, averaged over the models (Saabas 2014).
        """
        node = self.roots.ravel()
        parts = np.zeros(row.size)
        for _ in range(self.depth):
            feature = self.feature[node]
            goes_left = row[feature] <= self.threshold[node]
            following = np.where(goes_left, self.left[node], self.right[node])
            gained = self.mean[following] - self.mean[node]
            parts += np.bincount(feature, weights=gained, minlength=row.size)
            node = following
        leaves = self.mean[node].reshape(self.roots.shape)
        return self.start + leaves.sum(axis=-1), parts / len(self.start)

    def arrays(self) -> dict[str, Any]:
        """For storage; `Forest(**arrays)` is the way back."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def _table(nodes: Any, offset: int) -> tuple[FloatArray, ...]:
    """Feature, threshold, left, right and mean of one tree whose nodes begin at `offset`."""
    leaf = nodes["is_leaf"].astype(bool)
    own = np.arange(len(nodes)) + offset
    left = np.where(leaf, own, nodes["left"].astype(np.int64) + offset)
    right = np.where(leaf, own, nodes["right"].astype(np.int64) + offset)
    feature = np.where(leaf, 0, nodes["feature_idx"])
    threshold = np.where(leaf, 0.0, nodes["num_threshold"])
    mean = nodes["value"].astype(np.float64).copy()
    count = nodes["count"].astype(np.float64)
    # Children stand behind their parent, so backwards every child is ready before it.
    for index in np.flatnonzero(~leaf)[::-1]:
        a, b = int(nodes["left"][index]), int(nodes["right"][index])
        mean[index] = (count[a] * mean[a] + count[b] * mean[b]) / (count[a] + count[b])
    return feature, threshold, left, right, mean
