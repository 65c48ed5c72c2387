"""Blocks cut over two processes compute, cast, record and resume what a lone process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.trainer.tensor_ranks import STEPS, STOP, run, run_of, trained_as

from foreshock.trainer.config import ExecutionConfig, RunConfig, StatesConfig
from foreshock.trainer.faults import ScaleFault
from foreshock.trainer.loop import train
from foreshock.trainer.parallel import Cut
from foreshock.trainer.recipes import debug_cpu


def test_pieces_join_to_the_whole_and_each_has_some_of_every_section() -> None:
    whole = torch.arange(24.0).view(12, 2)
    cut = Cut(axis=0, sections=(8, 4), ranks=2)
    pieces = [cut.piece(whole, rank) for rank in range(2)]
    assert pieces[1][:, 0].tolist() == [8, 10, 12, 14, 20, 22]
    assert torch.equal(cut.joined(pieces), whole)
    with pytest.raises(ValueError, match="3 does not split over 2"):
        Cut(axis=1, sections=(3,), ranks=2)


def test_two_processes_compute_and_cast_what_one_does(tmp_path: Path) -> None:
    run(tmp_path, "exact", "casts", "bytes_sent", "refused")


def check_trained(folder: Path) -> None:
    """Train alone and on two processes and compare: losses, norms, records, checkpoints."""
    lone = trained_as(run_of(None), folder, "half")
    (folder / "half").rename(folder / "lone")
    straight = trained_as(run_of(None), folder, "straight")
    run(folder, "trained")
    first, second = (json.loads((folder / f"trained-{rank}.json").read_text()) for rank in range(2))
    wanted = straight["steps"]
    assert isinstance(wanted, list)
    for name, found in first.items():
        assert found["steps"] == second[name]["steps"], "both processes know the same"
        expected = {"half": wanted[:STOP], "resumed": wanted[STOP:]}.get(name, wanted)
        assert len(found["steps"]) == len(expected)
        for (loss, norm), (own_loss, own_norm) in zip(found["steps"], expected, strict=True):
            assert loss == pytest.approx(own_loss, rel=5e-3), name
            assert norm == pytest.approx(own_norm, rel=5e-2), name
    recorded = straight["seen"]
    assert isinstance(recorded, dict)
    assert second["fp8"]["seen"] == {}, "one process emits"
    for way in ("fp8", "whole"):
        assert first[way]["seen"].keys() == recorded.keys()
        for key, (rms, amax, numel) in recorded.items():
            found = first[way]["seen"][key]
            assert found[2] == numel, f"{way} {key}: pieces add up, copies count once"
            assert found[0] == pytest.approx(rms, rel=3e-2), f"{way} {key}"
            assert found[1] == pytest.approx(amax, rel=0.1), f"{way} {key}"
    # The other way round: one process goes on from what two wrote.
    alone = trained_as(run_of(None), folder, "alone", resume=folder / "half")
    rest = alone["steps"]
    assert isinstance(rest, list)
    assert len(rest) == STEPS - STOP
    for (loss, _), (own_loss, _) in zip(rest, wanted[STOP:], strict=True):
        assert loss == pytest.approx(own_loss, rel=5e-3)
    assert lone["steps"] == wanted[:STOP]


def test_two_processes_train_record_and_resume_as_one(tmp_path: Path) -> None:
    check_trained(tmp_path)


def test_what_cannot_be_cut_is_refused() -> None:
    cut = ExecutionConfig(tensor_parallel=2)
    with pytest.raises(ValueError, match="tensor_parallel is 2 and 1 processes run; start 2"):
        train(RunConfig(name="r", execution=cut))
    with pytest.raises(ValueError, match="wire is fp8 without sequence_parallel"):
        ExecutionConfig(tensor_parallel=2, wire="fp8")
    with pytest.raises(ValueError, match="sequence_parallel is true with tensor_parallel 1"):
        ExecutionConfig(sequence_parallel=True)
    with pytest.raises(ValueError, match=r"parallel ddp, without execution\.compile"):
        ExecutionConfig(tensor_parallel=2, parallel="fsdp2")
    with pytest.raises(ValueError, match="tensor_parallel takes precision"):
        RunConfig(name="r", execution=cut, states=StatesConfig(level="O2"))
    fault = ScaleFault(start=1, layers="mlp")
    with pytest.raises(ValueError, match="faults of layers"):
        RunConfig(name="r", execution=cut, fault=fault)


def test_how_it_is_computed_is_no_part_of_what_a_run_is() -> None:
    one, two = debug_cpu(seed=5), run_of("fp8")
    assert one.fingerprint() != two.fingerprint(), "another recipe"
    assert run_of(None).fingerprint() == two.fingerprint()
