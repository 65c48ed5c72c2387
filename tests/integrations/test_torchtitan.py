"""torchtitan's Trainer, with and without the watch; in processes of their own (torchtitan_cpu)."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foreshock.monitor.record import StepRecord, read_stream, table_to_records

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent.parent
PROGRAM = [sys.executable, "-m", "tests.integrations.torchtitan_cpu"]


def records_in(spool: Path) -> list[StepRecord]:
    sealed = sorted(spool.glob("*/*/*/*.arrow"))
    return [r for path in sealed for r in table_to_records(read_stream(path.read_bytes()))]


def start(folder: Path, arguments: list[str], **job: object) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [*PROGRAM, *arguments],
        env=os.environ
        | {"FORESHOCK_SPOOL": str(folder / "spool"), "PYTHONPATH": os.pathsep.join(sys.path)}
        | {name: str(value) for name, value in job.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )


def finished(programs: list[subprocess.Popen[str]]) -> list[str]:
    """What they said; one that fails leaves the others waiting for it."""
    try:
        said = [programs[0].communicate(timeout=560)[0]]
        if programs[0].returncode == 0:
            said += [program.communicate(timeout=60)[0] for program in programs[1:]]
        return said
    finally:
        for program in programs:
            program.kill()
            program.communicate()


def train(folder: Path, ranks: int = 1, **options: Any) -> list[dict[str, Any]]:
    """What came of a training, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = []
    for rank in range(ranks):
        given = options | {"result": str(folder / f"{rank}.json")}
        job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        programs.append(start(folder, ["train", json.dumps(given)], MASTER_ADDR="127.0.0.1", **job))
    for said in finished(programs):
        assert all(program.returncode == 0 for program in programs), said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.timeout(1200)
def test_same_losses_and_one_record_per_step(tmp_path: Path) -> None:
    # As torchtitan's own debug model: the head in chunks of the loss, selective checkpoints.
    options: dict[str, Any] = {"parts": 2, "selective": True}
    (alone,) = train(tmp_path / "a", **options)
    watch = {"run": "titan", "tensor_every": 2}
    (watched,) = train(tmp_path / "b", watched=True, watch=watch, **options)
    assert watched == alone
    assert len(alone["losses"]) == 24
    records = records_in(tmp_path / "b" / "spool")
    assert [r.step + 1 for r in records] == [step for step, _, _ in alone["losses"]]
    losses = [loss for _, loss, _ in alone["losses"]]
    assert [r.scalars["loss"] for r in records] == pytest.approx(losses, rel=1e-6)
    norms = [norm for _, _, norm in alone["losses"]]
    assert [r.scalars["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-5)
    # Warmed up in two steps, then going down.
    rates = [r.scalars["learning_rate"] for r in records]
    assert rates[:2] == pytest.approx([4e-4, 8e-4])
    assert rates[-1] < 4e-4
    (registration,) = (tmp_path / "b" / "spool").glob("*/titan/*/run.json")
    config = json.loads(registration.read_text())["config"]
    assert config["training"]["seq_len"] == 32
    tensors = records[2].tensors
    assert not records[1].tensors
    inside = [t for t in tensors if t.identity.layer == "layers.3.feed_forward.w2"]
    assert [(t.identity.role, t.observations) for t in inside] == [
        ("input", 2),
        ("weight", 1),
        ("grad_output", 2),
    ]
    heads = {t.identity.call_index for t in tensors if t.identity.layer == "lm_head"}
    assert heads == set(range(8)), "the head once per chunk of the loss"
    assert [e.kind for r in records for e in r.events] == ["end"]


@pytest.mark.timeout(1200)
def test_resume_goes_on_at_its_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {"watched": True, "checkpoints": str(tmp_path / "saved")}
    train(tmp_path / "a", steps=12, **options)
    train(tmp_path / "b", steps=24, **options)
    first, second = (records_in(tmp_path / name / "spool") for name in "ab")
    assert [r.step for r in first] == list(range(12))
    assert [r.step for r in second] == list(range(12, 24))
    saved = [e.detail for r in (*first, *second) for e in r.events if e.kind == "checkpoint"]
    # The last checkpoint of the first holds the model alone, so the second begins before it.
    assert "step 10" in saved
    assert "step 20" in saved


@pytest.mark.timeout(1200)
def test_two_ranks_with_shards(tmp_path: Path) -> None:
    watched = train(tmp_path, ranks=2, watched=True, steps=20, watch={"tensor_every": 5}, parts=2)
    assert watched[0]["losses"] == watched[1]["losses"]
    records = records_in(tmp_path / "spool")
    assert [r.step for r in records] == list(range(20)), "one record per step for both"
    losses = [loss for _, loss, _ in watched[0]["losses"]]
    assert [r.scalars["loss"] for r in records] == pytest.approx(losses, rel=1e-6)
    norms = [norm for _, _, norm in watched[0]["losses"]]
    assert [r.scalars["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-4)
    (weight,) = (
        t
        for t in records[0].tensors
        if (t.identity.layer, t.identity.role) == ("layers.0.attention.wo", "weight")
    )
    assert weight.numel == 256 * 256, "of both shards"
    assert not [e for r in records for e in r.events if e.kind == "rank_disagrees"]


@pytest.mark.timeout(1200)
def test_the_example(tmp_path: Path) -> None:
    program = start(tmp_path, ["example", str(ROOT / "examples" / "torchtitan_llama.py")])
    (said,) = finished([program])
    assert program.returncode == 0, said
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said)
    printed = [float(x) for x in re.findall(r"step: +\d+ +loss: +([\d.]+)", plain)]
    records = records_in(tmp_path / "spool")
    assert [r.scalars["loss"] for r in records] == pytest.approx(printed, abs=1e-5)
    assert len(records) == 24
    assert {t.identity.role for t in records[0].tensors} == {"input", "weight", "grad_output"}
