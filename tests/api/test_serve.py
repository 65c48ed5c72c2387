"""The process: what it refuses at start, its token, and how it stops."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.api.service import Service, make_records, new_launch, post_run, put_records

TOKEN = "a-token-that-is-long-enough"


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from foreshock.api.cli.main import run; run()", "serve"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)


def test_an_open_address_without_a_token_is_refused(tmp_path: Path) -> None:
    done = serve("--host", "0.0.0.0", "--data", str(tmp_path / "data"))
    assert done.returncode == 2
    assert "FORESHOCK_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = serve("--port", str(taken.getsockname()[1]), "--data", str(tmp_path / "data"))
    assert done.returncode == 2
    assert "cannot listen" in done.stderr


def test_a_folder_in_use_is_told(served: Service) -> None:
    done = serve("--port", "0", "--data", str(served.data))
    assert done.returncode == 2
    assert "another foreshock" in done.stderr
    with served.client() as client:
        assert client.get("/readyz").status_code == 200


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Service:
    made = Service(
        tmp_path_factory.mktemp("locked"),
        "--host",
        "0.0.0.0",
        environment={"FORESHOCK_TOKEN": TOKEN},
    )
    made.start()
    return made


def test_the_token_opens_and_nothing_else_does(locked: Service) -> None:
    with locked.client() as client:
        for path in ("/healthz", "/readyz", "/"):
            assert client.get(path).status_code == 200, path
        for path in ("/api/v1/runs", "/metrics", "/api/v1/openapi.json", "/nowhere"):
            refused = client.get(path)
            assert refused.status_code == 401, path
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.headers["content-type"] == "application/problem+json"
        for header in (f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer", "Bearer \xff"):
            headers = {b"Authorization": header.encode("latin-1")}
            assert client.get("/api/v1/runs", headers=headers).status_code == 401, header
        # A cookie names a session; it never is the token.
        cookie = {"Cookie": f"foreshock_session={TOKEN}"}
        assert client.get("/api/v1/runs", headers=cookie).status_code == 401
    with locked.client(TOKEN) as client:
        assert client.get("/api/v1/runs").status_code == 200
        # With a token any name will do: it may be published under many.
        assert client.get("/api/v1/runs", headers={"Host": "fp8.example"}).status_code == 200
        launch = new_launch()
        run = post_run(client, "locked", launch)["run_id"]
        assert put_records(client, run, launch, 1, make_records(0, 2)).status_code == 201
    assert locked.stop() == 0
    assert TOKEN not in locked.log
    assert "listening on http://0.0.0.0:" in locked.log


def test_being_told_to_stop_finishes_what_is_queued(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.start()
    launches = [new_launch() for _ in range(3)]
    with service.client() as client:
        runs = [post_run(client, f"r{i}", launch)["run_id"] for i, launch in enumerate(launches)]
    acknowledged = [0] * len(launches)

    def send(index: int) -> None:
        with service.client() as client:
            for sequence in range(10_000):
                records = make_records(4 * sequence, 4)
                try:
                    answer = put_records(client, runs[index], launches[index], sequence, records)
                except httpx.TransportError:
                    return
                if answer.status_code != 201:
                    return
                acknowledged[index] += 1

    threads = [threading.Thread(target=send, args=(i,)) for i in range(len(launches))]
    for thread in threads:
        thread.start()
    time.sleep(1)
    assert service.stop() == 0, service.log
    for thread in threads:
        thread.join(30)
    assert min(acknowledged) > 0
    assert "Traceback" not in service.log
    service.start()
    with service.client() as client:
        for run, count in zip(runs, acknowledged, strict=True):
            series = client.get(f"/api/v1/runs/{run}/series?name=loss&points=20000").json()
            # The last batch may be durable with its answer lost on the way.
            assert len(series["step"]) in (4 * count, 4 * count + 4)
    assert service.stop() == 0


def test_a_second_signal_is_no_harm(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.start()
    assert service._process is not None
    service._process.send_signal(signal.SIGINT)
    assert service.stop() == 0


def test_a_service_over_sqlite_does_everything_and_loads_no_clickhouse(tmp_path: Path) -> None:
    service = Service(tmp_path, "--store", f"sqlite://{tmp_path}/facts.sqlite")
    service.start()
    launch = new_launch()
    with service.client() as client:
        run_id = post_run(client, "small", launch)["run_id"]
        assert put_records(client, run_id, launch, 0, make_records(0, 20)).status_code == 201
        assert put_records(client, run_id, launch, 0, make_records(0, 20)).status_code == 200
        for path in ("/series?name=loss", "/heatmap?statistic=amax", "/records", ""):
            assert client.get(f"/api/v1/runs/{run_id}{path}").status_code == 200
        loss = client.get(f"/api/v1/runs/{run_id}/series", params={"name": "loss"}).json()
        assert loss["mean"] == [float(step) for step in range(20)]
        deadline = time.monotonic() + 60
        while client.get(f"/api/v1/runs/{run_id}/risk").json()["step"] != 19:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        mapped = Path(f"/proc/{service.pid}/maps").read_text()
    assert "_chdb" not in mapped
    assert not (service.data / "store").exists()
    assert service.stop() == 0, service.log
