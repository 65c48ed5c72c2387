"""The address of the store: read, checked, and never shown with its secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from foreshock.api.settings import Settings, SettingsError
from foreshock.api.store_url import ChdbPlace, SqlitePlace, StoreUrlError, parse_store

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
