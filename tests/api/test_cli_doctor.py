"""`foreshock doctor`: what can be wrong is made wrong for real, and is named with a remedy."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from foreshock.api.cli.checkup.disk import check_disk_of, check_spool
from foreshock.api.cli.checkup.findings import Finding
from foreshock.api.cli.checkup.machine import check_machine, judge_torch
from foreshock.api.cli.checkup.service import check_service
from foreshock.api.cli.checkup.serving import check_prometheus, check_serving
from foreshock.api.model_card import SHIPPED
from foreshock.monitor import Client
from foreshock.monitor.record import records_to_table
from foreshock.monitor.spool import Outbox, Spool
from tests.api.service import Service, make_records, new_launch

ROOT = Path(__file__).parents[2]
TOKEN = "a-bootstrap-token-for-tests"
GIBIBYTE = 2**30
WITHOUT_TORCH = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("doctor"), environment={"FORESHOCK_TOKEN": TOKEN})
    made.start()
    yield made
    assert made.stop() == 0, made.log


def secret(service: Service, *scopes: str) -> str:
    with Client(service.url, token=TOKEN) as client:
        made: str = client.create_token("a job", scopes)["secret"]
    return made


def findings_of(check: str, found: Iterable[Finding]) -> list[Finding]:
    chosen = [finding for finding in found if finding.check == check]
    assert all(finding.remedy for finding in chosen if finding.verdict != "ok")
    return chosen


def run(folder: Path, environment: Mapping[str, str], *arguments: str, before: str = "") -> Any:
    """The whole command in a process of its own, as a person would call it."""
    code = f"{before}\nfrom foreshock.api.cli.main import run; run()"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FORESHOCK_")}
    return subprocess.run(
        [sys.executable, "-c", code.strip(), "doctor", *arguments],
        cwd=folder,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_set_up_that_is_well(service: Service, tmp_path: Path) -> None:
    environment = {
        "FORESHOCK_URL": service.url,
        "FORESHOCK_TOKEN": secret(service, "write", "read"),
        "FORESHOCK_SPOOL": str(tmp_path / "spool"),
    }
    done = run(tmp_path, environment, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    body = json.loads(done.stdout)
    assert body["wrong"] == 0
    by_check = {finding["check"]: finding for finding in body["findings"]}
    assert by_check["torch"]["text"].startswith("2.")
    assert by_check["token"]["text"] == "its scopes: read, write"
    assert by_check["service"]["text"] == f"{service.url} is well and ready"
    assert "heads full" in by_check["forecaster"]["text"]
    assert {"python", "fp8", "spool", "clock"} <= by_check.keys()
    # It only looks.
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_told_with_what_to_do_and_by_the_exit_code(
    service: Service, tmp_path: Path
) -> None:
    """Without torch too, as where a service runs; nothing of the secret is shown."""
    environment = {"FORESHOCK_URL": service.url, "FORESHOCK_TOKEN": "not-the-token-at-all"}
    done = run(tmp_path, environment, before=WITHOUT_TORCH)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (wrong,) = (i for i, line in enumerate(lines) if line.startswith("WRONG"))
    assert lines[wrong].split()[1] == "token"
    assert lines[wrong + 1].strip().startswith("do: ")
    assert any(line.startswith("note  torch        not installed") for line in lines)
    assert lines[-1].startswith("1 wrong, ")
    assert "not-the-token-at-all" not in done.stdout + done.stderr


def test_torch_is_never_loaded_into_the_command() -> None:
    code = (
        "import sys; from foreshock.api.cli.checkup.machine import check_machine;"
        "found = list(check_machine()); sys.exit('torch' in sys.modules or len(found) < 3)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_torch_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: not there')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    (found,) = findings_of("torch", check_machine())
    assert found.verdict == "wrong"
    assert "libcudart.so.13: not there" in found.text


CPU: Mapping[str, Any] = {
    "version": "2.13.0+cpu",
    "cuda": None,
    "hip": None,
    "devices": [],
}


@pytest.mark.parametrize(
    ("change", "nvidia", "verdict", "word"),
    [
        ({}, False, "note", "emulated"),
        ({}, True, "wrong", "built without CUDA"),
        ({"cuda": "13.0"}, True, "wrong", "sees no device"),
        ({"devices": [{"name": "A100", "capability": [8, 0]}]}, True, "note", "no FP8 units"),
        ({"devices": [{"name": "L40S", "capability": [8, 9]}]}, True, "ok", "per tensor and row"),
        ({"devices": [{"name": "H100", "capability": [9, 0]}]}, True, "ok", "row and block"),
        ({"devices": [{"name": "B200", "capability": [10, 0]}]}, True, "ok", "NVFP4"),
    ],
)
def test_what_a_device_can_do_in_fp8(
    change: Mapping[str, Any], nvidia: bool, verdict: str, word: str
) -> None:
    (found,) = findings_of("fp8", judge_torch({**CPU, **change}, nvidia=nvidia))
    assert (found.verdict, word in found.text) == (verdict, True), found


@pytest.mark.parametrize(
    ("capability", "cuda", "native"),
    [
        ([], None, "native: delayed, current, rowwise (for comparisons"),
        ([[8, 0]], "13.0", "native and transformer_engine need 8.9"),
        ([[8, 9]], "13.0", "native: delayed, current, rowwise;"),
        ([[9, 0]], "13.0", "native: delayed, current, rowwise, block128;"),
        ([[9, 0]], "12.6", "native: delayed, current, rowwise;"),
        ([[9, 0], [10, 0]], "13.0", "native: delayed, current, rowwise;"),
    ],
)
def test_which_backends_train_here(
    capability: list[list[int]], cuda: str | None, native: str
) -> None:
    devices = [{"name": "a GPU", "capability": each} for each in capability]
    answer = {**CPU, "devices": devices, "cuda": cuda}
    (found,) = findings_of("backends", judge_torch(answer, nvidia=bool(devices)))
    assert native in found.text
    assert "emulated: all scalings" in found.text


def test_an_old_torch() -> None:
    (found,) = findings_of("torch", judge_torch({**CPU, "version": "2.4.1"}, nvidia=False))
    assert found.verdict == "wrong"


# The service


def test_scopes(service: Service) -> None:
    for scopes, verdict in (("read",), "note"), (("write",), "ok"), (("admin",), "ok"):
        (found,) = findings_of(
            "token", check_service("service", service.url, secret(service, *scopes))
        )
        assert found.verdict == verdict
        assert scopes[0] in found.text
    (none,) = findings_of("token", check_service("service", service.url, None))
    assert none.verdict == "wrong"
    assert "FORESHOCK_TOKEN is not set" in none.text


def test_looking_changes_nothing(service: Service) -> None:
    """No run, no token, and no entry in the audit log but those of a refusal."""
    with Client(service.url, token=TOKEN) as client:
        before = (client.runs(), len(client.tokens()), len(list(client.audit())))
        assert all(f.verdict == "ok" for f in check_service("service", service.url, TOKEN))
        assert (client.runs(), len(client.tokens()), len(list(client.audit()))) == before


@pytest.mark.parametrize("url", ["service:8420", "http://", "http://a:0", "http://[a"])
def test_an_address_that_is_none(url: str) -> None:
    (found,) = check_service("service", url, None)
    assert found.verdict == "wrong"


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    (found,) = check_service("service", url, None)
    assert "does not answer" in found.text
    assert "NO_PROXY" not in found.remedy
    monkeypatch.setenv("ALL_PROXY", url)
    (found,) = check_service("service", url, None)
    assert "NO_PROXY" in found.remedy


@contextmanager
def answering(body: bytes, date: str | None = None, status: int = 200) -> Iterator[str]:
    """Another server, that gives everybody the same answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status)
            self.send_header("Date", date or self.date_time_string())
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_somebody_else_at_the_address() -> None:
    with answering(b"<html>welcome</html>") as url:
        (found,) = findings_of("service", check_service("service", url, None))
    assert "it is no foreshock service" in found.text


def test_a_service_that_fails_says_why() -> None:
    body = b'{"status": "failing", "reasons": ["the writer has stopped"]}'
    with answering(body, status=503) as url:
        (found,) = findings_of("service", check_service("service", url, None))
    assert (found.verdict, "the writer has stopped" in found.text) == ("wrong", True)


def test_clocks_that_differ() -> None:
    body = b'{"status": "ok", "reasons": []}'
    with answering(body, date="Sun, 01 Nov 2026 12:00:00 GMT") as url:
        (found,) = findings_of("clock", check_service("service", url, None))
    assert (found.verdict, "ahead of" in found.text) == ("wrong", True)


def test_a_certificate_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORESHOCK_CA", str(tmp_path / "absent.pem"))
    (found,) = check_service("service", "https://127.0.0.1:9", None)
    assert (found.check, found.verdict) == ("certificate", "wrong")


# The spool


def spooled(root: Path, run: str = "llama") -> Spool:
    spool = Spool(root, {"project": "lab", "run": run, "launch_id": new_launch()})
    for batch in records_to_table(make_records(0, 3)).to_batches(max_chunksize=1):
        spool.append(batch)
    spool.seal()
    return spool


def test_batches_that_nobody_sends(tmp_path: Path) -> None:
    environment = {"FORESHOCK_SPOOL": str(tmp_path)}
    spool = spooled(tmp_path)
    held = findings_of("spool", check_spool(environment, sending=True))
    assert [finding.verdict for finding in held] == ["ok"]
    spool.close()
    *_, left = findings_of("spool", check_spool(environment, sending=True))
    assert (left.verdict, left.remedy) == ("wrong", f"foreshock import {tmp_path}")
    assert left.text.startswith("1 batches (0.0 MiB) wait")
    *_, meant = findings_of("spool", check_spool(environment, sending=False))
    assert meant.verdict == "note"


def test_a_job_whose_batches_are_not_taken(tmp_path: Path) -> None:
    spool = spooled(tmp_path)
    (batch,) = spool.outbox.sealed()
    os.utime(batch, (time.time() - 3600, time.time() - 3600))
    environment = {"FORESHOCK_SPOOL": str(tmp_path)}
    *_, stuck = findings_of("spool", check_spool(environment, sending=True))
    assert (stuck.verdict, "has waited for 60 minutes" in stuck.text) == ("wrong", True)
    # Looking took the lock from nobody.
    spool.append(records_to_table(make_records(9, 1)).to_batches()[0])
    assert spool.close()


def test_batches_that_were_refused(tmp_path: Path) -> None:
    spool = spooled(tmp_path)
    outbox = Outbox(spool.outbox.folder)
    outbox.refuse(outbox.sealed()[0], "422: record 2: step is missing")
    environment = {"FORESHOCK_SPOOL": str(tmp_path)}
    *_, refused = findings_of("spool", check_spool(environment, sending=True))
    assert (refused.verdict, "record 2: step is missing" in refused.text) == ("wrong", True)
    spool.close()


def test_a_spool_that_cannot_be_written(tmp_path: Path) -> None:
    environment = {"FORESHOCK_SPOOL": "/proc/spool"}
    first, *_ = findings_of("spool", check_spool(environment, sending=False))
    assert (first.verdict, "cannot be written" in first.text) == ("wrong", True)


def test_disks() -> None:
    free = shutil.disk_usage("/").free
    cases = {"ok": (0, 0), "note": (0, free + GIBIBYTE), "wrong": (free + GIBIBYTE, 0)}
    for verdict, (least, wanted) in cases.items():
        (found,) = check_disk_of("disk", Path("/not/there/yet"), least, wanted)
        assert found.verdict == verdict


# A service's own machine


def test_settings_that_do_not_read(tmp_path: Path) -> None:
    data = {"FORESHOCK_DATA": str(tmp_path)}
    (found,) = findings_of("settings", check_serving(data | {"FORESHOCK_PORT": "many"}))
    assert "FORESHOCK_PORT" in found.text
    (found,) = findings_of("settings", check_serving(data | {"FORESHOCK_ALERT_URLS": "nope://x"}))
    assert found.verdict == "wrong"
    (found,) = findings_of("alerts", check_serving(data))
    assert found.verdict == "note"


def test_an_alertmanager_that_is_away(tmp_path: Path) -> None:
    environment = {
        "FORESHOCK_DATA": str(tmp_path),
        "FORESHOCK_ALERTMANAGER_URLS": "http://127.0.0.1:9",
    }
    (found,) = findings_of("alertmanager", check_serving(environment))
    assert found.verdict == "wrong"


def test_a_damaged_forecaster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(SHIPPED, tmp_path / "artifacts")
    model = tmp_path / "artifacts" / "forecaster.skops"
    model.write_bytes(model.read_bytes()[:1000])
    monkeypatch.setattr("foreshock.api.artifact.SHIPPED", tmp_path / "artifacts")
    (found,) = findings_of("forecaster", check_serving({"FORESHOCK_DATA": str(tmp_path)}))
    assert (found.verdict, "cannot be loaded" in found.text) == ("wrong", True)


@contextmanager
def prometheus(folder: Path, config: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (folder / "prometheus.yml").write_text(config)
    program = shutil.which("prometheus")
    assert program, "install prometheus"
    given = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *given, f"--web.listen-address={address}"],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 60
        while not _answers(f"http://{address}/-/ready"):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.debian
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_prometheus_with_and_without_our_rules(service: Service, tmp_path: Path) -> None:
    target = service.url.removeprefix("http://")
    job = (
        "scrape_configs:\n- job_name: foreshock\n  scrape_interval: 1s\n"
        f"  authorization: {{credentials: {TOKEN}}}\n"
        f"  static_configs: [{{targets: ['{target}']}}]\n"
    )
    rules = f"rule_files: ['{ROOT}/dashboards/prometheus/rules/*.yml']\n"
    (tmp_path / "good").mkdir()
    with prometheus(tmp_path / "good", rules + job) as url:
        deadline = time.monotonic() + 60
        while not [f for f in check_prometheus(url) if "it scrapes 1 service" in f.text]:
            assert time.monotonic() < deadline, list(check_prometheus(url))
            time.sleep(0.5)
        verdicts = [finding.verdict for finding in check_prometheus(url)]
        assert verdicts == ["ok", "ok", "note"]  # no Alertmanager
    (tmp_path / "bare").mkdir()
    with prometheus(tmp_path / "bare", "global: {}\n") as url:
        rules_missing, no_job, _ = check_prometheus(url)
    assert "lacks the rules TrainingDivergenceRisk" in rules_missing.text
    assert "no scrape job" in no_job.text
    (away,) = check_prometheus(url)
    assert away.verdict == "wrong"
