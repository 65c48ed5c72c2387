"""`foreshock watch` against a real service: one look, lines, a terminal, a service that goes."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from foreshock.api.cli.main import app
from foreshock.monitor import Client
from foreshock.monitor.record import StepRecord, TensorIdentity, TensorStatistics
from tests.api.live_helpers import record, wait_until
from tests.api.service import Service, new_launch

STEPS = 60
LAYERS = ("blocks.0.mlp.up", "blocks.1.mlp.down", "blocks.2.\x1b[31mred")
COMMAND = (sys.executable, "-c", "from foreshock.api.cli.main import run; run()", "watch")


def tensor(layer: str, role: str, headroom: float) -> TensorStatistics:
    identity = TensorIdentity(layer, role, "e4m3")
    return TensorStatistics(
        identity=identity, numel=64, amax=1.0, kurtosis=3.0 - headroom, headroom_log2=headroom
    )


def full(step: int, loss: float) -> StepRecord:
    """The second layer's input is tightest, the third layer's weight next."""
    tensors = (
        tensor(LAYERS[0], "input", 4.0),
        tensor(LAYERS[1], "input", -0.5),
        tensor(LAYERS[2], "weight", 0.25),
    )
    return replace(record(step, loss), tensors=tensors)


class Job:
    """Sends a run step by step."""

    def __init__(self, client: Client, run: str) -> None:
        self._client, self.run, self._launch = client, run, new_launch()
        self._sequence = 0
        client.announce(run, self._launch, layers=LAYERS)

    def send(self, *records: StepRecord) -> None:
        self._client.put_batch(self.run, f"{self._launch}-0-{self._sequence}", records)
        self._sequence += 1
        wait_until(lambda: self._client.risk(self.run).step == records[-1].step, 60)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # The same port after a restart, as a deployed service has.
    made = Service(tmp_path_factory.mktemp("watched"), "--port", str(port))
    made.start()
    yield made
    assert made.stop() == 0, made.log


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.url, project="lab") as made:
        yield made


@pytest.fixture
def lost(client: Client) -> str:
    """A run that was well and lost its loss."""
    if not client.runs(name="lost"):
        job = Job(client, "lost")
        job.send(*(full(step, 4.0 - 0.02 * step) for step in range(STEPS)))
        job.send(full(STEPS, math.nan))
        wait_until(lambda: bool(client.alerts("lost")), 60)
    return "lost"


def watch(service: Service, *arguments: str) -> Result:
    given = ["watch", *arguments, "--url", service.url, "--project", "lab"]
    return CliRunner().invoke(app, given, env={"COLUMNS": "110"})


def test_one_look_shows_what_the_service_knows(service: Service, client: Client, lost: str) -> None:
    result = watch(service, lost, "--once")
    assert result.exit_code == 0, result.output
    rows = {line[:10].strip(): line[11:].rstrip() for line in result.output.splitlines()}
    assert rows["run"].startswith(f"lost · project lab · live · step {STEPS} · heard ")
    number, spark = rows["loss"].split(maxsplit=1)
    assert number == "nan"
    assert (spark[0], spark[-1], spark[-2]) == ("█", "\u00d7", "▁")
    alert = client.alerts("lost")[0]
    assert rows["alarm"].startswith("firing: detection")
    assert rows["last alert"].startswith(f"{alert.id} firing since step {STEPS}: ")
    assert f"do: {alert.causes[0].remedy}"[:60] in result.output
    risk = client.risk("lost")
    assert risk.probability[10] is not None
    assert rows["risk"].split()[:3] == ["10", "steps", f"{risk.probability[10]:.1%}"]


def test_the_worst_layer_is_the_stores_and_cannot_paint_the_terminal(
    service: Service, lost: str
) -> None:
    output = watch(service, lost, "--once").output
    assert re.search(r"headroom_log2 +-0\.5  input of blocks\.1\.mlp\.down", output)
    assert re.search(r"kurtosis +3\.5  input of blocks\.1\.mlp\.down", output)
    assert "\x1b" not in output


def test_json_is_the_apis_answer(service: Service, client: Client, lost: str) -> None:
    body = json.loads(watch(service, lost, "--once", "--json").output)
    risk = client.risk("lost")
    assert body["risk"] == {str(h): p for h, p in risk.probability.items()}
    assert (body["step"], body["loss"], body["state"]) == (STEPS, "NaN", "firing")
    assert body["worst"][0]["layer"] == LAYERS[1]
    assert body["alert"]["id"] == client.alerts("lost")[0].id
    assert body["trouble"] is None


def test_a_name_that_is_not_there_brings_those_that_are(service: Service, lost: str) -> None:
    result = watch(service, "lots", "--once")
    assert result.exit_code == 2
    assert "no run lots in project lab; there are: lost" in result.stderr


def test_nobody_there(tmp_path: Path) -> None:
    given = ["watch", "llama", "--once", "--url", "http://127.0.0.1:9"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    assert "does not answer" in result.stderr


def test_a_run_without_any_record(service: Service, client: Client) -> None:
    client.announce("bare", new_launch())
    result = watch(service, "bare", "--once")
    assert result.exit_code == 0
    assert "no record yet" in result.output
    reasons = client.risk("bare").reasons
    assert f"1000 steps       -  {reasons[1000]}"[:80] in result.output
    assert "none so far" in result.output


@dataclass
class Program:
    """A running `foreshock watch`, and what it wrote so far."""

    process: subprocess.Popen[bytes]
    output: int
    text: str = ""

    def read_until(self, found: Callable[[str], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not found(self.text):
            assert time.monotonic() < deadline, self.text
            if select.select([self.output], [], [], 0.2)[0]:
                try:
                    piece = os.read(self.output, 65536)
                except OSError:  # a terminal whose program has ended
                    piece = b""
                assert piece, self.text
                self.text += piece.decode()


@contextmanager
def started(service: Service, run: str, *, terminal: bool) -> Iterator[Program]:
    given = [*COMMAND, run, "--url", service.url, "--project", "lab", "--interval", "0.2"]
    theirs, ours = pty.openpty() if terminal else os.pipe()[::-1]
    if terminal:
        theirs, ours = ours, theirs
    environment = os.environ | {"COLUMNS": "110", "LINES": "40", "TERM": "xterm"}
    process = subprocess.Popen(
        given,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        env=environment,
        # A shell starts what runs in its background deaf to Ctrl-C, and programs inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    try:
        yield Program(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_lines_for_a_pipe_go_on_when_the_service_does(service: Service, client: Client) -> None:
    job = Job(client, "followed")
    job.send(*(full(step, 4.0 - 0.02 * step) for step in range(STEPS)))
    with started(service, "followed", terminal=False) as program:
        program.read_until(lambda text: f"step {STEPS - 1} | loss 2.82" in text)
        job.send(full(STEPS, math.inf))
        program.read_until(lambda text: f"step {STEPS} | loss inf" in text and "do: " in text)
        service.kill()
        program.read_until(lambda text: "no answer since " in text)
        service.start()
        program.read_until(lambda text: "the service answers again" in text)
        client.end("followed")
        program.read_until(lambda text: "the run is finished" in text)
        assert program.process.wait(60) == 0
    assert program.text.count("no answer since") == 1
    assert "\x1b" not in program.text


def test_a_terminal_is_drawn_over_until_ctrl_c(service: Service, client: Client) -> None:
    job = Job(client, "drawn")
    job.send(full(0, 4.0))
    with started(service, "drawn", terminal=True) as program:
        program.read_until(lambda text: "drawn · project lab · live · step 0" in text)
        job.send(full(1, 3.9))
        program.read_until(lambda text: "step 1 " in text)
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(60) == 0
    assert "\x1b[" in program.text  # the cursor goes back up: a frame replaces the one before


def test_a_deleted_run_is_said_to_be_deleted(service: Service, client: Client) -> None:
    Job(client, "short").send(full(0, 4.0))
    with started(service, "short", terminal=False) as program:
        program.read_until(lambda text: "step 0" in text)
        client.delete("short")
        assert program.process.wait(60) == 2
