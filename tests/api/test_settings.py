"""What the environment and the command line may say, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from foreshock.api.access.admission import check_reach
from foreshock.api.settings import Settings, SettingsError, is_loopback

TOKEN = "a-token-that-is-long-enough"


def test_environment_and_command_line_meet_and_the_command_line_wins() -> None:
    environment = {
        "FORESHOCK_DATA": "/data",
        "FORESHOCK_PORT": "9000",
        "FORESHOCK_FSYNC": "no",
        "FORESHOCK_ALERT_URLS": "json://a, json://b",
        "FORESHOCK_HOST": "",
        "UNRELATED": "1",
    }
    settings = Settings.from_environment(environment, {"port": 9001, "host": None})
    assert settings.data_dir == Path("/data")
    assert (settings.host, settings.port) == ("127.0.0.1", 9001)
    assert settings.fsync is False
    assert settings.alert_urls == ("json://a", "json://b")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_an_open_address_needs_a_token(host: str) -> None:
    with pytest.raises(SettingsError, match="FORESHOCK_TOKEN"):
        check_reach(Settings(host=host), None)
    check_reach(Settings(host=host, token=TOKEN), None)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.1"])
def test_loopback_needs_none(host: str) -> None:
    assert is_loopback(host)
    check_reach(Settings(host=host), None)


def test_secrets_stay_out_of_the_repr() -> None:
    settings = Settings(token=TOKEN, alert_urls=("slack://secret",))
    assert TOKEN not in repr(settings)
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"FORESHOCK_PORT": "many"}, "FORESHOCK_PORT"),
        ({"FORESHOCK_PORT": "70000"}, "port"),
        ({"FORESHOCK_FSYNC": "perhaps"}, "FORESHOCK_FSYNC"),
        ({"FORESHOCK_QUEUE_BATCHES": "0"}, "queue_batches"),
        ({"FORESHOCK_RETENTION_DAYS": "-1"}, "retention_days"),
        ({"FORESHOCK_AUDIT_DAYS": "-1"}, "audit_days"),
        ({"FORESHOCK_SESSION_HOURS": "0"}, "session_hours"),
        ({"FORESHOCK_TLS_CERT": "/a.pem"}, "tls_key"),
        ({"FORESHOCK_TOKEN": "short"}, "token"),
    ],
)
def test_wrong_values_are_named(environment: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError, match=named) as caught:
        Settings.from_environment(environment)
    assert "short'" not in str(caught.value)


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", "much"])
def test_a_threshold_factor_is_above_zero(value: str) -> None:
    assert Settings.from_environment({"FORESHOCK_THRESHOLD_FACTOR": "2.5"}).threshold_factor == 2.5
    with pytest.raises(SettingsError, match=r"(?i)threshold_factor"):
        Settings.from_environment({"FORESHOCK_THRESHOLD_FACTOR": value})
