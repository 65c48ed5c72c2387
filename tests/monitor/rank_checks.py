"""What must be in the records of two processes, whatever they train on; see `parallel`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.monitor.parallel import SIZE, STEPS, WIDTH, inputs

ROOT = Path(__file__).parents[2]


def run(case: str, folder: Path, **more: str) -> list[dict[str, Any]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "tests.monitor.parallel", case]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])} | more
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(folder)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(SIZE)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * SIZE, "\n".join(errors)
    paths = [folder / f"{rank}.json" for rank in range(SIZE)]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    for each in found:
        records = each["records"]
        each["records"] = records["records"] if isinstance(records, dict) else records
    return found


def rows(record: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["layer"], row["role"]): row for row in record["tensors"]}


def check_common(seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first, second = seen
    assert first["closed"]
    assert second["closed"]
    assert second["records"] == [], "one rank emits"
    records: list[dict[str, Any]] = first["records"]
    assert [record["step"] for record in records] == list(range(STEPS))
    assert [bool(record["tensors"]) for record in records] == [True, False] * (STEPS // 2)
    for record in records:
        means = np.mean([each["losses"][record["step"]] for each in seen])
        assert record["scalars"]["loss"] == pytest.approx(means, rel=1e-6)
    return records


def check_inputs(record: dict[str, Any], *, ranks: tuple[int, ...]) -> None:
    """The row of the first layer's input is that of all processes' inputs together."""
    together = torch.cat([inputs(record["step"], rank) for rank in ranks]).double()
    row = rows(record)["up", "input"]
    x2 = together.square()
    assert row["numel"] == together.numel()
    assert row["amax"] == pytest.approx(float(together.abs().max()))
    assert row["rms"] == pytest.approx(float(x2.mean().sqrt()), rel=1e-6)
    kurtosis = together.numel() * x2.square().sum() / x2.sum().square()
    assert row["kurtosis"] == pytest.approx(float(kurtosis), rel=1e-5)
    each = x2.flatten(1)
    sequences = each.shape[1] * each.square().sum(1) / each.sum(1).square()
    assert row["kurtosis_sequence_mean"] == pytest.approx(float(sequences.mean()), rel=1e-5)
    share = x2.flatten(0, 1).sum(0) / x2.sum()
    assert row["top_channel"] == int(share.argmax())
    assert row["top_channel_share"] == pytest.approx(float(share.max()), rel=1e-6)
    assert row["channel_kurtosis"] == pytest.approx(float(WIDTH * share.square().sum()), rel=1e-5)


def check_data_parallel(seen: list[dict[str, Any]]) -> None:
    records = check_common(seen)
    for each in seen:
        assert each["losses"] == each["bare"], "watching changes no bit"
        assert each["errors"] == 0
    for record in records:
        norm = seen[0]["norms"][record["step"]]
        assert record["scalars"]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    check_inputs(records[0], ranks=(0, 1))
    measured = rows(records[0])
    assert measured["up", "input"]["amax_rank"] == 1, "the outlier is in rank 1's batch"
    assert measured["up", "input"]["observations"] == SIZE
    assert measured["up", "weight"]["numel"] == 2 * WIDTH * WIDTH, "a copy counts once"
    events = [event["kind"] for record in records for event in record["events"]]
    assert events == ["end"]


def check_tensor_parallel(seen: list[dict[str, Any]]) -> None:
    records = check_common(seen)
    assert seen[0]["losses"] == seen[0]["bare"]
    check_inputs(records[0], ranks=(1,))
    measured = rows(records[0])
    for layer in ("up", "down"):
        assert measured[layer, "weight"]["numel"] == 2 * WIDTH * WIDTH, "two halves"
    # 3 sequences of 5 tokens: whole for a replica, and the two halves of what is cut by feature.
    assert measured["up", "grad_output"]["numel"] == 15 * 2 * WIDTH
    assert measured["down", "input"]["numel"] == 15 * 2 * WIDTH
    assert measured["down", "grad_output"]["numel"] == 15 * WIDTH
    assert measured["down", "input"]["top_channel"] < 2 * WIDTH
    for record in records:
        norm = seen[0]["norms"][record["step"]]
        assert record["scalars"]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def check_lacking(seen: list[dict[str, Any]]) -> None:
    records = check_common(seen)
    layers = seen[0]["layers"]
    assert len(layers) == SIZE
    measured = rows(records[0])
    for rank, layer in enumerate(layers):
        row = measured[layer, "input"]
        assert row["numel"] == 15 * WIDTH
        assert row["amax_rank"] == rank
    total = np.sqrt(sum(each["norms"][0] ** 2 for each in seen))
    assert records[0]["scalars"]["grad_norm"] == pytest.approx(total, rel=1e-5)


def check_disagreeing(seen: list[dict[str, Any]]) -> None:
    records = check_common(seen)
    events = [event for event in records[0]["events"] if event["kind"] == "rank_disagrees"]
    assert {event["role"] for event in events} == {"input", "weight", "grad_output"}
    assert {event["rank"] for event in events} == {1}
    assert all("scale" in event["detail"] for event in events)


def check_survivor(seen: list[dict[str, Any]]) -> None:
    (survivor,) = seen
    assert len(survivor["losses"]) == 2 * STEPS
    assert [record["step"] for record in survivor["records"]] == list(range(2 * STEPS))
    messages = [event["detail"] for record in survivor["records"] for event in record["events"]]
    assert any("cannot be reached" in message for message in messages)
    last = rows(survivor["records"][-1])["up", "input"]
    assert last["numel"] == 15 * WIDTH, "its own part only"
