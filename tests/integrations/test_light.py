"""What needs none of the libraries: what is imported, what is missing, Megatron's sink."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

import pytest
import torch

from foreshock.monitor import Watch
from foreshock.monitor.integrations.lightning_factory import (
    lightning_callbacks,
    pytorch_lightning_callbacks,
)
from foreshock.monitor.integrations.megatron import TensorMetricSink
from foreshock.monitor.integrations.optimizers import bare
from tests.monitor.models import Recorder, tiny, train

PACKAGE = "foreshock.monitor.integrations"


def test_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "lightning", "pytorch_lightning", "accelerate", "torchao")
    code = (
        f"import {PACKAGE}, {PACKAGE}.lightning_factory as f, sys;"
        f"sys.exit(f.lightning_callbacks() != [] or any(m in sys.modules for m in {heavy!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("module", "library"),
    [
        ("huggingface", "transformers"),
        ("lightning", "lightning"),
        ("pytorch_lightning", "pytorch_lightning"),
        ("accelerate", "accelerate"),
    ],
)
def test_missing_library_is_named(
    module: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = [library, *(name for name in sys.modules if name.startswith(f"{library}."))]
    for name in blocked:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"{PACKAGE}.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"{module} needs {library}: pip install {library}"):
        importlib.import_module(f"{PACKAGE}.{module}")


def test_installing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORESHOCK_RUN", raising=False)
    assert lightning_callbacks() == pytorch_lightning_callbacks() == []


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_finds_the_factory(namespace: str) -> None:
    found = entry_points(group=f"{namespace}.callbacks_factory", name="foreshock")
    assert {entry.load() for entry in found} <= {lightning_callbacks, pytorch_lightning_callbacks}
    assert len(found) == 1


def test_bare_refuses_what_holds_no_optimizer() -> None:
    with pytest.raises(TypeError, match="a str with no torch"):
        bare("adam")


@dataclass(frozen=True)
class Site:
    name: str


@dataclass(frozen=True)
class Value:
    tensor: torch.Tensor
    sites: Sequence[Site]


@dataclass(frozen=True)
class Result:
    value: Value
    label: object = None


@dataclass(frozen=True)
class Metric:
    name: str


def test_megatron_results_become_scalars(start: Callable[..., Watch], recorder: Recorder) -> None:
    """As Megatron calls its sink: results in a row, before the optimizer's step, from 1."""
    model, optimizer = tiny()
    steps: list[int] = []
    with start(model, optimizer) as w:
        sink = TensorMetricSink(w)

        def commit(*_: object) -> None:
            steps.append(len(steps) + 1)
            value = torch.tensor(float(steps[-1]))
            pair = (Site("a"), Site("b"))
            results = [
                Result(Value(value, (Site("decoder.0"),))),
                Result(Value(value * 2, pair), label="all"),
                Result(Value(value * 3, pair)),
                Result(Value(torch.ones(4), pair), label="histogram"),
            ]
            sink(Metric("layer-param-l2"), results, steps[-1])

        handle = optimizer.register_step_pre_hook(commit)
        train(model, optimizer, steps=20)
        handle.remove()
    assert [record.step for record in recorder.records] == list(range(20))
    for record in recorder.records:
        found = {k: v for k, v in record.scalars.items() if k.startswith("tensor-metrics/")}
        n = float(record.step + 1)
        assert found == {
            "tensor-metrics/layer-param-l2/decoder.0": n,
            "tensor-metrics/layer-param-l2/all": 2 * n,
            "tensor-metrics/layer-param-l2/result-2": 3 * n,
        }
