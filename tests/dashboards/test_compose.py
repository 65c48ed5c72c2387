"""The compose file: pinned, provisioned, closed to the outside, and unusable without a token."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboards.infinity import PLUGIN

from foreshock.api.database import database_url
from foreshock.api.store_url import ServersPlace, parse_store
from tests.dashboards.service import running_service

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


CLUSTER = {name for name, service in SERVICES.items() if "cluster" in service.get("profiles", [])}


def test_images_are_pinned() -> None:
    watching = {"prometheus", "alertmanager", "grafana", "grafana-token"}
    assert set(SERVICES) - CLUSTER == {"api", *watching}
    replicas = {"balancer", "api-1", "api-2"}
    assert (
        replicas | {"postgres", "keeper", "clickhouse", "clickhouse-1", "clickhouse-2"} == CLUSTER
    )
    for name, service in SERVICES.items():
        assert re.search(r":v?\d+(\.\d+){1,3}$", service["image"]), name


def test_every_part_of_the_cluster_knows_the_others_names() -> None:
    config = {name: (ROOT / "dashboards/cluster" / name).read_text() for name in CONFIGS}
    assert set(re.findall(r"server (\S+):8420", config["nginx.conf"])) == {"api-1", "api-2"}
    servers = {"clickhouse-1", "clickhouse-2"}
    assert set(re.findall(r"server (\S+):8123", config["clickhouse-nginx.conf"])) == servers
    assert set(re.findall(r"<host>(\S+?)</host>", config["clickhouse.xml"])) == {*servers, "keeper"}
    for name in ("api-1", "api-2"):
        environment = SERVICES[name]["environment"]
        place = parse_store(environment["FORESHOCK_STORE"].replace("${FORESHOCK_TOKEN}", "x"), ROOT)
        assert isinstance(place, ServersPlace)
        assert place.servers[0].host == "clickhouse"
        assert f"<{place.cluster}>" in config["clickhouse.xml"]
        address = environment["FORESHOCK_DATABASE"].replace("${FORESHOCK_TOKEN}", "x")
        assert database_url(address, ROOT).host == "postgres"


CONFIGS = ("nginx.conf", "clickhouse-nginx.conf", "clickhouse.xml", "keeper.xml")


def test_ports_are_open_on_loopback_only() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_every_mounted_file_exists() -> None:
    mounts = [each for service in SERVICES.values() for each in service["volumes"]]
    ours = [each.split(":")[0] for each in mounts if each.startswith("./")]
    assert len(ours) == 11
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
    mounts = [each.split(":")[:2] for each in SERVICES["prometheus"]["volumes"]]
    token = Path(scrape["authorization"]["credentials_file"])
    # The token of Grafana, which may read and nothing else.
    assert ["grafana-token", str(token.parent)] in mounts
    assert Path(SERVICES["grafana-token"]["environment"]["TOKEN_FILE"]).name == token.name
    assert "grafana-token" in SERVICES["prometheus"]["depends_on"]
    assert "FORESHOCK_TOKEN" not in str(SERVICES["prometheus"])
    sources = yaml.safe_load(
        (ROOT / "dashboards/grafana/provisioning/datasources/foreshock.yaml").read_text()
    )
    hosts = {re.sub(r"https?://|:\d+", "", each["url"]) for each in sources["datasources"]}
    assert hosts == {"prometheus", "alertmanager", "api"}


def test_grafana_installs_the_plugin_that_a_dashboard_asks() -> None:
    assert re.fullmatch(
        rf"{PLUGIN}@\d+\.\d+\.\d+", SERVICES["grafana"]["environment"]["GF_PLUGINS_PREINSTALL_SYNC"]
    )
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "dashboards/grafana/dashboards" / Path(home).name).is_file()


def test_grafana_gets_a_token_that_only_reads_and_a_new_one_when_that_is_gone(
    tmp_path: Path,
) -> None:
    """The container's own script against a real service."""
    script = SERVICES["grafana-token"]["command"][0].replace("$$", "$")
    admin, file = "an-administrators-token", tmp_path / "token"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    command = f"#!{sys.executable}\nfrom foreshock.api.cli.main import run; run()\n"
    (tmp_path / "bin/foreshock").write_text(command)
    (tmp_path / "bin/foreshock").chmod(0o755)

    def make(address: str) -> str:
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "FORESHOCK_TOKEN": admin,
            "SERVICE": address,
            "TOKEN_FILE": str(file),
        }
        subprocess.run(["/bin/sh", "-c", script], env=environment, check=True, timeout=120)
        return file.read_text().strip()

    with running_service(tmp_path, environment={"FORESHOCK_TOKEN": admin}) as service:
        first = make(service.address)
        assert make(service.address) == first, "one that is taken is kept"
        reader = {"Authorization": f"Bearer {first}"}
        assert service.client.get("/api/v1/runs", headers=reader).status_code == 200
        wanted = {"name": "x", "scopes": ["admin"]}
        refused = service.client.post("/api/v1/tokens", json=wanted, headers=reader)
        assert refused.status_code == 403
        (known,) = service.client.get("/api/v1/tokens").json()["tokens"]
        service.client.delete(f"/api/v1/tokens/{known['id']}").raise_for_status()
        second = make(service.address)
        assert second != first
        reader = {"Authorization": f"Bearer {second}"}
        assert service.client.get("/api/v1/runs", headers=reader).status_code == 200


def test_image_runs_as_a_user_and_says_how_it_is() -> None:
    text = (ROOT / "api/Dockerfile").read_text()
    assert re.search(r"^USER foreshock$", text, re.MULTILINE)
    assert "HEALTHCHECK" in text
    assert "/healthz" in text
    for source in re.findall(r"^COPY ([^-].*) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name


@pytest.mark.debian
@pytest.mark.parametrize("profile", [[], ["--profile", "cluster"]])
def test_docker_compose_reads_it(profile: list[str]) -> None:
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not installed")
    command = ["docker-compose", "-f", str(ROOT / "docker-compose.yml"), *profile, "config", "-q"]
    plain = {key: value for key, value in os.environ.items() if key != "FORESHOCK_TOKEN"}
    refused = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "set FORESHOCK_TOKEN" in refused.stderr
    token = {**plain, "FORESHOCK_TOKEN": "0123456789abcdef"}
    taken = subprocess.run(command, env=token, capture_output=True, text=True, check=False)
    assert taken.returncode == 0, taken.stderr
