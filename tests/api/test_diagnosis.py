"""Diagnosis: the right cause and layer for made-up trouble of each kind."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from foreshock.api import diagnosis, diagnosis_rules, movement
from foreshock.api.diagnosis import CAUSES, Cause, RunWindow, diagnose
from foreshock.monitor.record import TensorIdentity

FloatArray = npt.NDArray[np.float64]

LAYERS = tuple(f"blocks.{i}.mlp.{part}" for i in range(3) for part in ("up", "down"))
ROLES = ("input", "weight", "grad_output")
COUNT = 240
START = 160


class Made:
    """A window of a healthy run that a test then spoils."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.rng = rng
        self.steps = np.arange(COUNT, dtype=np.int64)
        self.ramp = np.clip(self.steps - START, 0, None) / 40
        self.scalars: dict[str, FloatArray] = {
            "loss": 2.2 + 0.05 * rng.standard_normal(COUNT),
            "grad_norm": np.exp(0.1 * rng.standard_normal(COUNT)),
            "learning_rate": np.full(COUNT, 1e-3),
            "update_ratio": 1e-3 * np.exp(0.05 * rng.standard_normal(COUNT)),
        }
        self.identities = tuple(
            TensorIdentity(name, role, "e4m3") for name in LAYERS for role in ROLES
        )
        shape = (COUNT, len(self.identities))
        self.log_amax = 0.05 * rng.standard_normal(shape)
        self.log_scale = -self.log_amax + 0.02 * rng.standard_normal(shape)
        self.others = {
            "kurtosis": 5 * np.exp(0.1 * rng.standard_normal(shape)),
            "channel_kurtosis": 2 * np.exp(0.05 * rng.standard_normal(shape)),
            "top_channel_share": 0.02 * np.exp(0.05 * rng.standard_normal(shape)),
            "overflow_ratio": np.abs(1e-4 * rng.standard_normal(shape)),
            "underflow_ratio": np.abs(1e-3 * rng.standard_normal(shape)),
            "sqnr_db": 30 + 0.2 * rng.standard_normal(shape),
        }

    def row(self, layer: str, role: str) -> int:
        return self.identities.index(TensorIdentity(layer, role, "e4m3"))

    def window(self, *, cadence: int = 4) -> RunWindow:
        statistics = {
            "amax": np.exp2(self.log_amax),
            "rms": 0.2 * np.exp2(self.log_amax),
            "scale_log2": self.log_scale,
            "headroom_log2": -(self.log_amax + self.log_scale),
            **self.others,
        }
        off = self.steps % cadence != 0
        return RunWindow(
            steps=self.steps,
            scalars=self.scalars,
            identities=self.identities,
            statistics={name: np.where(off[:, None], np.nan, v) for name, v in statistics.items()},
        )


def best(window: RunWindow) -> Cause:
    causes = diagnose(window)
    assert {cause.name for cause in causes} == set(CAUSES)
    assert sum(cause.probability for cause in causes) == pytest.approx(1, abs=1e-3)
    assert [c.probability for c in causes] == sorted((c.probability for c in causes), reverse=True)
    return causes[0]


@pytest.mark.parametrize("seed", range(5))
def test_nothing_moves_and_nothing_is_named(seed: int) -> None:
    assert best(Made(seed).window()).name == "unknown"


@pytest.mark.parametrize("logged", [True, False])
def test_a_growing_learning_rate(logged: bool) -> None:
    made = Made()
    made.scalars["learning_rate"] = np.asarray(
        1e-3 * 1.03 ** np.clip(made.steps - START, 0, None), np.float64
    )
    made.scalars["update_ratio"] *= 1.03 ** np.clip(made.steps - START, 0, None)
    if not logged:
        del made.scalars["learning_rate"]
    made.others["kurtosis"] *= np.exp(made.ramp)[:, None]
    made.log_amax += 0.5 * made.ramp[:, None]
    made.log_scale -= 0.5 * made.ramp[:, None]
    cause = best(made.window())
    assert cause.name == "learning_rate"
    assert cause.probability > 0.5
    assert cause.statistic == ("learning_rate" if logged else "update_ratio")
    assert cause.since_step is not None
    assert START <= cause.since_step <= START + 25
    assert "times" in cause.evidence


def test_the_layers_that_move_first_come_first() -> None:
    made = Made()
    made.scalars["update_ratio"] *= 1.03 ** np.clip(made.steps - START, 0, None)
    made.scalars["learning_rate"] = np.asarray(
        1e-3 * 1.03 ** np.clip(made.steps - START, 0, None), np.float64
    )
    first = made.row("blocks.2.mlp.down", "input")
    late = np.clip(made.steps - START - 40, 0, None) / 10
    made.others["kurtosis"] *= np.exp(late)[:, None]
    made.others["kurtosis"][:, first] *= np.exp(2 * made.ramp)
    assert best(made.window()).layers[0] == "blocks.2.mlp.down"


@pytest.mark.parametrize("growth", [1.0, 1.05, 0.95])
def test_a_scale_that_does_not_follow(growth: float) -> None:
    made = Made()
    row = made.row("blocks.1.mlp.up", "weight")
    after = made.steps >= START
    if growth == 1.0:
        made.log_amax[:, row] += made.ramp
        made.log_scale[after, row] = made.log_scale[START, row]
    else:
        made.log_scale[:, row] += np.log2(growth) * np.clip(made.steps - START, 0, None)
    cause = best(made.window())
    # A scale that shrinks flushes to zero, one that grows or stays behind saturates.
    assert cause.name == ("underflow" if growth < 1 else "scale")
    assert cause.layers == ("blocks.1.mlp.up",)
    assert (cause.role, cause.statistic) == ("weight", "headroom_log2")


def test_an_outlier_channel_that_comes_and_goes() -> None:
    made = Made()
    row = made.row("blocks.0.mlp.down", "input")
    present = (made.steps // 4) % 2 == 0
    made.others["channel_kurtosis"][:, row] *= np.where(present, np.exp(2 * made.ramp), 1)
    cause = best(made.window())
    assert cause.name == "outlier"
    assert cause.layers[0] == "blocks.0.mlp.down"


def test_bad_batches() -> None:
    made = Made()
    made.scalars["loss"][START : START + 20] += 4
    made.scalars["grad_norm"][START : START + 20] *= 30
    cause = best(made.window())
    assert cause.name == "bad_data"
    assert cause.since_step == START


def test_without_tensors_or_with_few_records() -> None:
    made = Made()
    bare = RunWindow(steps=made.steps, scalars=made.scalars)
    assert best(bare).name in CAUSES
    assert diagnose(RunWindow(steps=made.steps[:5], scalars={})) == ()
    assert best(RunWindow(steps=made.steps, scalars={})).name == "unknown"


def test_non_finite_values_do_no_harm() -> None:
    made = Made()
    made.scalars["loss"][200:] = np.nan
    made.others["sqnr_db"][:, 0] = np.inf
    made.log_amax[:, 1] = np.nan
    made.others["kurtosis"][:] = np.nan
    assert best(made.window(cadence=1)).name in CAUSES


def test_only_statistics_and_scalars_are_read() -> None:
    fields = set(RunWindow.__dataclass_fields__)
    assert fields == {"steps", "scalars", "identities", "statistics", "events"}
    for module in (diagnosis, diagnosis_rules, movement):
        assert "trainer" not in inspect.getsource(module)


def test_a_lost_optimizer() -> None:
    made = Made()
    after = np.clip(made.steps - START, 0, None)
    made.scalars["update_ratio"] *= np.where(made.steps >= START, 1 + 3 * 0.9**after, 1)
    made.scalars["loss"] += np.where(made.steps > START, 0.8 * 0.9**after, 0)
    window = made.window()
    untold = best(window)
    assert (untold.name, untold.since_step) == ("optimizer_state", START)
    told = best(replace(window, events=((START, "restart"),)))
    assert told.probability > untold.probability
    assert f"began anew at step {START}" in told.evidence


def test_a_restart_that_lost_nothing_is_no_cause() -> None:
    window = replace(Made().window(), events=((START, "restart"),))
    assert best(window).name == "unknown"


def test_a_gap_in_the_steps_is_a_restart() -> None:
    made = Made()
    made.scalars["update_ratio"][START:] *= 3
    window = made.window()
    steps = np.where(made.steps >= START, made.steps + 100, made.steps)
    cause = best(replace(window, steps=steps))
    assert (cause.name, cause.since_step) == ("optimizer_state", START + 100)
    assert "began anew" in cause.evidence


def test_a_jump_of_the_rate_is_not_a_lost_optimizer() -> None:
    made = Made()
    made.scalars["update_ratio"][START:] *= 5
    made.scalars["learning_rate"][START:] *= 5
    assert best(made.window()).name == "learning_rate"


@pytest.mark.parametrize("logged", [True, False])
def test_attention_logits_that_grow(logged: bool) -> None:
    made = Made()
    core = TensorIdentity("blocks.1.attention.core", "query", "e4m3")
    made.identities = (*made.identities[:-1], core)
    if logged:
        made.scalars["max_attention_logit"] = np.asarray(
            10 * np.exp2(2 * made.ramp) * np.exp(0.02 * made.rng.standard_normal(COUNT)), np.float64
        )
    else:
        made.log_amax[:, -1] += 2 * made.ramp
        made.log_scale[:, -1] -= 2 * made.ramp
    cause = best(made.window())
    assert cause.name == "attention"
    assert cause.since_step is not None
    assert abs(cause.since_step - START) <= 8
    if not logged:
        assert cause.layers == ("blocks.1.attention.core",)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("slope", [0.12, 0.5, 2.0])
def test_a_slow_ramp_began_before_it_left_its_noise(seed: int, slope: float) -> None:
    steps = np.arange(0, 240, 2, dtype=np.int64)
    noise = np.random.default_rng(seed).standard_normal(len(steps))
    begun = movement.onset(steps, noise + slope * np.clip(steps - START, 0, None))
    assert begun is not None
    # A straight line is found to within the stretch over which it grows by three sigmas.
    assert abs(begun - START) <= max(4, 3 / slope)


def test_the_onset_of_a_step_and_of_what_came_back() -> None:
    steps = np.arange(100, dtype=np.int64)
    noise = np.random.default_rng(0).standard_normal(100)
    assert movement.onset(steps, noise + 20 * (steps >= 60)) == 60
    assert movement.onset(steps, noise + 20 * ((steps >= 40) & (steps < 60))) is None
    assert movement.onset(steps, np.full(100, np.nan)) is None
