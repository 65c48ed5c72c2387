"""`foreshock demo`: a run that goes bad and its healthy twin, watched end to end on this machine.

Everything is the real thing in processes of its own: service, alert receiver, two trainings. The
demonstration itself only looks: at the service's API, and at what the receiver got.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import httpx
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from foreshock.api.cli import extras
from foreshock.api.cli.processes import ChildFailed, Children

if TYPE_CHECKING:
    from foreshock.api.cli.demo_outcome import Outcome

__all__ = ["register"]

_COMMAND: Final = ("-c", "from foreshock.api.cli.main import run; run()")
_START_SECONDS: Final = 60.0
_SETTLE_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.5
_SHOWN_HORIZONS: Final = ("10", "100")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    seed: Annotated[int, typer.Option(min=0, help="Weights, data, when and how it breaks.")] = 7,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0: any free.")] = 0,
    data: Annotated[Path | None, typer.Option(help="Keep the store in this new folder.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Serve on until Ctrl-C.")] = False,
) -> None:
    """Train a run that diverges and its healthy twin; see the risk rise before the loss does.

    The last line is for scripts. Exit code 0; 1 when there was no onset or no alarm; 2 when the
    demonstration could not be run.
    """
    extras.require("trainer", "api")
    console = Console()
    with tempfile.TemporaryDirectory(prefix="foreshock-demo-") as scratch:
        folder = data or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with Children(folder) as children:
                stage = _Stage.build(children, folder, port, console)
                result = _perform(stage, seed, console)
                if keep:
                    console.print(f"The page stays at {stage.url} until Ctrl-C.")
                    _wait_for_interrupt()
        except (ChildFailed, httpx.HTTPError, ValueError) as error:
            typer.echo(f"demo: {error}", err=True)
            raise typer.Exit(2) from None
    typer.echo(result.line())
    raise typer.Exit(0 if result.complete else 1)


@dataclass(frozen=True, slots=True)
class _Stage:
    """What stands before the trainings start."""

    children: Children
    folder: Path
    url: str
    api: httpx.Client
    log: Path

    @classmethod
    def build(cls, children: Children, folder: Path, port: int, console: Console) -> _Stage:
        log, receiver = folder / "received.jsonl", folder / "receiver.port"
        served = folder / "service.port"
        children.start(
            "receiver",
            ("-m", "foreshock.api.cli.receiver", "--log", str(log), "--port-file", str(receiver)),
        )
        hook = children.wait_for_file("receiver", receiver, _START_SECONDS)
        listen = ("--port", str(port), "--port-file", str(served))
        alerts = ("--alert-url", f"json://127.0.0.1:{hook}/alerts")
        store = ("--data", str(folder / "store"))
        children.start("service", (*_COMMAND, "serve", *listen, *alerts, *store))
        number = children.wait_for_file("service", served, _START_SECONDS)
        url = f"http://127.0.0.1:{number}"
        console.print(f"Live page: [bold]{url}/[/bold]")
        return cls(children, folder, url, httpx.Client(base_url=f"{url}/api/v1", timeout=10), log)

    def train(self, name: str, recipe: str, seed: int) -> None:
        """Start one training on one core."""
        run = ("train", recipe, "--seed", str(seed), "--name", name, "--json")
        sent = ("--url", self.url, "--spool", str(self.folder / "spool"))
        self.children.start(name, (*_COMMAND, *run, *sent), {"OMP_NUM_THREADS": "1"})

    def get(self, path: str, **query: str | int) -> Any:
        """A JSON answer of the service."""
        answer = self.api.get(path, params=query)
        answer.raise_for_status()
        return answer.json()


def _perform(stage: _Stage, seed: int, console: Console) -> Outcome:
    """Train both runs, watch them, and judge what was stored."""
    from foreshock.trainer.recipes import demo as demo_runs

    failing, healthy = demo_runs(seed)
    _refuse_if_fitted(failing.fingerprint(), healthy.fingerprint())
    if failing.fault is None:
        raise ValueError("the demonstration's recipe holds no fault")
    fault_step = failing.fault.start
    console.print(f"{failing.name} breaks at step {fault_step}; {healthy.name} does not.")
    names = (failing.name, healthy.name)
    stage.train(names[0], "demo_failing", seed)
    stage.train(names[1], "demo_healthy", seed)
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        _watch(stage, names, lambda: live.update(_picture(stage, names)))
    return _judge(stage, seed, fault_step, names)


def _refuse_if_fitted(*fingerprints: str) -> None:
    """A demonstration on runs that the forecaster was fitted on would show nothing."""
    from foreshock.api.artifact import load_shipped

    artifact = load_shipped()
    if artifact is not None and any(artifact.trained_on(known) for known in fingerprints):
        raise ValueError("this run is in the forecaster's fitting set; take another seed")


def _watch(stage: _Stage, names: Sequence[str], show: Callable[[], None]) -> None:
    """Until both trainings have ended and the service has scored their last step."""
    while any(stage.children.running(name) for name in names):
        if not stage.children.running("service"):
            raise ChildFailed(f"the service ended:\n{stage.children.tail('service')}")
        show()
        time.sleep(_POLL_SECONDS)
    for name in names:
        if stage.children.exit_code(name) not in (0, 1):  # 1: the loss stayed non-finite
            raise ChildFailed(f"training {name} failed:\n{stage.children.tail(name)}")
    deadline = time.monotonic() + _SETTLE_SECONDS
    while not all(_settled(stage, name) for name in names):
        if time.monotonic() > deadline:
            raise ChildFailed("the service did not score every step in time")
        show()
        time.sleep(_POLL_SECONDS)


def _settled(stage: _Stage, name: str) -> bool:
    run, risk = stage.api.get(f"/runs/{name}"), stage.api.get(f"/runs/{name}/risk")
    if run.status_code != httpx.codes.OK or risk.status_code != httpx.codes.OK:
        return False
    if risk.json()["step"] != run.json()["last_step"]:
        return False
    alerts = stage.get("/alerts", run=name)["alerts"]
    return all(d["delivered_at"] or d["abandoned"] for a in alerts for d in a["deliveries"])


def _picture(stage: _Stage, names: Sequence[str]) -> Table:
    table = Table(expand=False)
    for heading in ("run", "step", "loss", *(f"risk {h}" for h in _SHOWN_HORIZONS), "alert"):
        table.add_column(heading, justify="left" if heading in ("run", "alert") else "right")
    rows = {run["run"]: run for run in stage.get("/runs")["runs"]}
    for name in names:
        table.add_row(name, *_cells(rows.get(name)))
    return table


def _cells(run: Mapping[str, Any] | None) -> list[str]:
    if run is None:
        return ["starting", *[""] * (2 + len(_SHOWN_HORIZONS))]
    risk = run.get("risk") or {}
    shown = [_number(risk.get(h), ".1%") for h in _SHOWN_HORIZONS]
    return [str(run["last_step"]), _number(run.get("loss"), ".3f"), *shown, str(run["state"])]


def _number(value: object, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) if isinstance(value, int | float) else str(value)


def _judge(stage: _Stage, seed: int, fault_step: int, names: Sequence[str]) -> Outcome:
    from foreshock.api.cli.demo_outcome import outcome
    from foreshock.api.cli.receiver import received
    from foreshock.monitor.record import decode_number

    series = stage.get(f"/runs/{names[0]}/series", name="loss", points=10_000)
    losses = [decode_number(value, "loss") for value in series["mean"]]
    known = [(s, v) for s, v in zip(series["step"], losses, strict=True) if v is not None]
    return outcome(
        seed=seed,
        fault_step=fault_step,
        steps=[step for step, _ in known],
        losses=[loss for _, loss in known],
        alerts=stage.get("/alerts", run=names[0])["alerts"],
        twin_alerts=stage.get("/alerts", run=names[1])["alerts"],
        received=[str(body) for body in received(stage.log)],
    )


def _wait_for_interrupt() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return
