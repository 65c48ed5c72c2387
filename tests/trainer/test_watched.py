"""Watched runs: the same losses, every step in the spool, and no word of the fault."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from foreshock.trainer.faults import ScaleFault
from foreshock.trainer.loop import train
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.watched import watched


def test_watching_changes_no_loss_and_tells_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORESHOCK_URL", raising=False)
    config = replace(debug_cpu(), steps=8, fault=ScaleFault(start=4, growth=1.2))
    alone = train(config)
    seen = train(config, watch=watched(config, spool=tmp_path))
    assert [(s.loss, s.grad_norm) for s in seen.steps] == [
        (s.loss, s.grad_norm) for s in alone.steps
    ]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".arrow" for path in files)
    for path in files:
        content = path.read_bytes()
        assert b'"fault"' not in content
        assert b"ScaleFault" not in content
        assert b"growth" not in content
