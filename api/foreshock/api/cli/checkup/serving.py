"""What a service that starts on this machine would meet: settings, data folder, forecaster, alerts.

Needs the extra [api].
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Final

import httpx

from foreshock.api.cli.checkup.disk import check_disk_of
from foreshock.api.cli.checkup.findings import Finding, note, ok, wrong

__all__ = ["check_prometheus", "check_serving"]

_TIMEOUT: Final = 10.0
_DOCS: Final = "see docs/how-to/docker-compose.md"


def check_serving(environment: Mapping[str, str]) -> Iterator[Finding]:
    """The forecaster always; settings and what they name."""
    from foreshock.api.live_service import alert_channels
    from foreshock.api.settings import Settings, SettingsError

    yield _forecaster()
    try:
        settings = Settings.from_environment(environment)
        channels = alert_channels(settings)
    except (SettingsError, ValueError) as error:
        yield wrong("settings", str(error), "correct it; `foreshock serve` would not start")
        return
    folder = settings.data_dir
    if folder.is_dir():
        if not os.access(folder, os.W_OK | os.X_OK):
            yield wrong("data", f"{folder} cannot be written", "give it to the service's user")
        least = settings.min_free_bytes
        yield from check_disk_of("data's disk", folder.absolute(), least, 4 * least)
    if folder.is_dir() and not channels:
        yield note(
            "alerts",
            "a service here would tell nobody",
            "set FORESHOCK_ALERT_URLS (apprise) or FORESHOCK_ALERTMANAGER_URLS",
        )
    for url in settings.alertmanager_urls:
        yield _alertmanager(url)


def _forecaster() -> Finding:
    from foreshock.api.artifact import ArtifactError, load_shipped

    remedy = "install foreshock again: pip install --force-reinstall --no-deps foreshock"
    try:
        artifact = load_shipped()
    except Exception as error:  # noqa: BLE001 whatever a damaged file makes of its libraries
        reason = str(error) if isinstance(error, ArtifactError) else repr(error)
        return wrong("forecaster", f"it cannot be loaded: {reason}", remedy)
    if artifact is None:
        return wrong("forecaster", "none came with this installation", remedy)
    return ok("forecaster", f"{artifact.version}, heads {', '.join(artifact.heads)}")


def _alertmanager(url: str) -> Finding:
    try:
        answer = httpx.get(f"{url.rstrip('/')}/api/v2/status", timeout=_TIMEOUT)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        return wrong("alertmanager", f"{url}: {error}", "start it, or correct the address")
    return ok("alertmanager", f"{url} answers")


def check_prometheus(url: str) -> Iterator[Finding]:
    """Whether a Prometheus scrapes a service, has our rules, and can tell somebody."""
    from foreshock.api.alert_log import ALERT_NAMES

    base = f"{url.rstrip('/')}/api/v1"
    try:
        with httpx.Client(timeout=_TIMEOUT) as client:
            groups = client.get(f"{base}/rules").raise_for_status().json()["data"]["groups"]
            up = client.get(f"{base}/query", params={"query": 'up{job="foreshock"}'})
            samples = up.raise_for_status().json()["data"]["result"]
            known = client.get(f"{base}/alertmanagers").raise_for_status().json()["data"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        yield wrong("prometheus", f"{url}: {error or type(error).__name__}", "correct its address")
        return
    names = {rule["name"] for group in groups for rule in group["rules"]}
    missing = sorted(set(ALERT_NAMES.values()) - names)
    if missing:
        yield wrong(
            "prometheus",
            f"it lacks the rules {', '.join(missing)}",
            f"add dashboards/prometheus/rules/*.yml to its rule_files; {_DOCS}",
        )
    else:
        yield ok("prometheus", "it has the rules")
    yield _scraped(samples)
    if not known["activeAlertmanagers"]:
        yield note("prometheus", "it has no Alertmanager: its alerts reach nobody", _DOCS)


def _scraped(samples: list[dict[str, object]]) -> Finding:
    if not samples:
        return wrong("prometheus", "it has no scrape job named foreshock", _DOCS)
    down = [s for s in samples if float(s["value"][1]) != 1]  # type: ignore[index]
    if down:
        return wrong(
            "prometheus",
            f"it cannot scrape {len(down)} of {len(samples)} services",
            "its page /targets says why; 401 there means a token without the scope read",
        )
    return ok("prometheus", f"it scrapes {len(samples)} service(s)")
