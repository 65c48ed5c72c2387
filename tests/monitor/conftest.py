"""A watch that keeps its records in the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from foreshock.monitor import Watch, watch
from tests.monitor.models import Recorder


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def start(tmp_path: Path, recorder: Recorder) -> Callable[..., Watch]:
    def make(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Watch:
        defaults: dict[str, Any] = {"run": "r", "spool": tmp_path, "tensor_every": 1}
        options = defaults | {"sinks": [recorder]} | options
        return watch(model, optimizer, **options)

    return make
