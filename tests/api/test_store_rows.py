"""Taking batches apart: what cannot be told apart is refused."""

from __future__ import annotations

import json

import pytest

from foreshock.api.store_rows import split
from foreshock.monitor.record import RecordError, json_to_table


def tensor(**members: object) -> dict[str, object]:
    return {"layer": "a", "role": "input", "format": "e4m3", "numel": 1, **members}


def test_a_tensor_that_stands_twice_names_its_record() -> None:
    def body(*tensors: dict[str, object]) -> bytes:
        time = "2026-01-01T00:00:00Z"
        rows = [{"step": 0, "time": time}, {"step": 1, "time": time, "tensors": tensors}]
        return json.dumps({"records": rows}).encode()

    fine = (tensor(), tensor(expert=0), tensor(expert=1), tensor(what_if=True), tensor(layer="b"))
    assert split(json_to_table(body(*fine))).steps.num_rows == 2
    for twice in (tensor(), tensor(expert=1), tensor(call_index=0), tensor(granularity="tensor")):
        table = json_to_table(body(*fine, twice))
        with pytest.raises(RecordError, match="twice") as caught:
            split(table)
        assert caught.value.index == 1


def test_large_numbers_in_an_identity_are_told_apart() -> None:
    time = "2026-01-01T00:00:00Z"
    numbers = (0, 1, 2**31 - 1, 2**31 - 2)
    tensors = [
        tensor(expert=a, call_index=b, layer=f"l{c}")
        for a in numbers
        for b in numbers
        for c in "ab"
    ]
    rows = [{"step": step, "time": time, "tensors": tensors} for step in range(3)]
    assert split(json_to_table(json.dumps({"records": rows}))).tensors.num_rows == 96
