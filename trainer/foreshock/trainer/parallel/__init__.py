"""Tensor parallel: a model's blocks cut over processes, and what they tell each other.

Column-parallel products (queries, keys, values; the feed-forward's way up) hold rows of a weight,
row-parallel ones (the way out, the way down) hold columns; in between every process computes its
heads and its hidden features. Knows no data parallelism and no training loop.
"""

from foreshock.trainer.parallel.cut import Cut, joined_states, own_states
from foreshock.trainer.parallel.tensor import TensorParallel, cut_model
from foreshock.trainer.parallel.wire import Cast, Wire

__all__ = [
    "Cast",
    "Cut",
    "TensorParallel",
    "Wire",
    "cut_model",
    "joined_states",
    "own_states",
]
