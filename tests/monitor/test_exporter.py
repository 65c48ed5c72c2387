"""The exporter of a job, scraped over HTTP, and what promtool says of it."""

from __future__ import annotations

import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from prometheus_client.parser import text_string_to_metric_families

from foreshock.monitor import Watch
from foreshock.monitor.exporter import PrometheusSink
from foreshock.monitor.record import (
    Event,
    StepRecord,
    TensorIdentity,
    TensorStatistics,
    records_to_table,
)
from tests.monitor.models import tiny, train


@pytest.fixture
def sink() -> Iterator[PrometheusSink]:
    made = PrometheusSink("llama", port=0, top_k=3)
    yield made
    made.close()


def scrape(sink: PrometheusSink) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def samples(text: str) -> dict[tuple[str, str, str], float]:
    return {
        (s.name, s.labels.get("role", ""), s.labels.get("layer", "")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def record(step: int, kurtosis: list[float], **more: object) -> pa.RecordBatch:
    tensors = tuple(
        TensorStatistics(
            identity=TensorIdentity(f"blocks.{i}", "input", "e4m3"),
            numel=8,
            kurtosis=value,
            headroom_log2=float(i),
        )
        for i, value in enumerate(kurtosis)
    )
    made = StepRecord(step, datetime.now(UTC), {"loss": 2.5}, tensors, **more)  # type: ignore[arg-type]
    return records_to_table([made]).to_batches()[0]


def test_the_worst_layers_are_named_and_leave_again(sink: PrometheusSink) -> None:
    sink(record(1, [3.0, 50.0, 4.0, 9.0, 5.0]))
    found = samples(scrape(sink))
    assert found["foreshock_job_kurtosis", "input", ""] == 50
    assert found["foreshock_job_fp8_headroom_log2", "input", ""] == 0, "the smallest is worst"
    named = {key[2]: v for key, v in found.items() if key[0] == "foreshock_job_layer_kurtosis"}
    assert named == {"blocks.1": 50, "blocks.3": 9, "blocks.4": 5}
    sink(record(2, [30.0, 1.0, 4.0, 9.0, 5.0]))
    found = samples(scrape(sink))
    named = {key[2]: v for key, v in found.items() if key[0] == "foreshock_job_layer_kurtosis"}
    assert named == {"blocks.0": 30, "blocks.3": 9, "blocks.4": 5}
    assert found["foreshock_job_step", "", ""] == 2


def test_not_a_number_is_shown_and_worst(sink: PrometheusSink) -> None:
    event = Event("nonfinite", layer="blocks.0")
    sink(record(1, [float("nan"), float("inf"), 3.0], events=(event,)))
    text = scrape(sink)
    found = samples(text)
    worst = found["foreshock_job_kurtosis", "input", ""]
    assert worst != worst
    assert found["foreshock_job_layer_kurtosis", "input", "blocks.1"] == float("inf")
    assert found["foreshock_job_nonfinite_total", "", ""] == 1


def test_the_number_of_series_does_not_grow_with_the_model(sink: PrometheusSink) -> None:
    sink(record(1, [float(i) for i in range(1000)]))
    assert len(samples(scrape(sink))) < 40


def test_a_taken_port_is_said_clearly(sink: PrometheusSink) -> None:
    with pytest.raises(OSError, match="pass another port, or 0"):
        PrometheusSink("other", port=sink.port)
    with pytest.raises(ValueError, match="top_k is -1"):
        PrometheusSink("other", port=0, top_k=-1)


def test_a_watched_run_is_scraped(start: Callable[..., Watch]) -> None:
    sink = PrometheusSink("r", port=0)
    model, optimizer = tiny()
    watch = start(model, optimizer, sinks=[sink])
    losses = train(model, optimizer, steps=3, micro_batches=1)
    assert watch.flush()
    found = samples(scrape(sink))
    assert found["foreshock_job_loss", "", ""] == pytest.approx(losses[-1], rel=1e-6)
    assert found["foreshock_job_step", "", ""] == 2
    assert found["foreshock_job_amax", "weight", ""] > 0
    watch.close()
    with pytest.raises(OSError, match=r"refused|Connection"):
        scrape(sink)


@pytest.mark.debian
def test_promtool_finds_nothing(sink: PrometheusSink) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool comes with Debian's prometheus")
    sink(record(1, [3.0, 50.0]))
    checked = subprocess.run(
        [promtool, "check", "metrics"],
        input=scrape(sink),
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
