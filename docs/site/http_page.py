"""The page about the HTTP interface, from the committed OpenAPI description."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

__all__ = ["http_page"]

_SOURCE: Final = Path(__file__).parents[1] / "openapi.json"


def http_page() -> str:
    """Every operation and every body, as Markdown."""
    spec = json.loads(_SOURCE.read_text(encoding="utf-8"))
    lines = [
        "# HTTP",
        "",
        f"Version {spec['info']['version']}, from [openapi.json](../openapi.json).",
        "A running service lays the same out at `/docs`. Errors are `application/problem+json`.",
        "",
    ]
    for path, operations in spec["paths"].items():
        for method, operation in operations.items():
            lines += _operation(method, path, operation)
    lines += _errors(spec["components"].get("responses", {}))
    lines += ["## Bodies", ""]
    for name, schema in sorted(spec["components"]["schemas"].items()):
        lines += _schema(name, schema)
    return "\n".join(lines) + "\n"


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"## {operation['operationId']}", "", f"`{method.upper()} {path}`", "")
    yield from (operation.get("description") or operation.get("summary", ""), "")
    needs = [scopes for need in operation.get("security", ()) for scopes in need.values()]
    scopes = sorted({scope for needed in needs for scope in needed})
    if scopes:
        yield from (f"Scope: {', '.join(scopes)}.", "")
    if operation.get("parameters"):
        yield from ("| parameter | in | type | |", "|---|---|---|---|")
        for given in operation["parameters"]:
            need = "" if given.get("required") else " (optional)"
            kind, text = _type(given.get("schema", {})), _line(given.get("description"))
            yield f"| `{given['name']}` | {given['in']}{need} | {kind} | {text} |"
        yield ""
    if "requestBody" in operation:
        yield from (f"Body: {_media(operation['requestBody'].get('content', {}))}.", "")
    yield from _answers(operation["responses"])


def _answers(answers: Mapping[str, Any]) -> Iterator[str]:
    """Answers of their own as a table; the errors that all operations share as links."""
    shared = {status: a["$ref"] for status, a in answers.items() if "$ref" in a}
    yield from ("| answer | |", "|---|---|")
    for status, answer in answers.items():
        if status not in shared:
            media = _media(answer.get("content", {}))
            text = _line(answer.get("description"))
            yield f"| {status} | {text}{'; ' + media if media else ''} |"
    yield ""
    if shared:
        links = (f"[{status}](#errors)" for status in shared)
        yield from (f"Errors: {', '.join(links)}.", "")


def _errors(answers: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Errors", "", "| | |", "|---|---|")
    for name, answer in answers.items():
        yield f"| {name} | {_line(answer.get('description'))} |"
    yield ""


def _media(content: Mapping[str, Any]) -> str:
    return ", ".join(
        f"`{kind}`" + (f" {shown}" if (shown := _type(body.get("schema", {}))) != "any" else "")
        for kind, body in content.items()
    )


def _schema(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {name}", "", _line(schema.get("description")), "")
    members = schema.get("properties", {})
    if members:
        needed = schema.get("required", ())
        yield from ("| member | type | |", "|---|---|---|")
        for member, kind in members.items():
            optional = "" if member in needed else " (optional)"
            yield f"| `{member}` | {_type(kind)}{optional} | {_line(kind.get('description'))} |"
        yield ""


def _type(schema: Mapping[str, Any]) -> str:
    """A short name for a type; bodies of ours are links."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema:
            return " or ".join(dict.fromkeys(_type(part) for part in schema[word]))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"map of {_type(schema['additionalProperties'])}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _line(text: str | None) -> str:
    """Text as it can stand in a cell."""
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")
