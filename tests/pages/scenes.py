"""What each page takes for granted: files in its folder, a service, names in its Python.

Made of one short training of the trainer's own, watched into a spool and read back.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from torch.utils.tensorboard.writer import SummaryWriter

from foreshock.monitor import Client
from foreshock.monitor.record import StepRecord, read_stream, table_to_records
from foreshock.trainer.data import load_corpus
from foreshock.trainer.loop import train
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.watched import watched
from tests.api.live_helpers import wait_until
from tests.api.service import new_launch
from tests.pages.blocks import ROOT

__all__ = ["SCENES", "STEPS", "Scene", "Stage"]

STEPS: Final = 60
_COPIES: Final = ("llama-bf16", "llama-fp8", "llama-bf16-b", "llama-bf16-c")

MODEL: Final = """
import torch
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 1))
    def forward(self, batch):
        return (self.body(batch).squeeze(-1) - batch.sum(-1)).square().mean()
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = [torch.randn(8, 16) for _ in range(8)]
"""


@dataclass(frozen=True, slots=True)
class Stage:
    """What all scenes are made of.

    Attributes:
        spool: Of a job that was killed: runs llama-1b (twice), before and after, and the copies.
        records: Of one training.
        service: Address of a service that knows the same runs.
    """

    spool: Path
    records: tuple[StepRecord, ...]
    service: str

    @classmethod
    def build(cls, folder: Path, service: str) -> Stage:
        """Train once, and hand the records over under several names."""
        spool, config = folder / "spool", replace(debug_cpu(), name="llama-1b", steps=STEPS)
        corpus = load_corpus(None)
        for seed in (0, 1):
            one = replace(config, seed=seed)
            train(one, watch=watched(one, spool=spool), corpus=corpus)
        first = min(spool.glob("default/llama-1b/*"), key=lambda path: path.stat().st_mtime)
        for name in (*_COPIES, "before", "after"):
            copy = spool / "default" / name / f"{new_launch()}-0"
            shutil.copytree(first, copy)
            body = json.loads((copy / "run.json").read_text())
            body |= {"run": name, "launch_id": copy.name.removesuffix("-0")}
            (copy / "run.json").write_text(json.dumps(body))
        batches = sorted(first.glob("*.arrow"))
        records = [r for path in batches for r in table_to_records(read_stream(path.read_bytes()))]
        stage = cls(spool, tuple(records), service)
        stage._feed()
        return stage

    def _feed(self) -> None:
        with Client(self.service) as client:
            for name in ("llama-1b", "llama-1b", *_COPIES):
                launch = new_launch()
                layers = [t.identity.layer for t in self.records[0].tensors]
                client.announce(name, launch, layers=list(dict.fromkeys(layers)))
                client.put_batch(name, f"{launch}-0-0", self.records)
            for name in ("llama-1b", *_COPIES):
                wait_until(lambda name=name: client.risk(name).step == STEPS - 1, 120)  # type: ignore[misc]

    def copy_spool(self, folder: Path) -> None:
        """What a killed job left behind."""
        shutil.copytree(self.spool, folder / "foreshock-spool")

    def write_logs(self, folder: Path) -> None:
        """The same losses in the forms that other tools write."""
        losses = [(r.step, r.scalars["loss"], r.scalars["grad_norm"]) for r in self.records]
        for name in ("llama-1b", "run-a", "run-b"):
            (folder / "out" / name).mkdir(parents=True)
            history = [{"step": s + 1, "loss": loss, "grad_norm": g} for s, loss, g in losses]
            state = {"log_history": history, "global_step": len(history), "max_steps": STEPS}
            (folder / "out" / name / "trainer_state.json").write_text(json.dumps(state))
        with SummaryWriter(str(folder / "runs" / "a")) as writer:
            for step, loss, _ in losses:
                writer.add_scalar("train/loss", loss, step)
        lines = [
            f" iteration {s}/{STEPS} | lm loss: {x:.6E} | grad norm: {g}" for s, x, g in losses
        ]
        (folder / "train.log").write_text("\n".join(lines))
        results = [
            f':::MLLOG {{"key": "train_loss", "value": {x}, "metadata": {{"samples_count": {s}}}}}'
            for s, x, _ in losses
        ]
        (folder / "result.txt").write_text("\n".join(results))
        rows = [f"{trial},{s},{x}" for trial in ("trial-6", "trial-7") for s, x, _ in losses]
        (folder / "sweep.csv").write_text("\n".join(["trial,step,loss", *rows]))

    def write_csv(self, folder: Path, step: str, loss: str) -> None:
        """A log with the names of columns that a page speaks of."""
        rows = [f"{record.step},{record.scalars['loss']}" for record in self.records]
        (folder / "loss.csv").write_text("\n".join([f"{step},{loss}", *rows]))


@dataclass(frozen=True, slots=True)
class Scene:
    """One page.

    Attributes:
        prepare: Makes the folder.
        before: Python that the page takes for granted.
        served: Whether the page finds a service rather than starting one.
        other: Address in the page of that service, where it starts one of its own beside it.
        clickhouse: Address in the page of a ClickHouse server.
        stand_in: Shell in place of the page's block that cannot be run.
        default_url: Whether the page's service is at the address that commands take by themselves.
        long: Whether it takes more than some seconds.
    """

    prepare: Callable[[Stage, Path], None] = lambda stage, folder: None
    before: str = ""
    served: bool = False
    other: str = ""
    clickhouse: str = ""
    stand_in: str = ""
    default_url: bool = False
    long: bool = False


def _readme(stage: Stage, folder: Path) -> None:
    stage.copy_spool(folder)
    stage.write_logs(folder)
    stage.write_csv(folder, "step", "loss")


def _spool(stage: Stage, folder: Path) -> None:
    shutil.copytree(stage.spool, folder / "spool")


def _service(stage: Stage, folder: Path) -> None:
    stage.copy_spool(folder)
    stage.write_logs(folder)


def _imports(stage: Stage, folder: Path) -> None:
    _service(stage, folder)
    stage.write_csv(folder, "it", "Train/Loss")


def _compose(stage: Stage, folder: Path) -> None:
    shutil.copy(ROOT / "docker-compose.yml", folder)


def _route(stage: Stage, folder: Path) -> None:
    """The page shows a file of Alertmanager's, which its reader saves."""
    text = (ROOT / "docs/how-to/alert-route.md").read_text()
    (folder / "alertmanager.yml").write_text(text.split("```yaml\n")[1].split("```")[0])


def _study(stage: Stage, folder: Path) -> None:
    """The page shows a run's settings, which its reader saves, and speaks of texts of theirs."""
    text = (ROOT / "docs/how-to/train-and-study.md").read_text()
    (folder / "run.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("What is written down is read again. " * 40)
    rows = [{"prompt": f"{n} and 1?", "response": f"{n + 1}"} for n in range(40)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _certificate(stage: Stage, folder: Path) -> None:
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    made += ["-subj", "/CN=foreshock", "-addext", "subjectAltName=IP:127.0.0.1"]
    made += ["-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(made, cwd=folder, check=True, capture_output=True)
    shutil.copy(folder / "cert.pem", folder / "authority.pem")


SCENES: Final[Mapping[str, Scene]] = {
    "README.md": Scene(_readme, MODEL, long=True),
    "api/README.md": Scene(_service, default_url=True, long=True),
    "monitor/README.md": Scene(before=MODEL),
    "trainer/README.md": Scene(long=True),
    "docs/tutorial.md": Scene(long=True),
    "docs/client.md": Scene(served=True),
    "docs/import-compare.md": Scene(_imports, served=True, long=True),
    "docs/deploy.md": Scene(_compose),
    "docs/security.md": Scene(_certificate, long=True),
    "docs/how-to/docker-compose.md": Scene(
        _compose,
        stand_in="FORESHOCK_TOKEN=$(cut -d = -f 2 .env) foreshock serve --data ./data",
        long=True,
    ),
    "docs/how-to/clickhouse.md": Scene(
        other="old:8420", clickhouse="foreshock:secret@clickhouse:8123", long=True
    ),
    "docs/how-to/alert-route.md": Scene(_route),
    "docs/how-to/act-on-a-risk.md": Scene(served=True),
    "docs/how-to/guard.md": Scene(),
    "docs/how-to/train-and-study.md": Scene(_study, long=True),
    "docs/how-to/heatmap.md": Scene(served=True),
    "docs/how-to/replay.md": Scene(_spool, served=True),
    "docs/how-to/doctor.md": Scene(served=True, long=True),
}
"""Every page that has something to run."""
