"""Lightning's Trainer under both of its names, with and without the callback."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.integrations.test_examples import records_in
from tests.monitor.models import Recorder

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]
NAMES = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch_lightning"}


@pytest.fixture(params=NAMES, ids=str)
def library(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


def callback_of(library: Any, *args: Any, **options: Any) -> Any:
    name = f"foreshock.monitor.integrations.{NAMES[library.__name__]}"
    return importlib.import_module(name).ForeshockCallback(*args, **options)


def module(library: Any, *, manual: bool = False, fails_at: int = -1, linear: bool = True) -> Any:
    class Model(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            shape = nn.Linear(8, 16) if linear else nn.Conv1d(8, 16, 1)
            last = nn.Linear(16, 1) if linear else nn.Conv1d(16, 1, 1)
            self.body = nn.Sequential(shape, nn.GELU(), nn.Dropout(0.1), last)
            self.linear = linear
            self.losses: list[float] = []

        def loss(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body(x if linear else x[..., None])
            result: torch.Tensor = (y.flatten() - x.sum(-1)).square().mean()
            return result

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            if len(self.losses) == fails_at:
                raise RuntimeError("out of data")
            loss = self.loss(batch[0])
            self.losses.append(loss.item())
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
            self.loss(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    torch.manual_seed(0)
    return Model()


def fit(library: Any, model: Any, callbacks: list[Any], *, steps: int = 24, **options: Any) -> Any:
    x = torch.randn(96, 8, generator=torch.Generator().manual_seed(1))
    trainer = library.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )
    torch.manual_seed(2)
    data, few = TensorDataset(x), TensorDataset(x[:8])
    trainer.fit(model, DataLoader(data, batch_size=4), DataLoader(few, batch_size=4))
    return trainer


@pytest.mark.parametrize(("manual", "parts"), [(False, 1), (False, 2), (True, 1)])
def test_same_losses_and_one_record_per_step(
    library: Any, manual: bool, parts: int, tmp_path: Path, recorder: Recorder
) -> None:
    options = {} if parts == 1 else {"accumulate_grad_batches": parts}
    alone, watched = module(library, manual=manual), module(library, manual=manual)
    fit(library, alone, [], **options)
    callback = callback_of(library, "l", spool=tmp_path, sinks=[recorder], tensor_every=1)
    fit(library, watched, [callback], **options)
    assert watched.losses == alone.losses
    assert len(watched.losses) == 24 * parts
    assert [r.step for r in recorder.records] == list(range(24))
    steps = [sum(watched.losses[i * parts : (i + 1) * parts]) / parts for i in range(24)]
    assert [r.scalars["loss"] for r in recorder.records] == pytest.approx(steps, rel=1e-12)
    identities = {(t.identity.layer, t.identity.call_index) for t in recorder.records[5].tensors}
    assert identities == {("body.0", 0), ("body.3", 0)}
    assert callback.watch is None


def test_two_optimizers_are_one_step(library: Any, tmp_path: Path, recorder: Recorder) -> None:
    model = module(library, manual=True)
    first, last = model.body[0], model.body[3]
    model.configure_optimizers = lambda: [
        torch.optim.SGD(first.parameters(), lr=1e-2),
        torch.optim.AdamW(last.parameters(), lr=3e-2),
    ]
    norms = []

    def training_step(batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = model.loss(batch[0])
        model.manual_backward(loss)
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        for optimizer in model.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return loss

    model.training_step = training_step
    # Lightning counts the steps of both.
    callback = callback_of(library, "two", spool=tmp_path, sinks=[recorder], tensor_every=1)
    fit(library, model, [callback], steps=40)
    assert len(norms) == 20
    assert [r.step for r in recorder.records] == list(range(20))
    assert [r.scalars["grad_norm"] for r in recorder.records] == pytest.approx(norms, rel=1e-5)
    assert {r.scalars["learning_rate"] for r in recorder.records} == {3e-2}


def test_attaches_by_itself_where_a_run_is_named(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORESHOCK_SPOOL", str(tmp_path))
    monkeypatch.delenv("FORESHOCK_RUN", raising=False)
    alone = module(library)
    trainer = fit(library, alone, [])
    assert not any("foreshock" in type(c).__module__ for c in trainer.callbacks)
    monkeypatch.setenv("FORESHOCK_RUN", "zero-code")
    watched = module(library)
    fit(library, watched, [])
    assert watched.losses == alone.losses
    assert [r.scalars["loss"] for r in records_in(tmp_path)] == watched.losses
    assert (tmp_path / "default" / "zero-code").is_dir()


def test_gives_way_to_a_callback_in_code(
    library: Any, tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORESHOCK_SPOOL", str(tmp_path))
    monkeypatch.setenv("FORESHOCK_RUN", "zero-code")
    fit(library, module(library), [callback_of(library, "mine", sinks=[recorder])], steps=3)
    assert len(recorder.records) == 3
    assert [path.name for path in (tmp_path / "default").iterdir()] == ["mine"]


def test_what_nobody_asked_for_does_not_stop_a_fit(
    library: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("FORESHOCK_SPOOL", str(tmp_path))
    monkeypatch.setenv("FORESHOCK_RUN", "zero-code")
    model = module(library, linear=False)
    fit(library, model, [], steps=2)
    assert len(model.losses) == 2
    assert "no linear layer" in caplog.text
    with pytest.raises(ValueError, match="no linear layer"):
        fit(library, module(library, linear=False), [callback_of(library, "mine")])


def test_a_fit_that_raises_leaves_its_records(
    library: Any, tmp_path: Path, recorder: Recorder
) -> None:
    callback = callback_of(library, "l", spool=tmp_path, sinks=[recorder])
    with pytest.raises(RuntimeError, match="out of data"):
        fit(library, module(library, fails_at=20), [callback])
    assert callback.watch is None
    assert [r.step for r in recorder.records] == list(range(20))


def test_run_needs_a_name(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORESHOCK_RUN", raising=False)
    with pytest.raises(ValueError, match="FORESHOCK_RUN"):
        callback_of(library)
