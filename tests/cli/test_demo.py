"""The demonstration: what it concludes from what the service holds, and its processes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from foreshock.api.cli.demo_outcome import Outcome, outcome
from foreshock.api.cli.processes import ChildFailed, Children
from foreshock.api.cli.receiver import received

ONSET = 240


def losses(diverges: bool = True) -> list[float]:
    """A learning curve with noise that, if it diverges, rises for good from `ONSET` on."""
    steps = np.arange(400)
    noise = np.random.default_rng(0).normal(0, 0.03, 400)
    curve = 2 + 3.5 * np.exp(-steps / 50) + noise
    if diverges:
        curve = curve + np.where(steps > ONSET, 0.05 * (steps - ONSET), 0)
    return [float(value) for value in curve]


def alert(step: int | None, **members: Any) -> dict[str, Any]:
    cause = {"name": "learning_rate", "layers": ["blocks.1.mlp.up", "a", "b", "c"]}
    return {"run": "demo-7", "fired_step": step, "kind": "forecast", "causes": [cause], **members}


def judge(alerts: list[dict[str, Any]], **changes: Any) -> Outcome:
    values: dict[str, Any] = {
        "seed": 7,
        "fault_step": 200,
        "steps": range(400),
        "losses": losses(),
        "alerts": alerts,
        "twin_alerts": [],
        "received": [],
    }
    return outcome(**(values | changes))


def test_the_line_holds_everything_a_script_reads() -> None:
    found = judge([alert(220)], received=["demo-7 fires at step: 220"])
    assert found.lead is not None
    assert abs(found.lead - (ONSET - 220)) <= 5
    words = dict(part.split("=") for part in found.line().removeprefix("demo: ").split())
    assert list(words) == [
        "seed",
        "fault_step",
        "first_alarm",
        "onset",
        "lead",
        "cause",
        "layers",
        "delivered",
        "healthy_alarms",
    ]
    assert words["first_alarm"] == "220"
    assert words["layers"] == "blocks.1.mlp.up,a,b"
    assert words["delivered"] == "yes"


def test_an_alarm_before_the_fault_is_a_false_one() -> None:
    found = judge([alert(150), alert(230)], twin_alerts=[alert(90)])
    assert found.healthy_alarms == 2
    assert found.first_alarm == 230


def test_pending_alerts_are_no_alarms() -> None:
    found = judge([alert(None)])
    assert not found.complete
    assert found.line().startswith("demo: seed=7 fault_step=200 first_alarm=none onset=")
    assert "lead=none" in found.line()
    assert "delivered=no healthy_alarms=0" in found.line()


def test_no_onset_is_said() -> None:
    found = judge([alert(220)], losses=losses(diverges=False))
    assert found.onset is None
    assert not found.complete


def test_a_late_alarm_has_a_negative_lead() -> None:
    lead = judge([alert(300)]).lead
    assert lead is not None
    assert lead < 0


def test_a_loss_that_ends_in_nan_has_an_onset() -> None:
    values = losses()
    values[300:] = [math.nan] * 100
    assert judge([alert(220)], losses=values).onset is not None


def test_a_message_about_another_alert_is_no_delivery() -> None:
    assert not judge([alert(220)], received=["demo-7-twin, step: 3"]).delivered


def test_the_receiver_keeps_what_it_gets(tmp_path: Path) -> None:
    log, port = tmp_path / "log", tmp_path / "port"
    arguments = ("--log", str(log), "--port-file", str(port))
    with Children(tmp_path) as children:
        children.start("receiver", ("-m", "foreshock.api.cli.receiver", *arguments))
        address = f"http://127.0.0.1:{children.wait_for_file('receiver', port, 60)}/"
        assert httpx.post(address, json={"title": "one"}).status_code == 200
        assert httpx.post(address, content=b"not JSON").status_code == 400
        assert httpx.post(address, json={"title": "two"}).status_code == 200
        assert received(log) == [{"title": "one"}, {"title": "two"}]
    assert not children.running("receiver")


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        children.start("short", ("-c", "import sys; sys.exit('no such thing')"))
        with pytest.raises(ChildFailed, match="no such thing"):
            children.wait_for_file("short", tmp_path / "never", 60)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [7, 1001, 1002])
def test_the_demonstration_itself(seed: int, tmp_path: Path) -> None:
    """The risk rises before the loss, the alert arrives, the twin stays quiet."""
    log = tmp_path / "demo.log"
    with Children(tmp_path) as children:
        command = "from foreshock.api.cli.main import run; run()"
        children.start("demo", ("-c", command, "demo", "--seed", str(seed)))
        while children.running("demo"):
            children.sleep()
        assert children.exit_code("demo") == 0, log.read_text()
    last = log.read_text().strip().splitlines()[-1]
    pattern = r"demo: seed=(\d+) fault_step=(\d+) first_alarm=(\d+) onset=(\d+) lead=(-?\d+) .*"
    match = re.fullmatch(pattern, last)
    assert match, last
    fault, alarm, onset, lead = (int(match[i]) for i in range(2, 6))
    assert fault <= alarm < onset
    assert lead == onset - alarm
    assert "delivered=yes" in last
    assert last.endswith("healthy_alarms=0")
