"""Pages, entity tags and media types of the reading routes of a real service."""

from __future__ import annotations

import csv
import io
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from foreshock.api.bodies import CSV, PARQUET
from foreshock.api.wire import ARROW, JSON
from tests.api.service import LAYERS, Service, make_records, new_launch, post_run, put_records
from tests.api.test_routes_batches import is_problem

STEPS = [*range(25), *range(3000, 3010)]
READS = (
    "series?name=loss",
    f"series?layer={LAYERS[0]}&statistic=amax",
    "heatmap?statistic=amax",
    "tensors?statistic=amax",
    "records",
    "risk/history",
    "diagnosis",
)


class Subject:
    def __init__(self, client: httpx.Client) -> None:
        self.client, self.launch, self.sequence = client, new_launch(), 0
        self.name = f"again-{self.launch[:8]}"
        self.run_id = post_run(client, self.name, self.launch, project="again")["run_id"]
        self.send(STEPS)

    def send(self, steps: list[int]) -> None:
        for first in (s for s in steps if s - 1 not in steps):
            count = next(n for n in range(1, 9999) if first + n not in steps)
            records = make_records(first, count)
            answer = put_records(self.client, self.run_id, self.launch, self.sequence, records)
            assert answer.is_success
            self.sequence += 1

    def get(self, what: str, **headers: str) -> httpx.Response:
        return self.client.get(f"/api/v1/runs/{self.run_id}/{what}", headers=headers)


@pytest.fixture
def subject(client: httpx.Client) -> Subject:
    return Subject(client)


def table(answer: httpx.Response) -> pa.Table:
    assert answer.status_code == 200, answer.text
    kind = answer.headers["content-type"].partition(";")[0]
    if kind == ARROW:
        with pa.ipc.open_stream(answer.content) as reader:
            return reader.read_all()
    assert kind == PARQUET
    return pq.read_table(io.BytesIO(answer.content))


def test_tables_say_the_same_in_every_form(subject: Subject) -> None:
    for what in READS[:6]:
        mark = "&" if "?" in what else "?"
        arrow = table(subject.get(what, Accept=ARROW))
        parquet = table(subject.get(f"{what}{mark}as=parquet"))
        assert arrow.to_pylist() == parquet.to_pylist(), what
        text = subject.get(f"{what}{mark}as=csv", Accept=JSON)
        assert text.headers["content-type"].startswith(CSV)
        if what != "records":
            rows = list(csv.DictReader(io.StringIO(text.text)))
            assert list(rows[0] if rows else arrow.schema.names) == arrow.schema.names
            assert len(rows) == arrow.num_rows
        assert "arrow" in is_problem(subject.get(what, Accept="image/png"), 406)
    series = subject.get("series?name=loss").json()
    arrow = table(subject.get("series?name=loss&as=arrow"))
    assert {name: arrow[name].to_pylist() for name in series} == series
    heat = table(subject.get("heatmap?statistic=amax&first_step=3000&as=arrow")).to_pylist()
    assert {"layer": LAYERS[1], "step": 3004, "value": 3004.0} in heat


def test_an_answer_that_still_holds_is_not_sent_again(subject: Subject) -> None:
    for what in READS:
        first = subject.get(what)
        tag = first.headers["etag"]
        assert tag.startswith('"')
        assert first.headers["cache-control"] == "private, no-cache"
        assert "Accept" in first.headers["vary"]
        if what != "risk/history":  # risks come in a moment after their records
            same = subject.get(what, **{"If-None-Match": f'"other", W/{tag}'})
            assert (same.status_code, same.content) == (304, b""), what
            assert same.headers["etag"] == tag
        assert subject.get(what, **{"If-None-Match": '"other"'}).status_code == 200
    tags = {what: subject.get(what).headers["etag"] for what in READS}
    assert len(set(tags.values())) == len(READS)
    csv_tag = subject.get("records", Accept=CSV).headers["etag"]
    assert csv_tag != tags["records"]
    subject.send([3010])
    for what, tag in tags.items():
        assert subject.get(what, **{"If-None-Match": tag}).status_code == 200, what


def test_records_come_a_page_at_a_time(subject: Subject) -> None:
    seen: list[int] = []
    address: str | None = f"/api/v1/runs/{subject.run_id}/records?limit=10"
    while address is not None:
        answer = subject.client.get(address)
        body = answer.json()
        seen += [record["step"] for record in body["records"]]
        link = answer.links.get("next", {})
        assert (body["next"] is None) == (not link)
        address = link.get("url")
        if len(seen) == 20:
            subject.send([3010])
    assert seen == [*STEPS, 3010]
    page = subject.get("records?limit=26&as=arrow")
    assert table(page)["step"].to_pylist() == STEPS[:26]
    rest = subject.client.get(page.links["next"]["url"])
    assert table(rest)["step"].to_pylist() == [*STEPS[26:], 3010]
    assert "cursor" in is_problem(subject.get("records?limit=5&cursor=AAAA"), 422)


def test_runs_come_a_page_at_a_time(client: httpx.Client) -> None:
    project = f"paged-{new_launch()[:8]}"
    names = [f"{letter}-{n}" for letter in "ab" for n in range(4)]
    for name in names:
        post_run(client, name, new_launch(), project=project)

    def walk(**query: Any) -> list[str]:
        found: list[str] = []
        cursor = None
        while True:
            given = {"project": project} | query | ({"cursor": cursor} if cursor else {})
            body = client.get("/api/v1/runs", params=given)
            found += [run["run"] for run in body.json()["runs"]]
            cursor = body.json()["next"]
            assert bool(cursor) == ("next" in body.links)
            if cursor is None:
                return found

    assert walk(limit=3, order="created") == names[::-1]
    assert walk(limit=3, order="name") == names
    assert walk(limit=3, name="b-") == names[:3:-1]
    assert walk(status="new", order="name") == names
    assert walk(status="live") == walk(state="firing") == []
    for query in ({"order": "colour"}, {"limit": 0}, {"limit": 5000}, {"cursor": "x"}):
        is_problem(client.get("/api/v1/runs", params=query), 422)


def test_a_table_of_nothing_is_a_table(served: Service) -> None:
    with served.client() as client:
        launch = new_launch()
        run_id = post_run(client, f"empty-{launch[:8]}", launch)["run_id"]
        for what in READS[:6]:
            if "layer" in what:
                continue
            mark = "&" if "?" in what else "?"
            answer = client.get(f"/api/v1/runs/{run_id}/{what}{mark}as=parquet")
            assert table(answer).num_rows == 0
