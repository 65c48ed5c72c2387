"""The description of the service: stable, complete, and with examples that are true to it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from docs.openapi import TARGET, document

from foreshock.api.problems import MEDIA_TYPE

METHODS = ("get", "put", "post", "delete", "patch")
DOCUMENT: dict[str, Any] = json.loads(document())
OPERATIONS = {
    operation["operationId"]: (path, operation)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if method in METHODS
}
JSON = "application/json"
OPEN = ("/healthz", "/readyz")


def test_the_committed_description_is_the_services_own() -> None:
    """When it drifts: `python -m docs.openapi`, look at the difference, commit it."""
    assert TARGET.read_text(encoding="utf-8") == document(), "run: python -m docs.openapi"


def test_names_of_operations_read_like_calls() -> None:
    count = sum(m in METHODS for item in DOCUMENT["paths"].values() for m in item)
    assert len(OPERATIONS) == count, "operation ids are unique"
    assert [n for n in OPERATIONS if not re.fullmatch(r"[a-z]+(_[a-z]+)+", n)] == []
    assert {"get_run_series", "list_runs", "put_batch", "post_forecast"} <= OPERATIONS.keys()


def test_every_tag_is_explained() -> None:
    explained = {tag["name"] for tag in DOCUMENT["tags"] if tag["description"]}
    used = {tag for _, operation in OPERATIONS.values() for tag in operation["tags"]}
    assert used == explained


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_described(name: str) -> None:
    _, operation = OPERATIONS[name]
    assert operation["description"]
    for parameter in operation.get("parameters", ()):
        assert parameter.get("description"), parameter["name"]


def resolved(response: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in response:
        return response
    found: dict[str, Any] = DOCUMENT["components"]["responses"][response["$ref"].split("/")[-1]]
    return found


@pytest.mark.parametrize("name", OPERATIONS)
def test_errors_are_problems(name: str) -> None:
    path, operation = OPERATIONS[name]
    statuses = {int(status) for status in operation["responses"]}
    assert 500 in statuses
    assert path in OPEN or {401, 403, 421, 429, 503} <= statuses
    assert ("{" in path) <= (404 in statuses)
    assert ("requestBody" in operation) <= ({400, 413, 415, 422} <= statuses)
    for status, response in operation["responses"].items():
        if int(status) >= 400 and path not in OPEN:
            assert list(resolved(response)["content"]) == [MEDIA_TYPE], status


def contents() -> Iterator[Any]:
    for name, (_, operation) in OPERATIONS.items():
        for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
            yield pytest.param(media_type, content, id=f"{name}-request-{media_type}")
        for status, response in operation["responses"].items():
            for media_type, content in resolved(response).get("content", {}).items():
                yield pytest.param(media_type, content, id=f"{name}-{status}-{media_type}")


@pytest.mark.parametrize(("media_type", "content"), list(contents()))
def test_every_body_has_an_example_that_is_valid(media_type: str, content: dict[str, Any]) -> None:
    schema = content["schema"]
    if schema.get("format") == "binary":
        return
    examples = [example["value"] for example in content["examples"].values()]
    assert examples
    validator = jsonschema_rs.Draft202012Validator(
        schema | {"components": DOCUMENT["components"]}, validate_formats=True
    )
    for example in examples:
        assert [error.message for error in validator.iter_errors(example)] == []
        if media_type == JSON and schema.get("type") != "array":
            assert example, "an example shows something"


def test_every_answer_has_a_body_or_says_that_there_is_none() -> None:
    for name, (_, operation) in OPERATIONS.items():
        good = [s for s in operation["responses"] if s.startswith("2")]
        assert good, name
        for status in good:
            assert status == "204" or operation["responses"][status]["content"], name
