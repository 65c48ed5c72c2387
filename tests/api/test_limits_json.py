"""JSON that nests without end, or is large where nothing large belongs: an answer, not a crash."""

from __future__ import annotations

import httpx
import pytest

from foreshock.api.wire import JSON
from tests.api.service import batch_path, new_launch, post_run
from tests.api.test_routes_batches import is_problem

HEADERS = {"Content-Type": JSON}


@pytest.mark.parametrize("depth", [500, 5_000, 1_000_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_json_is_a_problem(
    client: httpx.Client, depth: int, opening: str, closing: str
) -> None:
    launch = new_launch()
    run = post_run(client, "deep", launch)["run_id"]
    deep = opening * depth + "1" + closing * depth
    records = f'{{"records":{deep}}}'
    announced = f'{{"run":"deep","launch_id":"{new_launch()}","config":{{"x":{deep}}}}}'
    for answer in (
        client.put(batch_path(run, launch, 0), content=records, headers=HEADERS),
        client.post("/api/v1/forecast", content=records, headers=HEADERS),
        client.post("/api/v1/runs", content=announced, headers=HEADERS),
        client.post("/login", content=deep, headers=HEADERS),
    ):
        assert answer.status_code in (400, 422), answer.text[:200]
        assert len(is_problem(answer, answer.status_code)) < 20_000
    assert client.get("/healthz").status_code == 200


def test_a_config_that_every_list_would_have_to_read_is_refused(client: httpx.Client) -> None:
    body = {"run": "large", "launch_id": new_launch(), "config": {"x": "y" * 5_000_000}}
    assert "config" in is_problem(client.post("/api/v1/runs", json=body), 422)
    body["config"] = {"x": "y" * 1_000_000}
    assert client.post("/api/v1/runs", json=body).status_code == 201
