"""`foreshock train`: its recipes, its machine output, its refusals, its view of the risk."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from foreshock.api.cli.main import app
from foreshock.api.cli.train import RiskPoller
from foreshock.api.cli.train_config import run_config
from foreshock.trainer.recipes import RECIPES


def _train(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments], catch_exceptions=False)


def test_help_lists_the_recipes() -> None:
    text = _train("--help").output
    assert all(name in text for name in RECIPES)


def test_unknown_recipe_names_the_nearest() -> None:
    result = _train("lama_cpu")
    assert result.exit_code == 2
    assert "no recipe 'lama_cpu'" in result.output
    assert "Did you mean llama_cpu?" in result.output


def test_json_gives_a_line_per_step_and_the_outcome(tmp_path: Path) -> None:
    result = _train("debug_cpu", "--json", "--no-watch", "--steps", "5", "--seed", "3")
    assert result.exit_code == 0
    lines = [json.loads(line) for line in result.output.strip().splitlines()]
    assert [line["step"] for line in lines[:-1]] == list(range(5))
    assert lines[-1]["ended"] == "finished"
    assert lines[-1]["run"] == "debug-cpu-3"
    assert lines[-1]["loss"] == lines[-2]["loss"]


def test_checkpoints_resume(tmp_path: Path) -> None:
    options = ("debug_cpu", "--json", "--no-watch", "--checkpoints", str(tmp_path))
    _train(*options)
    again = _train(*options, "--resume")
    assert json.loads(again.output)["steps"] == 0


def test_bad_requests_end_with_one_clear_line(tmp_path: Path) -> None:
    cases = {
        "data.folder": ("debug_cpu", "--no-watch", "--data", str(tmp_path / "none")),
        "--resume needs --checkpoints": ("debug_cpu", "--no-watch", "--resume"),
    }
    for expected, arguments in cases.items():
        result = _train(*arguments)
        assert result.exit_code == 2
        assert expected in result.output
        assert len(result.output.strip().splitlines()) == 1


@pytest.fixture
def service() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"probability": {"10": 0.02, "100": 0.31, "1000": null}}'
            found = self.path == "/api/v1/runs/a-run/risk"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(body if found else b"no such run")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_risk_is_read_in_the_background(service: str) -> None:
    poller = RiskPoller(service, "a-run", seconds=0.01)
    waited = threading.Event()
    for _ in range(500):
        if poller.latest or waited.wait(0.01):
            break
    poller.close()
    assert poller.text() == "10: 2%  100: 31%"


def test_risk_of_an_unknown_run_or_dead_service_is_a_dash(service: str) -> None:
    pollers = [
        RiskPoller(service, "other", seconds=0.01),
        RiskPoller("http://127.0.0.1:9", "a-run", seconds=0.01),
    ]
    threading.Event().wait(0.3)
    for poller in pollers:
        poller.close()
        assert poller.text() == "-"


def test_settings_come_from_recipe_file_and_command_line_in_this_order(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("steps = 3\n[optimizer]\nlearning_rate = 1e-3\nbeta2 = 0.9\n")
    config = run_config(
        "debug_cpu", file=file, assignments=["optimizer.learning_rate=3e-3", "model.width=16"]
    )
    assert (config.steps, config.optimizer.beta2) == (3, 0.9)
    assert (config.optimizer.learning_rate, config.model.width) == (3e-3, 16)
    assert config.model.layers == RECIPES["debug_cpu"](0).model.layers
    told = run_config("debug_cpu", data=tmp_path, assignments=["data.source=tokens"])
    assert (told.data.source, told.data.folder) == ("tokens", str(tmp_path))
    alone = tmp_path / "run.json"
    alone.write_text(json.dumps(config.as_dict()))
    assert run_config(None, file=alone) == config


def test_fields_show_the_values_of_a_recipe_and_the_list_every_recipe() -> None:
    text = _train("debug_cpu", "--fields", "--set", "optimizer.learning_rate=0.5").output
    assert "optimizer.learning_rate = 0.5\n    Highest of the schedule. (number)" in text
    assert "model.width = 32" in text
    listed = _train("--list").output.splitlines()
    assert [line.split()[0] for line in listed] == list(RECIPES)
    assert all(len(line.split()) > 3 for line in listed)


def test_a_setting_that_does_not_exist_or_is_not_allowed_ends_with_one_line() -> None:
    for assignment, expected in {
        "model.witdh=3": "Did you mean model.width?",
        "model.width=wide": "model.width is 'wide'; allowed: whole number",
        "optimizer.learning_rate=-1": "learning_rate is -1.0; allowed: above 0",
    }.items():
        result = _train("debug_cpu", "--no-watch", "--set", assignment)
        assert result.exit_code == 2
        assert expected in result.output


def test_tensorboard_has_every_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ("--json", "--no-watch", "--steps", "3", "--tensorboard", str(tmp_path))
    lines = [json.loads(line) for line in _train("debug_cpu", *options).output.splitlines()]
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("loss/train")
    assert [event.step for event in found] == [0, 1, 2]
    assert [event.value for event in found] == pytest.approx([x["loss"] for x in lines[:3]])


def test_a_guard_is_told_by_yaml_and_leaves_a_healthy_run_alone(tmp_path: Path) -> None:
    plain = _train("debug_cpu", "--json", "--no-watch")
    policy = tmp_path / "policy.yaml"
    policy.write_text("advise: false\nsnapshot_every: 5\n")
    spool = ("--spool", str(tmp_path / "spool"))
    guarded = _train("debug_cpu", "--json", *spool, "--guard", str(policy))
    losses = [
        [json.loads(line).get("loss") for line in r.output.splitlines() if line.startswith("{")]
        for r in (plain, guarded)
    ]
    assert losses[0] == losses[1]


def test_a_guard_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("rate_facto: 0.5\n")
    result = _train("debug_cpu", "--guard", str(policy))
    assert result.exit_code == 2
    assert "did you mean rate_factor" in result.output
    assert "--no-watch" in _train("debug_cpu", "--no-watch", "--guard", "default").output
