"""The service over TLS with a certificate made here: client, command line and page."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from foreshock.api.cli.checkup.service import check_service
from foreshock.api.cli.main import app
from foreshock.monitor.record import records_to_table
from foreshock.monitor.shipping import Service as Client
from foreshock.monitor.shipping import ship_leftovers
from foreshock.monitor.spool import Spool
from tests.api.service import RelayProcess, Service, make_record, new_launch
from tests.api.test_collect_relay import wait_for

pytestmark = [
    pytest.mark.debian,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
]
TOKEN = "a-bootstrap-token-for-tests"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    cert, key = folder / "cert.pem", folder / "key.pem"
    openssl = shutil.which("openssl")
    assert openssl, "install openssl"
    made = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    made += ["-nodes", "-days", "2", "-subj", "/CN=foreshock", "-keyout", str(key)]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert)]
    subprocess.run(made, check=True, capture_output=True)
    return cert, key


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, certificate: tuple[Path, Path]
) -> Iterator[Service]:
    cert, key = map(str, certificate)
    made = Service(
        tmp_path_factory.mktemp("tls"),
        *("--tls-cert", cert, "--tls-key", key),
        environment={"FORESHOCK_TOKEN": TOKEN},
    )
    made.start()
    made.url = made.url.replace("http://", "https://")
    yield made
    assert made.stop() == 0, made.log
    assert "listening on https://" in made.log


def spooled(root: Path) -> None:
    """What a training job that ended left behind."""
    launch = new_launch()
    spool = Spool(root, {"project": "default", "run": f"tls-{root.name}", "launch_id": launch})
    spool.append(records_to_table([make_record(0)]).to_batches()[0])
    spool.close()


@pytest.mark.parametrize("variable", ["FORESHOCK_CA", "SSL_CERT_FILE"])
def test_a_job_ships_over_tls_if_it_knows_the_authority(
    service: Service,
    certificate: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    spooled(tmp_path)
    stranger = Client(service.url, token=TOKEN)
    shipped = ship_leftovers(stranger, tmp_path)
    stranger.close()
    assert (shipped.batches, shipped.waiting) == (0, 1)
    assert "certificate" in shipped.reason.lower()
    monkeypatch.setenv(variable, str(certificate[0]))
    friend = Client(service.url, token=TOKEN)
    shipped = ship_leftovers(friend, tmp_path)
    friend.close()
    assert (shipped.batches, shipped.waiting) == (1, 0), shipped.reason


def test_the_command_line_too(service: Service, certificate: tuple[Path, Path]) -> None:
    environment = {"FORESHOCK_TOKEN": TOKEN, "FORESHOCK_CA": ""}
    command = ["token", "list", "--url", service.url]
    refused = CliRunner().invoke(app, command, env=environment)
    assert (refused.exit_code, "certificate" in refused.stderr.lower()) == (2, True)
    environment["FORESHOCK_CA"] = str(certificate[0])
    assert CliRunner().invoke(app, command, env=environment).exit_code == 0
    environment["FORESHOCK_CA"] = __file__
    wrong = CliRunner().invoke(app, command, env=environment)
    assert (wrong.exit_code, "FORESHOCK_CA" in wrong.stderr) == (2, True)


def test_a_relay_knows_the_authority_too(
    service: Service, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    environment = {"FORESHOCK_TOKEN": f"{TOKEN}\n", "FORESHOCK_CA": str(certificate[0])}
    relay = RelayProcess(tmp_path, "--url", service.url, "--wait", "0", environment=environment)
    relay.start()
    spooled(tmp_path / "spool")
    job = Client(relay.url, token=TOKEN)
    assert ship_leftovers(job, tmp_path / "spool").batches == 1
    job.close()
    context = ssl.create_default_context(cafile=str(certificate[0]))
    head = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=service.url, verify=context, headers=head) as client:
        wait_for(lambda: client.get("/api/v1/runs/tls-spool/records").status_code == 200)
    assert relay.stop() == 0, relay.log


def test_doctor_says_what_is_wrong_with_the_certificate(
    service: Service, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = check_service("service", service.url, TOKEN)
    assert (found.check, found.verdict) == ("certificate", "wrong")
    assert "FORESHOCK_CA" in found.remedy
    monkeypatch.setenv("FORESHOCK_CA", str(certificate[0]))
    assert {f.verdict for f in check_service("service", service.url, TOKEN)} == {"ok"}


def test_the_page_signs_in_over_tls_and_its_cookie_stays_there(
    service: Service, certificate: tuple[Path, Path]
) -> None:
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with httpx.Client(base_url=service.url, verify=context, timeout=30) as page:
        assert "foreshock" in page.get("/").text
        answer = page.post("/login", json={"token": TOKEN})
        assert "secure" in answer.headers["set-cookie"].lower()
        assert page.get("/api/v1/runs").status_code == 200
        with page.stream("GET", "/api/v1/events") as events:
            assert "retry:" in next(events.iter_text())
    with pytest.raises(httpx.HTTPError):
        httpx.get(service.url.replace("https://", "http://"))


def test_a_key_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    command = ["serve", "--data", str(tmp_path / "data"), "--tls-cert", str(tmp_path / "no.pem")]
    done = CliRunner().invoke(app, [*command, "--tls-key", str(tmp_path / "no.key")])
    assert done.exit_code == 2
    assert "no.pem" in done.stderr
    assert "Traceback" not in done.stderr
