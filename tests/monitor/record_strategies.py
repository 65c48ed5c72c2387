"""Hypothesis strategies for records; shared by the tests of Arrow, JSON and the service."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import strategies as st

from foreshock.monitor.formats import FORMATS, GRANULARITIES
from foreshock.monitor.record import (
    ROLES,
    SOURCES,
    STATISTICS,
    Event,
    StepRecord,
    TensorIdentity,
    TensorStatistics,
)

INT32 = st.integers(-(2**31), 2**31 - 1)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
FLOAT32 = st.floats(width=32)  # NaN and infinities among them


def statistic(name: str) -> st.SearchStrategy[float | int | None]:
    if name == "nonfinite_count":
        return st.none() | st.integers(0, 2**60)
    return st.none() | (INT32 if name in ("amax_rank", "top_channel") else FLOAT32)


IDENTITIES = st.builds(
    TensorIdentity,
    layer=NAMES,
    role=st.sampled_from(ROLES),
    format=st.sampled_from(sorted(FORMATS)),
    call_index=st.integers(0, 100),
    expert=st.none() | INT32,
    granularity=st.sampled_from(GRANULARITIES),
    what_if=st.booleans(),
)

TENSORS = st.builds(
    TensorStatistics,
    identity=IDENTITIES,
    numel=st.integers(0, 2**60),
    observations=st.integers(0, 2**31 - 1),
    **{name: statistic(name) for name in STATISTICS},
    source=st.none() | st.sampled_from(SOURCES),
    exponents=st.none()
    | st.builds(lambda at, n: tuple(n * (i == at) for i in range(256)), st.integers(0, 255), INT32),
)

EVENTS = st.builds(
    Event,
    kind=NAMES,
    micro_batch=st.none() | INT32,
    layer=st.none() | NAMES,
    role=st.none() | NAMES,
    rank=st.none() | INT32,
    detail=st.none() | NAMES,
)

TIMES = st.datetimes(
    min_value=datetime(1970, 1, 2),  # noqa: DTZ001 - hypothesis wants naive bounds
    max_value=datetime(2200, 1, 1),  # noqa: DTZ001
    timezones=st.just(UTC),
)

RECORDS = st.builds(
    StepRecord,
    step=st.integers(0, 2**62),
    time=TIMES,
    scalars=st.dictionaries(NAMES, st.floats(), max_size=4),
    tensors=st.lists(TENSORS, max_size=3).map(tuple),
    events=st.lists(EVENTS, max_size=2).map(tuple),
)
