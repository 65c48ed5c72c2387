"""Signals: right layer, right fold, same for one record and for a stack, blind to size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.api.signals import SIGNALS, TENSOR_SIGNALS, summarise, worst_layers
from foreshock.monitor.record import TensorIdentity

ROLES = ("input", "weight", "grad_output")


def identities(layers: int = 3) -> tuple[TensorIdentity, ...]:
    return tuple(
        TensorIdentity(f"blocks.{i}.mlp.down", role, "e4m3")
        for i in range(layers)
        for role in ROLES
    )


def signal(vector: np.ndarray, name: str) -> np.ndarray:
    return vector[..., SIGNALS.index(name)]


def test_extremes_name_their_layer() -> None:
    tensors = identities()
    kurtosis = np.ma.MaskedArray([3.0, 3, 3, 48, 3, 3, 12, 3, 3])
    vector = summarise(tensors, {"kurtosis": kurtosis}, {"loss": 2.0})
    assert signal(vector, "input.kurtosis.max") == pytest.approx(math.log2(48))
    assert signal(vector, "input.kurtosis.median") == pytest.approx(math.log2(12))
    assert (
        worst_layers(tensors, {"kurtosis": kurtosis})["input.kurtosis.max"] == "blocks.1.mlp.down"
    )
    assert np.isnan(signal(vector, "input.headroom_log2.min"))


def test_stack_equals_single_records() -> None:
    rng = np.random.default_rng(0)
    tensors = identities()
    names = ("kurtosis", "amax", "headroom_log2", "nonfinite_count", "sqnr_db")
    stacked = {n: np.ma.masked_less(rng.normal(3, 2, (4, len(tensors))), 0.5) for n in names}
    scalars = {"loss": rng.normal(2, 1, 4), "grad_norm": np.array([1.0, np.nan, 2.0, np.inf])}
    both = summarise(tensors, stacked, scalars)
    assert both.shape == (4, len(SIGNALS))
    for e in range(4):
        single = summarise(
            tensors,
            {n: v[e] for n, v in stacked.items()},
            {n: float(v[e]) for n, v in scalars.items()},
        )
        assert np.isnan(single).sum() > 0
        np.testing.assert_array_equal(both[e], single)


def test_nonfinite_is_a_measurement_and_missing_is_not() -> None:
    vector = summarise(None, None, {"loss": math.nan, "grad_norm": math.inf})
    assert signal(vector, "loss_nonfinite") == 1
    assert signal(vector, "grad_norm_nonfinite") == 1
    assert np.isnan(signal(vector, "loss"))
    empty = summarise(None, None, {})
    assert np.isnan(empty).all()
    assert np.isnan(vector[-len(TENSOR_SIGNALS) :]).all()


def test_what_if_rows_do_not_count() -> None:
    real = TensorIdentity("a", "input", "bf16")
    imagined = TensorIdentity("a", "input", "e4m3", what_if=True)
    vector = summarise((real, imagined), {"amax": np.array([2.0, 64.0])}, {})
    assert signal(vector, "input.amax.max") == 1


def test_an_exact_cast_stays_finite() -> None:
    tensors = identities(1)
    vector = summarise(tensors, {"sqnr_db": np.array([np.inf, 30.0, np.inf])}, {})
    assert not np.isinf(vector).any()
    assert signal(vector, "weight.sqnr_db.min") == 30


@given(repeats=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_a_deeper_model_of_equal_layers_looks_the_same(repeats: int, seed: int) -> None:
    values = np.random.default_rng(seed).lognormal(size=3)
    one = summarise(identities(1), {"rms": values}, {"loss": 1.0})
    many = summarise(identities(repeats), {"rms": np.tile(values, repeats)}, {"loss": 1.0})
    np.testing.assert_allclose(one, many)


def test_nothing_that_identifies_a_run_is_a_signal() -> None:
    for banned in ("step", "learning_rate", "tokens", "numel", "fault"):
        assert not any(banned in name for name in SIGNALS)
