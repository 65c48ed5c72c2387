"""transformers' Trainer, with and without the callback."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from foreshock.monitor.integrations.huggingface import ForeshockCallback
from tests.monitor.models import Recorder

transformers: Any = pytest.importorskip("transformers")

pytestmark = pytest.mark.long


class Recording(transformers.Trainer):  # type: ignore[misc]
    """Keeps what training_step returns: of each micro-batch."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.kept = [*getattr(self, "kept", []), float(loss)]
        return loss


class At(transformers.TrainerCallback):  # type: ignore[misc]
    """Does something when a step begins."""

    def __init__(self, step: int, function: Any) -> None:
        self.step, self.function = step, function

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> Any:
        if state.global_step == self.step:
            self.function(model, control)
        return control


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(160):
        tokens = torch.randint(64, (12,), generator=generator)
        labels = tokens.clone()
        # Micro-batches of unequal numbers of tokens.
        labels[: index % 7] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def trainer(folder: Path, callbacks: list[Any], **options: Any) -> Recording:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 24,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Recording(
        model=transformers.LlamaForCausalLM(config),
        args=transformers.TrainingArguments(**(defaults | options)),
        train_dataset=data(),
        eval_dataset=data()[:4],
        callbacks=callbacks,
    )


@pytest.fixture
def callback(tmp_path: Path, recorder: Recorder) -> ForeshockCallback:
    return ForeshockCallback("hf", spool=tmp_path / "spool", sinks=[recorder], tensor_every=1)


@pytest.mark.parametrize("parts", [1, 3])
def test_same_losses_and_one_record_per_step(
    parts: int, tmp_path: Path, callback: ForeshockCallback, recorder: Recorder
) -> None:
    options: dict[str, Any] = {
        "gradient_accumulation_steps": parts,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_strategy": "steps",
        "save_steps": 10,
    }
    alone = trainer(tmp_path / "a", [], **options)
    alone.train()
    watched = trainer(tmp_path / "b", [callback], **options)
    watched.train()
    assert watched.kept == alone.kept
    assert len(watched.kept) == 24 * parts
    assert all(
        torch.equal(a, b)
        for a, b in zip(watched.model.parameters(), alone.model.parameters(), strict=True)
    )
    records = recorder.records
    assert [r.step for r in records] == list(range(24))
    # The Trainer divides by the tokens of the whole step, so a step's loss is the sum.
    steps = [sum(watched.kept[i * parts : (i + 1) * parts]) for i in range(24)]
    assert [r.scalars["loss"] for r in records] == pytest.approx(steps, rel=1e-12)
    logged = [e for e in watched.state.log_history if "loss" in e]
    assert [r.scalars["loss"] for r in records] == pytest.approx(
        [e["loss"] for e in logged], rel=1e-6
    )
    assert [r.scalars["grad_norm"] for r in records] == pytest.approx(
        [e["grad_norm"] for e in logged], rel=1e-4
    )
    saves = [e.detail for r in records for e in r.events if e.kind == "checkpoint"]
    assert saves[:2] == ["step 10", "step 20"]
    assert {t.identity.call_index for r in records for t in r.tensors} == {0}
    assert callback.watch is None


def test_a_nan_is_not_filtered(
    tmp_path: Path, callback: ForeshockCallback, recorder: Recorder
) -> None:
    def break_it(model: torch.nn.Module, control: Any) -> None:
        with torch.no_grad():
            model.get_parameter("lm_head.weight").fill_(float("nan"))

    watched = trainer(tmp_path, [callback, At(21, break_it)])
    watched.train()
    assert all(math.isfinite(e["loss"]) for e in watched.state.log_history if "loss" in e)
    assert [math.isnan(r.scalars["loss"]) for r in recorder.records] == [False] * 21 + [True] * 3


def test_resume_goes_on_at_its_step(
    tmp_path: Path, callback: ForeshockCallback, recorder: Recorder
) -> None:
    def stop(model: object, control: Any) -> None:
        control.should_training_stop = True

    options = {"save_strategy": "steps", "save_steps": 11}
    trainer(tmp_path, [callback, At(11, stop)], **options).train()
    reached = len(recorder.records)
    trainer(tmp_path, [callback], **options).train(resume_from_checkpoint=True)
    assert [r.step for r in recorder.records[reached:]] == list(range(11, 24))


def test_training_that_raises_leaves_its_records(
    tmp_path: Path, callback: ForeshockCallback, recorder: Recorder
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        trainer(tmp_path, [callback, At(20, fail)]).train()
    callback.close()
    assert [r.step for r in recorder.records] == list(range(20))
