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
