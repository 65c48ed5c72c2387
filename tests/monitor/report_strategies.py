"""Reports for property tests: few places, ranks and values, so that they meet."""

from __future__ import annotations

from hypothesis import strategies as st

from foreshock.monitor.record import Event, Held, Place, StepReport
from foreshock.monitor.record.reports import HEALTH, event_key

ranks = st.integers(0, 9)
values = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0]), st.floats(allow_nan=False, allow_infinity=False, width=32)
)
helds = st.builds(Held, values, ranks)
places = st.builds(
    Place,
    st.sampled_from(["a", "b.up", "c"]),
    st.sampled_from(["input", "weight"]),
    st.integers(0, 1),
    st.sampled_from([-1, 0, 3]),
)
events = st.builds(
    Event,
    st.sampled_from(["nonfinite", "data_switch"]),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([None, "a"]),
    st.sampled_from([None, "input"]),
    ranks,
    st.sampled_from([None, "x", "y"]),
)


@st.composite
def reports(draw: st.DrawFn, step: int | None = None) -> StepReport:
    mask = draw(st.integers(1, 2**10 - 1))
    return StepReport(
        step=draw(st.integers(0, 5)) if step is None else step,
        ranks=mask,
        broken=mask & draw(st.integers(0, 2**10 - 1)),
        largest=draw(st.dictionaries(places, helds, max_size=6)),
        tightest=draw(st.dictionaries(places, helds, max_size=6)),
        events={event_key(e): e for e in draw(st.lists(events, max_size=4))},
        health=draw(st.dictionaries(st.sampled_from(list(HEALTH)), helds)),
    )
