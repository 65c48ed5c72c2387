"""Malformed, truncated and hostile bodies: answered, bounded in memory, all or nothing."""

from __future__ import annotations

import gzip
import json
import struct
from collections import Counter
from collections.abc import Iterator
from itertools import count

import httpx
import pyarrow as pa
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foreshock.api.wire import ARROW, JSON
from foreshock.monitor.record import records_to_json, records_to_table, write_stream
from tests.api.service import Service, batch_path, make_records, new_launch, post_run

RECORDS = make_records(0, 3)
TABLE = records_to_table(RECORDS)
GROWTH = 700_000_000


def _wide(rows: int) -> bytes:
    """A short body that claims many rows: a column of nulls."""
    return write_stream(pa.table({"step": pa.nulls(rows)}))


def _deep(tensors: int) -> bytes:
    """A short body that claims many tensors in one record."""
    struct = pa.StructArray.from_arrays([pa.nulls(tensors)], ["layer"])
    lists = pa.ListArray.from_arrays(pa.array([0, tensors], pa.int32()), struct)
    return write_stream(pa.table({"step": [1], "tensors": lists}))


def _bomb() -> bytes:
    return zstandard.ZstdCompressor().compress(bytes(2**30 // 4))


SEEDS = (
    write_stream(TABLE),
    write_stream(TABLE, compression=None),
    records_to_json(RECORDS),
    write_stream(records_to_table([])),
    _wide(2**31 - 1),
    _wide(2**24),
    _deep(2**24),
    json.dumps({"records": [{"step": 2**62, "time": "9999-12-31T23:59:59Z"}] * 3}).encode(),
    b'{"records": ' + b"[" * 100_000,
    b'{"records": [{"step": 1, "time": "2026-01-01T00:00:00Z", "scalars": {"\\u0000": 1e999}}]}',
)
WRAPPED = (
    ("identity", lambda body: body),
    ("gzip", gzip.compress),
    ("zstd", zstandard.ZstdCompressor().compress),
)
BOMB = _bomb()
INTEGERS = (0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63))


@st.composite
def broken(draw: st.DrawFn, body: bytes) -> bytes:
    """A body with a few bytes changed, lengths replaced, pieces cut, doubled or added."""
    out = bytearray(body)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(len(out) - 1, 0)))
        match draw(st.integers(0, 5)):
            case 0:
                out[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                out[at : at + 8] = struct.pack("<q", draw(st.sampled_from(INTEGERS)))
            case 2:
                del out[at:]
            case 3:
                out[at:at] = out[at : at + draw(st.integers(1, 300))]
            case 4:
                out[at:at] = draw(st.binary(max_size=40))
            case _:
                del out[at : at + draw(st.integers(1, 300))]
    return bytes(out)


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, dict[str, str]]:
    """A body and the headers it comes with, which may lie."""
    kind = draw(st.integers(0, 99))
    if kind == 0:
        return BOMB, {"Content-Type": ARROW, "Content-Encoding": "zstd"}
    seed = draw(st.binary(max_size=200)) if kind <= 5 else draw(st.sampled_from(SEEDS))
    encoding, wrap = draw(st.sampled_from(WRAPPED))
    inside = draw(st.booleans())
    body = wrap(draw(broken(seed))) if inside else draw(broken(wrap(seed)))
    types = (ARROW, JSON, "application/octet-stream", "text/html", "")
    headers = {"Content-Type": draw(st.sampled_from(types)), "Content-Encoding": encoding}
    if draw(st.integers(0, 9)) == 0:
        headers["Content-Encoding"] = draw(st.sampled_from(("br", "zstd, zstd", "gzip", "zstd")))
    return body, headers


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("stranger"))
    made.start()
    yield made
    assert made.stop() == 0, made.log


class Attack:
    """Sends bodies to one run and keeps count of what the answers say."""

    def __init__(self, service: Service, client: httpx.Client) -> None:
        self.launch = new_launch()
        self.run_id = post_run(client, f"run-{self.launch[:8]}", self.launch)["run_id"]
        self.answers: Counter[int] = Counter()
        self.records = 0
        self._client = client
        self._service = service
        self._sequence = count()

    def send(self, body: bytes, headers: dict[str, str]) -> None:
        path = batch_path(self.run_id, self.launch, next(self._sequence))
        answer = self._client.put(path, content=body, headers=headers)
        self.answers[answer.status_code] += 1
        assert answer.status_code in (201, 400, 413, 415, 422), (answer.text, body[:100])
        if answer.status_code == 201:
            self.records += answer.json()["records"]
        else:
            assert answer.headers["content-type"] == "application/problem+json"

    def check(self) -> None:
        """As many records as the receipts say, and a service that still takes good ones."""
        steps = self._client.get(f"/api/v1/runs/{self.run_id}/records", params={"format": "json"})
        assert steps.status_code in (200, 404), steps.text
        self.send(write_stream(TABLE), {"Content-Type": ARROW})
        assert self._client.get("/readyz").json()["status"] == "ok"


def attack(service: Service, examples: int) -> Counter[int]:
    with service.client() as client:
        made = Attack(service, client)
        made.send(write_stream(TABLE), {"Content-Type": ARROW})
        before = service.resident_bytes()

        @settings(
            max_examples=examples,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        @given(requests())
        def every(request: tuple[bytes, dict[str, str]]) -> None:
            made.send(*request)

        every()
        made.check()
        grown = service.resident_bytes() - before
        assert grown < GROWTH, f"{grown} bytes more after {examples} bodies"
    return made.answers


def test_a_few_hundred_hostile_bodies(stranger: Service) -> None:
    answers = attack(stranger, 300)
    assert answers[422] > 100, answers


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_thousand_hostile_bodies(stranger: Service) -> None:
    answers = attack(stranger, 10_000)
    print(f"10,000 hostile bodies: {dict(sorted(answers.items()))}")
    assert answers[422] > 3000, answers
