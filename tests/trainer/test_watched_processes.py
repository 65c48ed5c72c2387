"""A run on two processes is on record once, with the tensors of both."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp2", marks=pytest.mark.long)])
def test_records_of_both_processes_are_one_with_the_sums_of_a_lone_run(
    parallel: str, tmp_path: Path
) -> None:
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    (script := tmp_path / "run.py").write_text(_RUN)
    done = subprocess.run(
        [*launch, "--standalone", str(script), parallel, str(tmp_path)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone = subprocess.run(
        [sys.executable, str(script), parallel, str(tmp_path), "alone"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    both = json.loads((tmp_path / "seen-0.json").read_text())
    assert json.loads((tmp_path / "seen-1.json").read_text()) == {}
    single = json.loads((tmp_path / "seen-alone.json").read_text())
    assert both.keys() == single.keys()
    assert len(single) > 20
    for key, (rms, amax) in single.items():
        found = both[key]
        if key.endswith("grad_output"):
            # Each process's loss is the mean over its half: twice the gradients.
            found = [value / 2 for value in found]
        assert math.isclose(found[0], rms, rel_tol=2e-2), key
        assert math.isclose(found[1], amax, rel_tol=5e-2), key


_RUN = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import pyarrow as pa
import torch
from foreshock.monitor.record import table_to_records
from foreshock.trainer.config import ExecutionConfig, PrecisionConfig
from foreshock.trainer.loop import train
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.watched import watched
torch.set_num_threads(1)
parallel, folder, *alone = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]
seen = {}
def keep(batch):
    for record in table_to_records(pa.Table.from_batches([batch])):
        if record.step == 0:
            for t in record.tensors:
                seen[f"{t.identity.layer} {t.identity.role}"] = [t.rms, t.amax]
config = replace(
    debug_cpu(seed=5), steps=2, tensor_every=1,
    precision=PrecisionConfig(scaling="current"), execution=ExecutionConfig(parallel=parallel),
)
train(config, watch=watched(config, spool=folder / "spool", sinks=[keep]))
name = "alone" if alone else os.environ["RANK"]
(folder / f"seen-{name}.json").write_text(json.dumps(seen))
"""
