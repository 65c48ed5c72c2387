"""foreshock compare: runs of a service, spools, files and logs; an FP8 run and its twins."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from foreshock.api.cli.main import app
from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.data import load_corpus
from foreshock.trainer.faults import ScaleFault
from foreshock.trainer.loop import train
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.watched import watched
from tests.api.service import Service, new_launch

CHANGE = 60


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of the trainer: BF16, its FP8 twin, and an FP8 twin whose scales run away."""
    root = tmp_path_factory.mktemp("spool")
    base = replace(debug_cpu(), steps=90, tensor_every=2)
    bf16 = replace(base, name="bf16", precision=PrecisionConfig(backend="bf16"))
    fp8 = replace(base, name="fp8")
    broken = replace(base, name="broken", fault=ScaleFault(start=CHANGE, growth=1.5))
    corpus = load_corpus(None)
    for config in (bf16, fp8, broken):
        train(config, watch=watched(config, spool=root), corpus=corpus)
    return root


def test_an_fp8_run_and_its_twins(spool: Path, tmp_path: Path) -> None:
    equal = compare(f"{spool}@bf16", f"{spool}@fp8")
    assert (equal.exit_code, "does not part" in equal.output) == (0, True)
    target = tmp_path / "partings.parquet"
    found = compare(f"{spool}@fp8", f"{spool}@broken", "--export", target)
    assert found.exit_code == 3, found.output
    first, _, top, *_ = found.output.splitlines()
    assert f"{spool}@broken parts from {spool}@fp8 at step {CHANGE}, in " in first
    assert top.split()[:2] == ["1", str(CHANGE)]
    table = pq.read_table(target).to_pylist()
    assert [row["rank"] for row in table] == list(range(1, len(table) + 1))
    assert table[0]["layer"].startswith("blocks.")
    assert table[0]["statistic"] in first
    assert table[0]["noise_units"] > table[0]["asked_noise_units"]
    # Against the BF16 twin only what both have can be compared.
    other = json.loads(compare(f"{spool}@bf16", f"{spool}@broken", "--json").output)
    assert other["parted"]
    assert abs(other["partings"][0]["step"] - CHANGE) <= 5
    assert other["only_b"] > 0


def test_runs_and_attempts_of_a_service(served: Service, tmp_path: Path) -> None:
    name = f"compared-{new_launch()[:8]}"
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.05, 400)
    rows = [(s, 3 + noise[s]) for s in range(200)]
    rows += [(s, 3 + noise[s + 200] + (9.0 if s >= 120 else 0.0)) for s in range(50, 200)]
    path = tmp_path / f"{name}.csv"
    path.write_text("step,loss\n" + "".join(f"{s},{v}\n" for s, v in rows))
    url = ("--url", served.url)
    assert CliRunner().invoke(app, ["import", str(path), *url]).exit_code == 0
    for a, b in ((f"{name}@1", f"{name}@2"), (f"{path}@1", f"{name}@2"), (f"{path}@1", path)):
        found = compare(a, b, *url, "--json")
        assert found.exit_code == 3, found.output
        (parting,) = json.loads(found.output)["partings"]
        assert (parting["step"], parting["statistic"]) == (120, "loss")
    assert compare(f"{name}@1", f"{path}@1", *url).exit_code == 0
    absent = compare(f"{name}@7", path, *url)
    assert (absent.exit_code, len(absent.output.strip().splitlines())) == (2, 1)


def test_seeds_exports_and_what_is_not_finite(tmp_path: Path) -> None:
    paths = []
    for seed in range(4):
        random = np.random.default_rng(seed)
        loss = 3 + random.normal(0, 0.05, 100)
        if seed == 3:
            loss[40:] = math.nan
        paths.append(tmp_path / f"{seed}.csv")
        rows = [f"{s},{v}\n" for s, v in enumerate(loss)]
        paths[-1].write_text("step,loss\n" + "".join(rows))
    a, b, c, d = paths
    assert compare(a, b, "--seeds", c).exit_code == 0
    target = tmp_path / "out.csv"
    found = compare(a, d, "--seeds", b, "--seeds", c, "--export", target)
    assert found.exit_code == 3
    assert "at step 40, in loss first: nan against" in found.output
    (row,) = pa_csv.read_csv(target).to_pylist()
    assert (row["step"], row["kind"], row["noise_units"]) == (40, "nonfinite", math.inf)
    (parting,) = json.loads(compare(a, d, "--json").output)["partings"]
    assert (parting["b"], parting["noise_units"]) == ("NaN", "Infinity")


def test_what_cannot_be_compared_is_one_line(
    spool: Path, client: httpx.Client, served: Service, tmp_path: Path
) -> None:
    log = tmp_path / "a.csv"
    log.write_text("step,loss\n1,2\n")
    url = ("--url", served.url)
    for arguments, message in (
        ((log, "absent-run"), "absent-run is no file or folder here"),
        ((log, tmp_path / "absent.csv"), "does not exist"),
        ((spool, log), "name one run as"),
        ((f"{spool}@none", log), "name one run as"),
        ((f"{log}@3", log), "no attempt 3"),
        ((log, log, "--export", tmp_path / "x.docx"), ".csv, .parquet"),
        ((log, log, "--export", tmp_path / "no" / "x.csv"), "no folder"),
        ((log, log, "--map", "loss=x"), "no such name"),
        ((log, log, "--chance", "2"), "between 0 and 1"),
        ((log, "@"), "no name"),
    ):
        done = compare(*arguments, *url)
        assert (done.exit_code, len(done.output.strip().splitlines())) == (2, 1), done.output
        assert message in done.output
    dead = compare(log, "x", "--url", "http://127.0.0.1:9")
    assert (dead.exit_code, "does not answer" in dead.output) == (2, True)
