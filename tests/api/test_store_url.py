"""The address of the store: read, checked, and never shown with its secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from foreshock.api.settings import Settings, SettingsError
from foreshock.api.store_url import (
    ChdbPlace,
    ClickHouseServer,
    ServersPlace,
    SqlitePlace,
    StoreUrlError,
    parse_store,
)

DATA = Path("/data")


def test_the_default_is_clickhouse_in_the_data_folder() -> None:
    assert parse_store("", DATA) == ChdbPlace(Path("/data/store"))
    assert Settings(data_dir=DATA).store_place == ChdbPlace(Path("/data/store"))


def test_a_folder_has_three_slashes() -> None:
    assert parse_store("chdb:///srv/a%20b", DATA) == ChdbPlace(Path("/srv/a b"))
    assert parse_store("sqlite:///srv/facts.sqlite", DATA) == SqlitePlace(Path("/srv/facts.sqlite"))
    for url in ("sqlite://srv/f", "chdb://srv/store", "chdb:///", "chdb:"):
        with pytest.raises(StoreUrlError, match="three slashes"):
            parse_store(url, DATA)


@pytest.mark.parametrize("url", ["mysql://u:secret@h/db", "/srv/store", "store"])
def test_what_is_no_store_is_refused_without_its_secret(url: str) -> None:
    with pytest.raises(SettingsError, match="chdb:///path") as caught:
        Settings(store=url)
    assert "secret" not in str(caught.value)


def test_servers_shards_and_clusters() -> None:
    one = parse_store("clickhouse://fs:p%40ss%2Fword@db.example:9000/facts", DATA)
    assert one == ServersPlace(
        servers=(ClickHouseServer("db.example", 9000),),
        database="facts",
        user="fs",
        password="p@ss/word",
    )
    assert "p@ss" not in repr(one)
    many = parse_store("clickhouse://h1,h2:81,[::1]:82", DATA)
    assert isinstance(many, ServersPlace)
    assert [(s.host, s.port) for s in many.servers] == [("h1", 8123), ("h2", 81), ("::1", 82)]
    assert (many.database, many.user, many.password) == ("foreshock", "default", "")
    whole = parse_store("clickhouse://lb/db?cluster=main&secure=true", DATA)
    assert isinstance(whole, ServersPlace)
    assert (whole.cluster, whole.secure, whole.servers[0].port) == ("main", True, 8443)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("clickhouse://", "needs a host"),
        ("clickhouse://u:secret@/db", "needs a host"),
        ("clickhouse://u:secret@h1,,h2/db", "needs a host"),
        ("clickhouse://u:secret@h1,h1/db", "twice"),
        ("clickhouse://u:secret@h/a-b", "letters"),
        ("clickhouse://u:secret@h/db?cluster=a'b", "letters"),
        ("clickhouse://u:secret@h1,h2/db?cluster=a", "one endpoint"),
        ("clickhouse://u:secret@h/db?password=secret", "unknown options"),
        ("clickhouse://u:secret@h/db?secure=perhaps", "true or false"),
        ("clickhouse://u:secret@[h/db", "does not read"),
    ],
)
def test_a_server_that_makes_no_sense_is_told_why(url: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason) as caught:
        Settings(store=url)
    assert "secret" not in str(caught.value).replace("password", "")
