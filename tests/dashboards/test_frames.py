"""Frames as Infinity's backend and Grafana's transformations make them, on answers by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from dashboards.frames import Field, from_infinity, from_prometheus, transformed
from dashboards.infinity import Column, Read, joined, matrix
from dashboards.parts import organize

CELLS = Read(
    path="/x",
    columns=(Column("layer", "layer", "string"), Column("step", "step"), Column("value", "value")),
)
# The first layer has no value at step 0; the second is called by a number, as nn.Sequential does.
TEXT = "layer,step,value\nup,4,1.5\nup,8,NaN\n0,0,2.5\n0,4,\n"


def test_csv_is_typed_and_its_columns_are_sorted_by_name() -> None:
    assert from_infinity(TEXT, CELLS.query("A"))[:2] == (
        Field("layer", "string", ("up", "up", "0", "0")),
        Field("step", "number", (4.0, 8.0, 0.0, 4.0)),
    )
    value = from_infinity(TEXT, CELLS.query("A"))[2].values
    assert (value[0], value[3]) == (1.5, None)
    assert math.isnan(value[1])
    assert from_infinity("layer,step,value\n", CELLS.query("A")) == ()


def test_a_matrix_has_rising_steps_and_layers_in_the_order_they_came() -> None:
    steps = matrix("step", "layer", "value", numeric_rows=True)
    text = TEXT.replace("NaN", "3.5")
    (frame,) = transformed([from_infinity(text, CELLS.query("A"))], steps)
    assert frame == (
        Field("step\\layer", "number", (0.0, 4.0, 8.0)),
        Field("up", "number", (None, 1.5, 3.5)),
        Field("layer 0", "number", (2.5, None, None)),
    )
    assert transformed([()], steps) == [()]


def test_queries_are_joined_by_step_and_empty_ones_are_left_out() -> None:
    one = (Field("a", "number", (1.0, 2.0)), Field("step", "number", (0.0, 2.0)))
    two = (Field("b", "number", (3.0,)), Field("step", "number", (1.0,)))
    assert transformed([one, (), two], [joined("step")]) == [
        (
            Field("step", "number", (0.0, 1.0, 2.0)),
            Field("a", "number", (1.0, None, 2.0)),
            Field("b", "number", (None, 3.0, None)),
        )
    ]


@pytest.mark.parametrize(
    ("root", "columns", "expected"),
    [
        (
            "causes",
            (Column("layers.0", "Layer", "string"), Column("p", "P")),
            {"Layer": ("up", None), "P": (0.5, None)},
        ),
        ("causes.#.name", (), {"A": ("scale", "outlier")}),
    ],
)
def test_lists_of_json_are_found_by_a_plain_path(
    root: str, columns: tuple[Column, ...], expected: dict[str, Any]
) -> None:
    body = {
        "causes": [
            {"name": "scale", "layers": ["up", "down"], "p": 0.5},
            {"name": "outlier", "layers": [], "p": None},
        ]
    }
    frame = from_infinity(body, Read(path="/x", root=root, columns=columns).query("A"))
    assert {column.name: column.values for column in frame} == expected


def test_tables_of_prometheus_are_merged_by_their_labels() -> None:
    risks = from_prometheus([({"run": "a"}, 0.1), ({"run": "b"}, 0.2)], "Value #A")
    leads = from_prometheus([({"run": "b"}, 40.0)], "Value #B")
    shown = organize({"run": "Run", "Value #B": "Lead", "Value #A": "Risk"}).to_json()
    steps: list[Any] = [{"id": "merge", "options": {}}, shown]
    assert transformed([risks, leads], steps) == [
        (
            Field("Run", "string", ("a", "b")),
            Field("Lead", "number", (None, 40.0)),
            Field("Risk", "number", (0.1, 0.2)),
        )
    ]
