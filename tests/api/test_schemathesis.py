"""What the description allows and forbids, tried out on the running service by schemathesis.

Every operation; an answer of 5xx is a fault, and so is one that the description does not hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from docs.openapi import document
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.api.service import Service, make_records, new_launch, post_run, put_records

SCHEMA = schemathesis.openapi.from_dict(json.loads(document()))
OPERATIONS = {
    operation.definition.raw["operationId"]: operation
    for operation in (item.ok() for item in SCHEMA.get_all_operations() if isinstance(item, Ok))
}
# "Whatever fits the schema is accepted" is left out: no schema says which bytes are an Arrow stream
# or a cursor, or which layers a run has.
UNCHECKED: list[Any] = [positive_data_acceptance]
RUN = "llama-1b"
TOKEN = "a-token-for-schemathesis"


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that has the run of the examples, so that some questions meet something."""
    service = Service(
        tmp_path_factory.mktemp("schemathesis"),
        environment={"FORESHOCK_TOKEN": TOKEN, "FORESHOCK_TOKEN_REQUESTS": "0"},
    )
    service.start()
    with service.client(TOKEN) as client:
        launch = new_launch()
        run_id = post_run(client, RUN, launch)["run_id"]
        assert put_records(client, run_id, launch, 0, make_records(0, 20)).is_success
    yield service
    assert service.stop() == 0, service.log


def tried(service: Service, name: str, mode: GenerationMode, examples: int) -> None:
    operation = OPERATIONS[name]

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case: schemathesis.Case[Any]) -> None:
        if name in ("stream_events", "stream_run_events"):
            case.query = {**(case.query or {}), "seconds": 0.05}
        case.call_and_validate(
            base_url=service.url,
            headers={"Authorization": f"Bearer {TOKEN}"},
            excluded_checks=UNCHECKED,
            timeout=30,
        )

    one()


def cases() -> list[Any]:
    """Every operation with good requests, and with bad ones where a request can be bad."""
    found = []
    for name, operation in OPERATIONS.items():
        found.append(pytest.param(name, GenerationMode.POSITIVE, id=f"{name}-good"))
        raw = operation.definition.raw
        if raw.get("parameters") or "requestBody" in raw:
            found.append(pytest.param(name, GenerationMode.NEGATIVE, id=f"{name}-bad"))
    return found


@pytest.mark.parametrize(("name", "mode"), cases())
def test_the_service_is_as_described(subject: Service, name: str, mode: GenerationMode) -> None:
    tried(subject, name, mode, 8)


@pytest.mark.long
@pytest.mark.parametrize(("name", "mode"), cases())
def test_the_service_is_as_described_at_length(
    subject: Service, name: str, mode: GenerationMode
) -> None:
    tried(subject, name, mode, 60)
