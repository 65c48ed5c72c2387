"""What the ranks of a job tell about a step beside its record, and its form on the way.

A report holds extremes with their rank, non-finite events and health, of one rank or of many: two
reports of a step join into one that is no larger than the bounds below. Joining is idempotent,
commutative and associative (`join`), so that reports may come twice, late, in any order and through
any tree of relays. On the wire a bundle is JSON, see `encode_reports`.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeVar

import pyarrow as pa

from foreshock.monitor.record.model import ROLES, Event

__all__ = [
    "HEALTH",
    "MOST_EVENTS",
    "MOST_PLACES",
    "MOST_RANKS",
    "MOST_REPORTS",
    "EventKey",
    "Held",
    "Place",
    "ReportError",
    "StepReport",
    "compress",
    "decode_reports",
    "encode_reports",
    "event_key",
    "join",
    "rank_list",
    "rank_mask",
]

MOST_REPORTS: Final = 1024
"""Reports in one bundle."""
MOST_RANKS: Final = 2**17
"""Ranks of a job."""
MOST_PLACES: Final = 64
"""Tensors of each kind that a report names."""
MOST_EVENTS: Final = 128
"""Events that a report holds; of how many ranks met non-finite values is known beyond it."""

_LONGEST_NAME: Final = 512
_LONGEST_DETAIL: Final = 500
_LARGEST: Final = 2**62
_VERSION: Final = 1
# Below this zstd costs more than it saves.
_WORTH_COMPRESSING: Final = 256


EventKey = tuple[Any, ...]
"""What makes an event one and the same, see `event_key`."""


class ReportError(ValueError):
    """A report breaks the contract; the message says what would be right."""


class Place(NamedTuple):
    """A tensor of the model, whatever its format."""

    layer: str
    role: str
    call_index: int = 0
    expert: int = -1


class Held(NamedTuple):
    """A number and the global rank that has it."""

    value: float
    rank: int


def _largest(one: Held, other: Held) -> Held:
    """Of equal values the lowest rank's."""
    return max(one, other, key=lambda held: (held.value, -held.rank))


def _smallest(one: Held, other: Held) -> Held:
    return min(one, other)


_K = TypeVar("_K")
_V = TypeVar("_V")
_Choice = Callable[[Held, Held], Held]

HEALTH: Final[Mapping[str, _Choice]] = {
    "step_seconds_max": _largest,
    "step_seconds_min": _smallest,
    "overhead_ratio_max": _largest,
    "errors_max": _largest,
    "dropped_max": _largest,
    "device_bytes_max": _largest,
}
"""What is told of the ranks' health: duration of the step, the monitor's share of it, failures of
the monitor and losses of records and reports since the launch began, device memory in use. Value:
which of two ranks' numbers a join keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step as some ranks saw it.

    Attributes:
        step: 0-based optimizer step.
        ranks: Who reports, one bit per global rank (`rank_mask`).
        broken: Who met a non-finite value, likewise.
        largest: Tensors with the largest magnitudes; value: amax.
        tightest: Tensors with the least headroom; value: headroom_log2.
        events: By `event_key`.
        health: Names of `HEALTH` to values.

    Raises:
        ReportError: A value is not allowed.
    """

    step: int
    ranks: int
    broken: int = 0
    largest: Mapping[Place, Held] = field(default_factory=dict)
    tightest: Mapping[Place, Held] = field(default_factory=dict)
    events: Mapping[EventKey, Event] = field(default_factory=dict)
    health: Mapping[str, Held] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _count(self.step, "step")
        if not 0 < self.ranks < 1 << MOST_RANKS:
            raise ReportError(f"a report is of no rank, or of one beyond {MOST_RANKS - 1}")
        if self.broken & ~self.ranks:
            raise ReportError("a rank met a non-finite value and does not report")


def rank_mask(ranks: Iterable[int]) -> int:
    """A set of ranks as an integer, one bit each."""
    mask = 0
    for rank in ranks:
        mask |= 1 << rank
    return mask


def rank_list(mask: int) -> list[int]:
    """The ranks of a mask, ascending."""
    return [rank for first, last in _ranges(mask) for rank in range(first, last + 1)]


def event_key(event: Event) -> EventKey:
    """Which events are one and the same, in the order in which they are kept.

    A non-finite value belongs to its rank. What else happened, e.g. a data switch, all ranks tell,
    and one of them counts.
    """
    nonfinite = event.kind == "nonfinite"
    # The last member is a number or a text, told apart by the first.
    return (
        not nonfinite,
        -1 if event.micro_batch is None else event.micro_batch,
        event.kind,
        event.layer or "",
        event.role or "",
        (-1 if event.rank is None else event.rank) if nonfinite else (event.detail or ""),
    )


def join(one: StepReport, other: StepReport) -> StepReport:
    """Two reports of a step as one.

    A semilattice: joining is idempotent, commutative and associative, bounds included, because what
    is among the first of a whole is among the first of the part it comes from.

    Raises:
        ReportError: They are of different steps.
    """
    if one.step != other.step:
        raise ReportError(f"reports of the steps {one.step} and {other.step} cannot be joined")
    return StepReport(
        step=one.step,
        ranks=one.ranks | other.ranks,
        broken=one.broken | other.broken,
        largest=_first(_joined(one.largest, other.largest, _largest), sign=-1),
        tightest=_first(_joined(one.tightest, other.tightest, _smallest), sign=1),
        events=_first_events(_joined(one.events, other.events, _lower_rank)),
        health={
            name: _either(one.health.get(name), other.health.get(name), choice)
            for name, choice in HEALTH.items()
            if name in one.health or name in other.health
        },
    )


def _joined(a: Mapping[_K, _V], b: Mapping[_K, _V], choice: Callable[[_V, _V], _V]) -> dict[_K, _V]:
    merged = dict(a)
    for key, value in b.items():
        merged[key] = choice(merged[key], value) if key in merged else value
    return merged


def _either(one: Held | None, other: Held | None, choice: _Choice) -> Held:
    if one is None or other is None:
        found = one or other
        assert found is not None
        return found
    return choice(one, other)


def _lower_rank(one: Event, other: Event) -> Event:
    return min(one, other, key=lambda e: (-1 if e.rank is None else e.rank, e.detail or ""))


def _first(places: dict[Place, Held], sign: int) -> dict[Place, Held]:
    if len(places) <= MOST_PLACES:
        return places
    return dict(
        heapq.nsmallest(MOST_PLACES, places.items(), key=lambda item: (sign * item[1].value, item))
    )


def _first_events(events: dict[EventKey, Event]) -> dict[EventKey, Event]:
    if len(events) <= MOST_EVENTS:
        return events
    return {key: events[key] for key in heapq.nsmallest(MOST_EVENTS, events)}


def encode_reports(reports: Iterable[StepReport]) -> bytes:
    """A bundle of reports of one launch as JSON.

    `{"version": 1, "layers": [name, ...], "reports": [{"step", "ranks": [first, last, ...],
    "broken": likewise, "largest": [[layer, role, value, rank, call_index, expert], ...],
    "tightest": likewise, "events": [...], "health": {name: [value, rank]}}, ...]}`; layers and
    roles stand as indices, what is empty or a default is left out.
    """
    layers: dict[str, int] = {}
    items = [_encode(report, layers) for report in reports]
    body = {"version": _VERSION, "layers": list(layers), "reports": items}
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()


def compress(body: bytes) -> tuple[bytes, str]:
    """A body and its Content-Encoding: zstd where that is smaller."""
    if len(body) >= _WORTH_COMPRESSING:
        smaller = pa.Codec("zstd", 3).compress(body, asbytes=True)
        if len(smaller) < len(body):
            return smaller, "zstd"
    return body, "identity"


def _encode(report: StepReport, layers: dict[str, int]) -> dict[str, Any]:
    def places(held: Mapping[Place, Held]) -> list[list[float]]:
        rows = []
        for place, (value, rank) in held.items():
            more = [place.call_index, place.expert]
            if place.expert < 0:
                more.pop()
            if more == [0]:
                more = []
            layer = layers.setdefault(place.layer, len(layers))
            rows.append([layer, ROLES.index(place.role), value, rank, *more])
        return rows

    item: dict[str, Any] = {
        "step": report.step,
        "ranks": [bound for pair in _ranges(report.ranks) for bound in pair],
        "broken": [bound for pair in _ranges(report.broken) for bound in pair],
        "largest": places(report.largest),
        "tightest": places(report.tightest),
        "events": [_encode_event(event) for event in report.events.values()],
        "health": {name: list(held) for name, held in report.health.items()},
    }
    return {name: value for name, value in item.items() if value not in ([], {})}


def _encode_event(event: Event) -> dict[str, Any]:
    values = {
        "kind": event.kind,
        "micro_batch": event.micro_batch,
        "layer": event.layer,
        "role": event.role,
        "rank": event.rank,
        "detail": event.detail[:_LONGEST_DETAIL] if event.detail else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _ranges(mask: int) -> list[tuple[int, int]]:
    """First and last rank of each run of set bits."""
    found = []
    at = 0
    while mask:
        zeros = (mask & -mask).bit_length() - 1
        mask >>= zeros
        ones = (~mask & (mask + 1)).bit_length() - 1
        found.append((at + zeros, at + zeros + ones - 1))
        mask >>= ones
        at += zeros + ones
    return found


def decode_reports(body: bytes) -> list[StepReport]:
    """Read a bundle.

    Raises:
        ReportError: It is no bundle, or a report in it breaks the contract; names which.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        raise ReportError(f'the body is not {{"version": {_VERSION}, "reports": [...]}}')
    layers = _list(document, "layers")
    if not all(isinstance(name, str) and 1 <= len(name) <= _LONGEST_NAME for name in layers):
        raise ReportError(f"layers are no names of 1 to {_LONGEST_NAME} characters")
    items = _list(document, "reports", MOST_REPORTS)
    if not items:
        raise ReportError("the bundle holds no report")
    found = []
    for index, item in enumerate(items):
        try:
            found.append(_decode(item, layers))
        except ReportError as error:
            raise ReportError(f"report {index}: {error}") from None
    return found


def _decode(item: object, layers: Sequence[str]) -> StepReport:
    if not isinstance(item, dict):
        raise ReportError("is not an object")
    events = [_decode_event(value) for value in _list(item, "events", MOST_EVENTS)]
    health = item.get("health", {})
    if not isinstance(health, dict) or not health.keys() <= HEALTH.keys():
        raise ReportError(f"health is not an object with some of {', '.join(HEALTH)}")
    return StepReport(
        step=_count(item.get("step"), "step"),
        ranks=_decode_ranks(_list(item, "ranks"), "ranks"),
        broken=_decode_ranks(_list(item, "broken"), "broken"),
        largest=dict(_decode_place(value, layers) for value in _list(item, "largest", MOST_PLACES)),
        tightest=dict(
            _decode_place(value, layers) for value in _list(item, "tightest", MOST_PLACES)
        ),
        events={event_key(event): event for event in events},
        health={name: _decode_held(value) for name, value in health.items()},
    )


def _decode_ranks(bounds: Sequence[object], name: str) -> int:
    mask, next_first = 0, 0
    if len(bounds) % 2:
        raise ReportError(f"{name} are not pairs of a first and a last rank")
    for first, last in zip(bounds[::2], bounds[1::2], strict=True):
        start = _count(first, "a rank", MOST_RANKS)
        end = _count(last, "a rank", MOST_RANKS)
        if not next_first <= start <= end:
            raise ReportError(f"{name} are not ranges of ranks in ascending order")
        mask |= ((1 << (end - start + 1)) - 1) << start
        next_first = end + 1
    return mask


def _decode_place(value: object, layers: Sequence[str]) -> tuple[Place, Held]:
    if not isinstance(value, list) or not 4 <= len(value) <= 6:
        raise ReportError("an extreme is not [layer, role, value, rank, call_index, expert]")
    place = Place(
        layers[_count(value[0], "an extreme's layer", len(layers))],
        ROLES[_count(value[1], "an extreme's role", len(ROLES))],
        _count(value[4], "call_index", 2**31) if len(value) > 4 else 0,
        _count(value[5], "expert", 2**31) if len(value) > 5 else -1,
    )
    return place, _decode_held(value[2:4])


def _decode_held(value: object) -> Held:
    if not isinstance(value, list) or len(value) != 2:
        raise ReportError("a number is not [value, rank]")
    return Held(_number(value[0]), _count(value[1], "a rank", MOST_RANKS))


def _number(value: object) -> float:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return float(value)
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ReportError(f"a value is {repr(value)[:40]}; allowed: a finite number")


def _decode_event(value: object) -> Event:
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ReportError('an event is not an object with a "kind"')
    return Event(
        _text(value, "kind", 64) or "",
        _optional_count(value, "micro_batch", 2**31),
        _text(value, "layer", _LONGEST_NAME),
        _text(value, "role", 64),
        _optional_count(value, "rank", MOST_RANKS),
        _text(value, "detail", _LONGEST_DETAIL),
    )


def _text(value: Mapping[str, Any], name: str, longest: int) -> str | None:
    text = value.get(name)
    if text is not None and (not isinstance(text, str) or len(text) > longest):
        raise ReportError(f"an event's {name} is no text of at most {longest} characters")
    if text is not None:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ReportError(f"an event's {name} is no valid Unicode") from None
    return text


def _list(item: Mapping[str, Any], name: str, most: int | None = None) -> list[Any]:
    value = item.get(name, [])
    if not isinstance(value, list):
        raise ReportError(f"{name} is not a list")
    if most is not None and len(value) > most:
        raise ReportError(f"{name} has {len(value)} members; allowed: at most {most}")
    return value


def _optional_count(item: Mapping[str, Any], name: str, below: int) -> int | None:
    value = item.get(name)
    return None if value is None else _count(value, name, below)


def _count(value: object, name: str, below: int = _LARGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < below:
        shown = repr(value)[:40]
        raise ReportError(f"{name} is {shown}; allowed: a whole number from 0 to {below - 1}")
    return value
