"""bfloat16 parameters with float32 masters: steps that bfloat16 loses add up, and runs resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.states_memory import measured
from torch import nn

from foreshock.trainer.config import ExecutionConfig, PrecisionConfig, RunConfig, StatesConfig
from foreshock.trainer.loop import CheckpointPolicy, train
from foreshock.trainer.master_adamw import MasterAdamW, keep_in_bfloat16
from foreshock.trainer.model import Decoder
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.stacked import check_alike

NARROW = StatesConfig(parameters="bfloat16")
RUN = replace(debug_cpu(seed=2), states=NARROW)


def test_updates_below_a_bfloat16_step_add_up_as_in_float32() -> None:
    torch.manual_seed(0)
    start = torch.randn(6, 5).bfloat16()
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.double())
    settings = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}
    ours = MasterAdamW([narrow], **settings)  # type: ignore[arg-type]
    theirs = torch.optim.AdamW([wide], **settings)  # type: ignore[arg-type]
    for _ in range(300):
        narrow.grad = torch.randn(6, 5).add_(1).bfloat16()
        wide.grad = narrow.grad.double()
        ours.step()
        theirs.step()
    master = ours.state[narrow]["master_weight"]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master.double(), wide.detach(), rtol=0, atol=1e-4)
    assert torch.equal(narrow, master.bfloat16())
    # One step is a 400th of the distance between bfloat16 numbers at 1; 300 of them count.
    assert float((master - start.float()).abs().median()) > 1e-3


def test_matrices_are_bfloat16_and_gains_are_not() -> None:
    model = Decoder(RUN.model, RUN.precision)
    keep_in_bfloat16(model)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert all((kinds[n] == torch.bfloat16) == (p.dim() == 2) for n, p in model.named_parameters())
    logits = model(torch.randint(256, (2, 8)))
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("recipe", ["bf16", "emulated", "rowwise"])
def test_a_run_learns_as_with_float32_parameters(recipe: str) -> None:
    precision = {
        "bf16": PrecisionConfig(backend="bf16"),
        "emulated": PrecisionConfig(),
        "rowwise": PrecisionConfig(scaling="rowwise"),
    }[recipe]
    narrow = replace(RUN, precision=precision)
    losses = [train(run).steps[-1].loss for run in (narrow, replace(narrow, states=StatesConfig()))]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert losses[0] < 5.3


def test_it_resumes_exactly_masters_included(tmp_path: Path) -> None:
    whole = [step.loss for step in train(RUN).steps]
    policy = CheckpointPolicy(folder=tmp_path, every=10)
    train(RUN, checkpoints=policy)
    for newer in sorted(tmp_path.glob("step-*.pt"))[1:]:
        newer.unlink()
    resumed = [s.loss for s in train(RUN, checkpoints=replace(policy, resume=True)).steps]
    assert resumed == whole[-len(resumed) :]
    assert 0 < len(resumed) < len(whole)


def test_mixed_precision_is_two_two_and_twelve_bytes() -> None:
    held = measured(NARROW, 64, "cpu")
    assert held.weights == pytest.approx(2, abs=0.05)
    assert held.gradients == pytest.approx(2, abs=0.05)
    assert held.states == pytest.approx(12, abs=0.05)


def test_what_it_does_not_go_with_is_refused() -> None:
    with pytest.raises(ValueError, match="format of its own for weights"):
        StatesConfig(level="O1", parameters="bfloat16")
    with pytest.raises(ValueError, match="allowed: backends bf16, emulated, native"):
        replace(RUN, precision=PrecisionConfig(backend="transformer_engine"))
    with pytest.raises(ValueError, match=r"allowed: execution\.parallel ddp"):
        replace(RUN, execution=ExecutionConfig(parallel="fsdp2"))
    with pytest.raises(ValueError, match="train alone for parameters in bfloat16"):
        check_alike([RUN])


def test_runs_of_before_keep_their_fingerprint() -> None:
    for states in (StatesConfig(), StatesConfig(level="O2")):
        config = RunConfig(name="a", states=states)
        assert "parameters" not in str(config.fingerprint())
        assert config.fingerprint() != replace(config, states=NARROW).fingerprint()
