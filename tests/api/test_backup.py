"""A backup under load comes back whole: what was acknowledged before it is there, nothing twice."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import httpx
import pytest

from foreshock.api.backup import BackupError, restore_backup
from foreshock.api.settings import Settings
from tests.api.live_helpers import wait_until
from tests.api.service import Service, make_records, new_launch, post_run, put_records

BATCH = 4


class Sender(threading.Thread):
    """A job that sends batches until told to stop, and takes down what was acknowledged."""

    def __init__(self, client: httpx.Client, name: str) -> None:
        super().__init__(daemon=True)
        self.launch = new_launch()
        self.name = name
        self.run_id = post_run(client, name, self.launch)["run_id"]
        self.acknowledged = 0
        self._client = client
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.is_set():
            self.send(self._client, self.acknowledged)
            self.acknowledged += 1

    def send(self, client: httpx.Client, sequence: int) -> bool:
        """Whether the batch was known already."""
        records = make_records(BATCH * sequence, BATCH)
        answer = put_records(client, self.run_id, self.launch, sequence, records)
        assert answer.status_code in (200, 201), answer.text
        return bool(answer.json()["duplicate"])

    def finish(self) -> None:
        self._stop_now.set()
        self.join(60)


def environment_of(kind: str, folder: Path) -> dict[str, str]:
    folder.mkdir()
    return {"FORESHOCK_STORE": f"sqlite:///{folder}/data/s.sqlite"} if kind == "sqlite" else {}


@pytest.mark.parametrize("kind", ["chdb", pytest.param("sqlite", marks=pytest.mark.long)])
def test_what_was_acknowledged_before_a_backup_comes_back_once(kind: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    service = Service(first, environment=environment_of(kind, first))
    service.start()
    with service.client() as client:
        senders = [Sender(client, f"run-{index}") for index in range(3)]
        for sender in senders:
            sender.start()
        wait_until(lambda: all(sender.acknowledged >= 5 for sender in senders), 120)
        before = [sender.acknowledged for sender in senders]
        answer = client.post("/api/v1/backups")
        for sender in senders:
            sender.finish()
    assert answer.status_code == 201, answer.text
    assert service.stop() == 0, service.log
    moved = tmp_path / "elsewhere"
    shutil.copytree(answer.json()["folder"], moved)
    environment = environment_of(kind, second)
    restored = Service(second, environment=environment)
    settings = Settings.from_environment(environment, {"data_dir": restored.data})
    restore_backup(moved, settings)
    restored.start()
    with restored.client() as client:
        for sender, count in zip(senders, before, strict=True):
            check(client, sender, count)
    assert restored.stop() == 0, restored.log
    with pytest.raises(BackupError, match="exists"):
        restore_backup(moved, settings)


def check(client: httpx.Client, sender: Sender, before: int) -> None:
    """Send everything again: what the backup holds is known, the rest is taken now."""
    known = [sender.send(client, sequence) for sequence in range(sender.acknowledged)]
    assert all(known[:before]), (before, known)
    path = f"/api/v1/runs/{sender.run_id}/records"
    rows = client.get(path, params={"as": "json", "limit": 1000}).json()["records"]
    assert [row["step"] for row in rows] == list(range(BATCH * sender.acknowledged))


def test_a_backup_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    with pytest.raises(BackupError, match="no complete backup"):
        restore_backup(tmp_path, settings)
    (tmp_path / "backup.json").write_text(json.dumps({"began_at": "2026-01-01", "began_ns": 1}))
    with pytest.raises(BackupError, match="does not come back"):
        restore_backup(tmp_path, settings)
    assert not (tmp_path / "data" / "registry.sqlite").exists()


def test_servers_have_backups_of_their_own(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, store="clickhouse://host:8123/foreshock")
    (tmp_path / "backup.json").write_text(json.dumps({"began_at": "2026-01-01", "began_ns": 1}))
    with pytest.raises(BackupError, match="unset FORESHOCK_STORE"):
        restore_backup(tmp_path, settings)
