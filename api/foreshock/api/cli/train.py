"""`foreshock train RECIPE`: one run, watched, with its loss and its risk on a progress bar.

The risk is read beside the training and never waited for; without a service the bar shows none.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import httpx
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foreshock.api.cli import extras
from foreshock.api.cli.train_config import field_lines, recipe_lines, run_config
from foreshock.api.cli.train_guard import make_guarded
from foreshock.monitor.record import encode_number
from foreshock.trainer.recipes import RECIPES

if TYPE_CHECKING:
    from foreshock.trainer.config import RunConfig
    from foreshock.trainer.loop import RunResult, StepResult

__all__ = ["RiskPoller", "register"]

_POLL_SECONDS = 2.0


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train", help=_HELP)(train)


_HELP = f"""Train a small language model in emulated FP8 on this machine, watched.

Recipes: {", ".join(RECIPES)}.

Any setting can be changed: --set optimizer.learning_rate=3e-3 --set model.width=128. --fields
explains them all, --list the recipes; --from-config takes a JSON or TOML file of settings.

Exit code 0 when the run finishes or is stopped (Ctrl-C, with a checkpoint if --checkpoints is
given), 1 when its loss stays non-finite.
"""


def train(
    recipe: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(RECIPES)}.", show_default=False)
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a setting.")
    ] = None,
    from_config: Annotated[Path | None, typer.Option(help="JSON or TOML of settings.")] = None,
    fields: Annotated[
        bool, typer.Option("--fields", help="Explain every setting, with its value here.")
    ] = False,
    recipes: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of weights and data order; default 0.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Run name; default: recipe and seed.")] = None,
    url: Annotated[
        str | None, typer.Option(envvar="FORESHOCK_URL", help="Service; none: spool only.")
    ] = None,
    spool: Annotated[Path | None, typer.Option(help="Folder for records not yet sent.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of text to train on.")] = None,
    checkpoints: Annotated[Path | None, typer.Option(help="Folder for checkpoints.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    watched: Annotated[bool, typer.Option("--watch/--no-watch", help="Monitor the run.")] = True,
    guard: Annotated[
        str | None,
        typer.Option(metavar="POLICY", help="Act on the risk: default, or a YAML of a policy."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line per step.")] = False,
) -> None:
    """Train one recipe; see `_HELP`."""
    if recipes:
        _print(recipe_lines())
        return
    try:
        config = None
        if recipe or from_config or not fields:
            config = run_config(
                recipe,
                file=from_config,
                assignments=assignments or (),
                steps=steps,
                seed=seed,
                name=name,
                data=data,
            )
    except ValueError as error:
        _fail(str(error))
    if fields or config is None:
        _print(field_lines(config))
        return
    extras.require("trainer")
    if resume and checkpoints is None:
        _fail("--resume needs --checkpoints FOLDER")
    if guard is not None and not watched:
        _fail("--guard acts on what is watched; leave out --no-watch")
    how = _How(
        url=url,
        spool=spool,
        checkpoints=checkpoints,
        resume=resume,
        watched=watched,
        as_json=as_json,
        tensorboard=tensorboard,
        guard=guard,
    )
    result = _trained(config, how)
    if _first():
        _summarise(result, as_json=as_json)
    raise typer.Exit(1 if result.ended == "nonfinite" else 0)


def _first() -> bool:
    """Whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """What the options say of anything but the run itself."""

    url: str | None
    spool: Path | None
    checkpoints: Path | None
    resume: bool
    watched: bool
    as_json: bool
    tensorboard: Path | None
    guard: str | None


def _trained(config: RunConfig, how: _How) -> RunResult:
    from foreshock.trainer.data import corpus_of
    from foreshock.trainer.loop import CheckpointPolicy
    from foreshock.trainer.loop import train as train_run
    from foreshock.trainer.watched import watched as make_watch

    try:
        corpus = corpus_of(config.data)
        guarded = make_guarded(how.guard) if how.guard is not None else None
    except ValueError as error:
        _fail(str(error))
    folder, url = how.checkpoints, how.url
    policy = CheckpointPolicy(folder=folder, resume=how.resume) if folder else None
    sinks = [guarded.sink] if guarded else []
    factory = make_watch(config, url=url, spool=how.spool, sinks=sinks) if how.watched else None
    poller = RiskPoller(url, config.name) if url and how.watched else None
    try:
        with (
            _reporter(config, poller, as_json=how.as_json) as report,
            _logged(how.tensorboard, report) as on_step,
            _stop_on_interrupt() as stop,
        ):
            return train_run(
                config,
                watch=factory,
                on_step=on_step,
                stop=stop.is_set,
                checkpoints=policy,
                corpus=corpus,
                overseer=guarded,
            )
    except ValueError as error:
        _fail(str(error))
    finally:
        if poller:
            poller.close()


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)


@contextmanager
def _logged(
    folder: Path | None, report: Callable[[StepResult], None]
) -> Iterator[Callable[[StepResult], None]]:
    """What reports a step, and writes it for TensorBoard if there is a folder for that."""
    if folder is None or not _first():
        yield report
        return
    from foreshock.trainer.tensorboard import TensorboardLog

    log = TensorboardLog(folder)

    def both(step: StepResult) -> None:
        report(step)
        log(step)

    try:
        yield both
    finally:
        log.close()


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(2)


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C ends the run after its current step; a second one ends it at once."""
    asked = threading.Event()

    def ask(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


class RiskPoller:
    """Reads a run's risk from the service in a thread of its own; keeps the latest answer.

    Args:
        url: Of the service.
        run: Run name.
        seconds: Between two questions.
    """

    def __init__(self, url: str, run: str, seconds: float = _POLL_SECONDS) -> None:
        self.latest: dict[str, float | None] = {}
        self._address = f"{url.rstrip('/')}/api/v1/runs/{run}/risk"
        self._seconds = seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="foreshock-risk", daemon=True)
        self._thread.start()

    def text(self) -> str:
        """Such as `10: 2%  100: 31%`; a dash while nothing is known."""
        known = [f"{h}: {p:.0%}" for h, p in self.latest.items() if p is not None]
        return "  ".join(known) or "-"

    def close(self) -> None:
        """Stop asking; does not wait for an answer under way."""
        self._closed.set()

    def _poll(self) -> None:
        with httpx.Client(timeout=5.0) as client:
            while not self._closed.wait(self._seconds):
                self.latest = self._ask(client) or self.latest

    def _ask(self, client: httpx.Client) -> dict[str, float | None] | None:
        try:
            answer = client.get(self._address)
            body = answer.json() if answer.is_success else None
        except (httpx.HTTPError, ValueError):
            return None
        horizons = body.get("probability") if isinstance(body, dict) else None
        if not isinstance(horizons, dict):
            return None
        return {str(h): p if isinstance(p, float | int) else None for h, p in horizons.items()}


@contextmanager
def _reporter(
    config: RunConfig, poller: RiskPoller | None, *, as_json: bool
) -> Iterator[Callable[[StepResult], None]]:
    """What is called after every step: JSON lines, or a progress bar; of several processes one."""
    if not _first():
        yield lambda step: None
        return
    if as_json:
        yield _print_json
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
        TextColumn("risk {task.fields[risk]}"),
        TimeRemainingColumn(),
    )
    per_step = config.data.batch_size * config.data.sequence_length
    with Progress(*columns) as progress:
        task = progress.add_task(config.name, total=config.steps, loss="-", speed="-", risk="-")

        def show(step: StepResult) -> None:
            progress.update(
                task,
                completed=step.step + 1,
                loss=f"{step.loss:.3f}",
                speed=f"{per_step / step.seconds:,.0f}",
                risk=poller.text() if poller else "-",
            )

        yield show


def _print_json(step: StepResult) -> None:
    values = {
        "step": step.step,
        "loss": encode_number(step.loss),
        "grad_norm": encode_number(step.grad_norm),
        "learning_rate": step.learning_rate,
        "tokens": step.tokens,
        "seconds": round(step.seconds, 6),
    }
    if step.eval_loss is not None:
        values["eval_loss"] = encode_number(step.eval_loss)
    if step.cloze is not None:
        values["cloze"] = step.cloze
    typer.echo(json.dumps(values))


def _summarise(result: RunResult, *, as_json: bool) -> None:
    seconds = sum(s.seconds for s in result.steps)
    tokens = result.steps[-1].tokens - result.steps[0].tokens if len(result.steps) > 1 else 0
    loss = result.steps[-1].loss if result.steps else math.nan
    if as_json:
        values = {
            "run": result.config.name,
            "ended": result.ended,
            "steps": len(result.steps),
            "loss": encode_number(loss),
            "seconds": round(seconds, 3),
            "corpus_sha256": result.corpus_sha256,
            "fingerprint": result.config.fingerprint(),
        }
        typer.echo(json.dumps(values))
        return
    speed = f", {tokens / seconds:,.0f} tokens/s" if seconds and tokens else ""
    typer.echo(
        f"{result.config.name}: {result.ended} after {len(result.steps)} steps, "
        f"loss {loss:.4f}{speed}"
    )
