"""Which media type an answer has, by Accept and by `as=`."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.api.bodies import CSV, PARQUET
from foreshock.api.negotiation import TABULAR, choose
from foreshock.api.problems import Problem
from foreshock.api.wire import ARROW, JSON


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        ("text/csv", CSV),
        ("text/*", CSV),
        ("TEXT/CSV ; charset=utf-8", CSV),
        (f"text/csv;q=0.5, {PARQUET}", PARQUET),
        (f"{ARROW};q=0.2, application/json;q=0.1", ARROW),
        ("application/json;q=0, */*", CSV),
        (f"*/*;q=0.1, {PARQUET};q=0.05", JSON),
        ("text/csv, application/json", CSV),
        ("application/json, text/csv", JSON),
        ("image/png, text/csv;q=0.001", CSV),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", JSON),
    ],
)
def test_the_best_liked_is_taken(accept: str, expected: str) -> None:
    assert choose(accept) == expected


@pytest.mark.parametrize(
    "accept", ["image/png", "text/csv;q=0", "application/json;q=nonsense", "text/csv;q=-1"]
)
def test_what_there_is_not_is_told(accept: str) -> None:
    with pytest.raises(Problem) as refused:
        choose(accept)
    assert refused.value.status == 406
    assert all(name in refused.value.detail for name in TABULAR)


def test_the_address_goes_before_the_header() -> None:
    assert choose("application/json", "parquet") == PARQUET
    assert choose("image/png", "arrow") == ARROW


@given(st.text(alphabet=st.characters(codec="latin-1"), max_size=80))
def test_no_header_breaks_it(accept: str) -> None:
    with suppress(Problem):
        assert choose(accept) in TABULAR
