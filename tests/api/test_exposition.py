"""The exposition is lint clean, bounded, and shows what the newest records hold."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from foreshock.api.columns import RecordReader
from foreshock.api.exposition import (
    LAYER_STATISTICS,
    METRICS,
    FiringAlert,
    RunReading,
    ServiceTally,
    metrics_registry,
    most_series,
)
from foreshock.monitor.record import TensorIdentity, TensorStatistics, records_to_table
from tests.api.live_helpers import record, risk


def reading(run: str = "llama", kurtosis: float = 3.0, loss: float = 2.0) -> RunReading:
    (columns,) = RecordReader().read(records_to_table([record(7, loss, kurtosis=kurtosis)]))
    return RunReading(
        project="default",
        run=run,
        step=7,
        time=columns.time.timestamp(),
        scalars=columns.scalars,
        risk=risk(7, "firing", "forecast", 0.4),
        layout=columns.layout,
        statistics=columns.statistics,
    )


def exposed(
    *readings: RunReading,
    tally: ServiceTally | None = None,
    firing: Collection[FiringAlert] = (),
    muted: Collection[FiringAlert] = (),
) -> str:
    registry = metrics_registry(
        tally=tally or ServiceTally(),
        runs=lambda: readings,
        firing=lambda: firing,
        muted=lambda: muted,
        gauges=lambda: {"foreshock_live_runs": len(readings)},
        info={"version": "1.2", "url": "https://watch.example"},
    )
    return generate_latest(registry).decode()


def samples(text: str, name: str) -> dict[tuple[str, ...], float]:
    """Label values (but project and run) to value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                own = [v for k, v in sample.labels.items() if k not in ("project", "run")]
                found[tuple(own)] = sample.value
    return found


def layers(text: str, name: str) -> Sequence[str]:
    return [layer for layer, _ in samples(text, name)]


def test_values_are_those_of_the_newest_record() -> None:
    text = exposed(reading())
    assert samples(text, "foreshock_step") == {(): 7.0}
    assert samples(text, "foreshock_loss") == {(): 2.0}
    # A horizon that the model cannot answer has no sample, so no rule fires on it.
    assert samples(text, "foreshock_divergence_risk_ratio") == {("10",): 0.1, ("100",): 0.4}
    assert samples(text, "foreshock_kurtosis") == {("input",): 10.0}
    assert samples(text, "foreshock_fp8_headroom_log2") == {("input",): -4.0}
    # Not measured is absent, not zero.
    assert samples(text, "foreshock_fp8_overflow_ratio") == {}


def test_what_is_at_stake_is_told_from_the_last_checkpoint() -> None:
    early = exposed(replace(reading(), safe_since=reading().time - 90))
    assert samples(early, "foreshock_at_risk_seconds") == {(): 90.0}
    assert samples(early, "foreshock_last_checkpoint_timestamp_seconds") == {}
    saved = reading().time - 30
    text = exposed(replace(reading(), safe_since=saved, checkpoint=saved))
    assert samples(text, "foreshock_at_risk_seconds") == {(): 30.0}
    assert samples(text, "foreshock_last_checkpoint_timestamp_seconds") == {(): saved}
    assert samples(text, "foreshock_expected_lead_steps") == {(): 40.0}


def test_the_service_says_what_it_is_and_where() -> None:
    line = 'foreshock_service_info{url="https://watch.example",version="1.2"} 1.0'
    assert line in exposed().splitlines()


def test_layers_are_the_worst_few_and_leave_when_they_are_not() -> None:
    name = "foreshock_layer_kurtosis"
    before = layers(exposed(reading()), name)
    assert len(before) == 5
    assert "blocks.7.mlp.down" in before
    assert "blocks.0.mlp.down" not in before
    assert layers(exposed(), name) == []


def test_firing_alerts_are_those_of_the_log_whether_the_run_is_live_or_not() -> None:
    firing: set[FiringAlert] = {
        ("default", "llama", "forecast"),
        ("default", "gone", "detection"),
    }
    text = exposed(reading(), firing=firing)
    assert [line for line in text.splitlines() if line.startswith("foreshock_alert_firing{")] == [
        'foreshock_alert_firing{kind="detection",project="default",run="gone"} 1.0',
        'foreshock_alert_firing{kind="detection",project="default",run="llama"} 0.0',
        'foreshock_alert_firing{kind="forecast",project="default",run="llama"} 1.0',
        'foreshock_alert_firing{kind="nonfinite",project="default",run="llama"} 0.0',
        'foreshock_alert_firing{kind="silence",project="default",run="llama"} 0.0',
    ]


def test_the_end_of_an_alert_of_a_run_that_is_gone_is_seen() -> None:
    firing: set[FiringAlert] = {("default", "gone", "silence")}
    registry = metrics_registry(
        tally=ServiceTally(),
        runs=list,
        firing=lambda: frozenset(firing),
        muted=frozenset,
        gauges=dict,
    )
    name = "foreshock_alert_firing"
    assert samples(generate_latest(registry).decode(), name) == {("silence",): 1.0}
    firing.clear()
    assert samples(generate_latest(registry).decode(), name) == {("silence",): 0.0}


def test_non_finite_loss_is_shown() -> None:
    (value,) = samples(exposed(reading(loss=math.nan)), "foreshock_loss").values()
    assert math.isnan(value)


def test_every_sample_is_named_in_metrics_with_its_labels() -> None:
    tally = ServiceTally()
    tally.scored(0.002)
    tally.delivery("json-1", "delivered")
    tally.add("foreshock_ingest_records_total", 3)
    for family in text_string_to_metric_families(exposed(reading(), tally=tally)):
        for sample in family.samples:
            name = sample.name
            if family.type == "histogram":
                name = family.name
            assert name in METRICS
            assert set(sample.labels) - {"le"} == set(METRICS[name].labels)


def test_runs_are_bounded() -> None:
    text = exposed(*(reading(f"run-{number}") for number in range(600)))
    assert text.count("\nforeshock_step{") == 500


def test_scoring_time_is_a_histogram() -> None:
    tally = ServiceTally()
    for seconds in (0.0004, 0.002, 3.0):
        tally.scored(seconds)
    buckets = samples(exposed(tally=tally), "foreshock_scoring_seconds_bucket")
    assert buckets["0.0005",] == 1
    assert buckets["0.0025",] == 2
    assert buckets["+Inf",] == 3
    assert samples(exposed(tally=tally), "foreshock_scored_records_total") == {(): 3.0}


def test_the_time_to_a_risk_counts_from_the_first_record_that_has_none() -> None:
    tally = ServiceTally()
    tally.waits(("a", 1))
    tally.waits(("a", 1))
    tally.answered(("a", 1))
    tally.answered(("a", 1))
    tally.answered(("b", 1))
    counts = samples(exposed(tally=tally), "foreshock_risk_delay_seconds_count")
    assert counts == {(): 1.0}


def test_a_channel_is_there_before_anything_was_sent() -> None:
    tally = ServiceTally(["json-1"])
    name = "foreshock_alert_deliveries_total"
    outcomes = {("json-1", what): 0.0 for what in ("delivered", "failed", "abandoned")}
    assert samples(exposed(tally=tally), name) == outcomes
    tally.delivery("json-1", "delivered", 0.7)
    buckets = samples(exposed(tally=tally), "foreshock_alert_delivery_seconds_bucket")
    assert (buckets["0.5",], buckets["1",]) == (0, 1)


def big_reading(run: int) -> RunReading:
    """A run of 800 tensors with five statistics each: 4,000 series, worst in different layers."""
    roles = ("input", "weight", "grad_output", "output", "grad_weight")
    tensors = tuple(
        TensorStatistics(
            identity=TensorIdentity(f"blocks.{block}.mlp.down", role, "e4m3"),
            numel=64,
            amax=1.0 + (block + run) % 160,
            kurtosis=3.0 + (7 * block + run) % 160,
            underflow_ratio=0.001 * ((3 * block + run) % 160),
            overflow_ratio=0.001 * ((11 * block + run) % 160),
            headroom_log2=160.0 - (13 * block + run) % 160,
        )
        for block in range(160)
        for role in roles
    )
    step = replace(record(7), tensors=tensors)
    (columns,) = RecordReader().read(records_to_table([step]))
    return replace(
        reading(f"run-{run}"), layout=columns.layout, statistics=columns.statistics, state="live"
    )


def test_100_runs_of_4000_series_stay_below_200_samples_each() -> None:
    text = exposed(*(big_reading(run) for run in range(100)))
    families = list(text_string_to_metric_families(text))
    of_runs = [s for family in families for s in family.samples if "run" in s.labels]
    # Of 400,000: five statistics of five roles, the worst and five layers each, and the rest.
    per_run = len(of_runs) / 100
    assert per_run == 5 * 5 * (1 + 5) + per_run_besides(of_runs)
    assert per_run < 200
    assert len({s.labels["layer"] for s in of_runs if "layer" in s.labels}) <= 160
    assert max(map(len, (s.labels.values() for s in of_runs))) <= 4
    assert sum(len(family.samples) for family in families) < most_series()


def per_run_besides(of_runs: Sequence[Sample]) -> int:
    """Samples of one run that belong to no tensor."""
    return sum("role" not in s.labels for s in of_runs if s.labels["run"] == "run-0")


def test_no_number_of_runs_exceeds_the_limit_that_prometheus_is_told() -> None:
    one = big_reading(0)
    text = exposed(*(replace(one, run=f"run-{n}") for n in range(700)))
    assert text.count("\nforeshock_step{") == 500
    shown = sum(1 for line in text.splitlines() if not line.startswith("#"))
    assert shown < most_series()


def test_counters_are_named() -> None:
    with pytest.raises(ValueError, match="no unlabelled counter"):
        ServiceTally().add("foreshock_loss")


def test_statistics_keep_their_names_at_both_levels() -> None:
    for known in LAYER_STATISTICS:
        assert f"foreshock_{known.suffix}" in METRICS
        assert f"foreshock_layer_{known.suffix}" in METRICS


@pytest.mark.debian
def test_promtool_finds_nothing() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool of Debian's prometheus")
    tally = ServiceTally()
    tally.scored(0.01)
    tally.delivery("json-1", "failed")
    text = exposed(reading('odd "name"\\', loss=math.inf), reading("two"), tally=tally)
    command = ["promtool", "check", "metrics"]
    checked = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
