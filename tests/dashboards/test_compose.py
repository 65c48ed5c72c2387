"""The compose file: pinned, provisioned, closed to the outside, and unusable without a token."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def test_images_are_pinned() -> None:
    assert set(SERVICES) == {"api", "prometheus", "alertmanager", "grafana"}
    for name, service in SERVICES.items():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name


def test_ports_are_open_on_loopback_only() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_every_mounted_file_exists() -> None:
    mounts = [each for service in SERVICES.values() for each in service["volumes"]]
    ours = [each.split(":")[0] for each in mounts if each.startswith("./")]
    assert len(ours) == 5
    for path in ours:
        assert (ROOT / path).exists(), path
    named = {each.split(":")[0] for each in mounts if not each.startswith("./")}
    assert named == set(COMPOSE["volumes"])


def test_there_is_no_start_without_a_token() -> None:
    wanted = SERVICES["api"]["environment"]["FORESHOCK_TOKEN"]
    assert re.match(r"\$\{FORESHOCK_TOKEN:\?.*openssl", wanted)


def test_configs_name_the_services_of_the_file() -> None:
    prometheus = yaml.safe_load((ROOT / "dashboards/prometheus/prometheus.yml").read_text())
    scrape = prometheus["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == ["api:8420"]
    script = SERVICES["prometheus"]["entrypoint"][2]
    assert scrape["authorization"]["credentials_file"] in script
    sources = yaml.safe_load(
        (ROOT / "dashboards/grafana/provisioning/datasources/foreshock.yaml").read_text()
    )
    hosts = {re.sub(r"https?://|:\d+", "", each["url"]) for each in sources["datasources"]}
    assert hosts == {"prometheus", "alertmanager"}


def test_image_runs_as_a_user_and_says_how_it_is() -> None:
    text = (ROOT / "api/Dockerfile").read_text()
    assert re.search(r"^USER foreshock$", text, re.MULTILINE)
    assert "HEALTHCHECK" in text
    assert "/healthz" in text
    for source in re.findall(r"^COPY ([^-].*) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name


@pytest.mark.debian
def test_docker_compose_reads_it() -> None:
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not installed")
    command = ["docker-compose", "-f", str(ROOT / "docker-compose.yml"), "config", "-q"]
    plain = {key: value for key, value in os.environ.items() if key != "FORESHOCK_TOKEN"}
    refused = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "set FORESHOCK_TOKEN" in refused.stderr
    token = {**plain, "FORESHOCK_TOKEN": "0123456789abcdef"}
    taken = subprocess.run(command, env=token, capture_output=True, text=True, check=False)
    assert taken.returncode == 0, taken.stderr
