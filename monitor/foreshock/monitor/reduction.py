"""One step of many processes as one: what each packs, and what comes out of two reductions.

Pure numpy: one vector to be added up and one whose maximum is taken over the ranks. How vectors
travel is `ranks`' business. Extremes keep the rank that holds them, because a float32 magnitude
and a rank fit into the 53 bits that a float64 holds exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import ge
from typing import Any, Final, Self

import numpy as np

from foreshock.monitor.entry import Entry
from foreshock.monitor.record import FIELD_REDUCTIONS, Event, TensorIdentity
from foreshock.monitor.table import FIELDS, NEUTRAL, VECTORS, SumTable

__all__ = [
    "Agreement",
    "Merged",
    "RankStep",
    "Words",
    "as_single",
    "pack",
    "unpack",
    "with_norms",
    "words_of",
]

Array = np.ndarray[Any, np.dtype[np.float64]]

Widths = tuple[int, ...]
_NO_WIDTHS: Final = (0,) * len(VECTORS)
MAX_RANKS: Final = 2**20
_SUMS: Final = np.array([i for i, how in enumerate(FIELD_REDUCTIONS.values()) if how == "sum"])
_MAXES: Final = np.array([i for i, how in enumerate(FIELD_REDUCTIONS.values()) if how == "max"])
_MINS: Final = np.array([i for i, how in enumerate(FIELD_REDUCTIONS.values()) if how == "min"])
_AMAX: Final = FIELDS.index("amax")
_SCALE: Final = FIELDS.index("scale_log2")
_PLAIN: Final = 0.0
_LARGEST_OF: Final = ("step_seconds", "overhead_ratio")
"""Scalars of which the slowest rank's counts; all others are averaged."""


@dataclass(slots=True)
class RankStep:
    """One step as one process saw it.

    Attributes:
        step: 0-based optimizer step.
        rank: Global rank.
        scalars: By name.
        gradients, parameters: Norms of what this process holds, by parameter name.
        table: Sums of tensors, or None at a step without.
        broken: Whether this process met a non-finite value.
    """

    step: int
    rank: int
    scalars: Mapping[str, float]
    gradients: Mapping[str, float]
    parameters: Mapping[str, float]
    table: SumTable | None
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Words:
    """What one process knows by name; exchanged so that all pack alike.

    Attributes:
        tensors: Identity, and the widths of its vectors in the order of `VECTORS` (0 for none).
        parameters: Name and number of processes that hold the same piece; None for a plain
            parameter, of which every process that knows the name has a copy.
        scalars: Names.
    """

    tensors: Mapping[TensorIdentity, Widths] = field(default_factory=dict)
    parameters: Mapping[str, float | None] = field(default_factory=dict)
    scalars: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all processes know: the layout of the vectors.

    Attributes:
        tensors: Identities in order, with the widths of their vectors.
        parameters: Names in order, with the number of processes that hold the same piece, or
            `_PLAIN` where each process that has a number for it has the same one.
        scalars: Names in order.
        first_holder: For each identity, the lowest rank that has it.
    """

    tensors: tuple[tuple[TensorIdentity, Widths], ...] = ()
    parameters: tuple[tuple[str, float], ...] = ()
    scalars: tuple[str, ...] = ()
    first_holder: tuple[int, ...] = ()

    @classmethod
    def of(cls, words: Sequence[Words]) -> Self:
        """The union of what the ranks know, in an order that all of them arrive at."""
        tensors: dict[TensorIdentity, Widths] = {}
        holders: dict[TensorIdentity, int] = {}
        shares: dict[str, list[float | None]] = {}
        for rank, word in enumerate(words):
            for identity, widths in word.tensors.items():
                known = tensors.get(identity, _NO_WIDTHS)
                tensors[identity] = tuple(map(max, known, widths))
                holders.setdefault(identity, rank)
            for name, share in word.parameters.items():
                shares.setdefault(name, []).append(share)
        ordered = sorted(tensors, key=_place)
        return cls(
            tuple((identity, tensors[identity]) for identity in ordered),
            tuple((name, _copies(shares[name])) for name in sorted(shares)),
            tuple(sorted(frozenset().union(*(word.scalars for word in words)))),
            tuple(holders[identity] for identity in ordered),
        )

    def covers(self, words: Words) -> bool:
        """Whether a process can say all that it knows."""
        known = dict(self.tensors)
        return (
            words.scalars <= set(self.scalars)
            and set(words.parameters) <= {name for name, _ in self.parameters}
            and all(
                all(map(ge, known.get(identity, (-1,) * len(widths)), widths))
                for identity, widths in words.tensors.items()
            )
        )


def _place(identity: TensorIdentity) -> tuple[object, ...]:
    expert = -1 if identity.expert is None else identity.expert
    return (
        identity.layer,
        identity.role,
        identity.call_index,
        identity.format,
        identity.granularity,
        expert,
        identity.what_if,
    )


def _copies(shares: Sequence[float | None]) -> float:
    return next((share for share in shares if share is not None), _PLAIN)


def words_of(step: RankStep, shares: Mapping[str, float | None]) -> Words:
    """What a process knows by name after a step.

    Args:
        step: The step.
        shares: By parameter name, as in `Words.parameters`.
    """
    tensors: dict[TensorIdentity, Widths] = {}
    if step.table is not None:
        for row, entry in enumerate(step.table.entries):
            vectors = step.table.vectors
            tensors[entry.identity] = tuple(len(vectors[name].get(row, ())) for name in VECTORS)
    names = {*step.gradients, *step.parameters}
    return Words(tensors, {n: shares.get(n) for n in names}, frozenset(step.scalars))


def _key(values: Array, rank: int) -> Array:
    """Order-preserving integers of float32 values with the rank behind; -inf stays the least.

    Of equal values the lowest rank wins.
    """
    bits = np.asarray(values, dtype=np.float32).view(np.int32).astype(np.int64)
    ordered = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits).astype(np.float64)
    keys: Array = ordered * MAX_RANKS + (MAX_RANKS - 1 - rank)
    return np.where(np.isneginf(values) | np.isnan(values), -np.inf, keys)


def _unkey(keys: Array) -> tuple[Array, Array]:
    """Values and ranks of keys; -inf and -1 where nobody had a value."""
    nobody = np.isneginf(keys)
    safe = np.where(nobody, 0.0, keys)
    ordered = np.floor(safe / MAX_RANKS)
    ranks = MAX_RANKS - 1 - (safe - ordered * MAX_RANKS)
    magnitude = np.abs(ordered).astype(np.int64).astype(np.int32).view(np.float32)
    values = np.where(ordered < 0, -magnitude, magnitude).astype(np.float64)
    return np.where(nobody, -np.inf, values), np.where(nobody, -1.0, ranks)


def pack(
    step: RankStep, agreement: Agreement, *, complete: bool, tensors: bool
) -> tuple[Array, Array]:
    """One process's vectors: the one to add up and the one to take the maximum of.

    Args:
        step: What it saw.
        agreement: The layout.
        complete: Whether the agreement covers everything that it saw.
        tensors: Whether the step is one with tensor statistics, for all processes alike.
    """
    with np.errstate(over="ignore"):
        parts = [_pack_scalars(step, agreement), _pack_norms(step, agreement)]
        sums = [np.array([1.0, float(not complete)]), *(part[0] for part in parts)]
        maxes = [np.array([step.step, -step.step], dtype=float), *(part[1] for part in parts)]
        if tensors:
            of_tensors = _pack_tensors(step, agreement)
            sums.append(of_tensors[0])
            maxes.append(of_tensors[1])
    return np.concatenate(sums), np.concatenate(maxes)


def _pack_scalars(step: RankStep, agreement: Agreement) -> tuple[Array, Array]:
    values = np.array([step.scalars.get(name, 0.0) for name in agreement.scalars])
    given = np.array([name in step.scalars for name in agreement.scalars], dtype=float)
    # A maximum has no word for NaN: the sum carries it.
    largest = np.where((given > 0) & ~np.isnan(values), values, -np.inf)
    broken = np.array([float(MAX_RANKS - step.rank) if step.broken else -np.inf])
    return np.concatenate([values, given]), np.concatenate([largest, broken])


def _pack_norms(step: RankStep, agreement: Agreement) -> tuple[Array, Array]:
    parts = []
    for norms in (step.gradients, step.parameters):
        given = [(norms.get(name), copies) for name, copies in agreement.parameters]
        parts.append([0.0 if norm is None else norm**2 / (copies or 1.0) for norm, copies in given])
        parts.append([float(norm is not None) for norm, _ in given])
    return np.concatenate([np.array(part, dtype=float) for part in parts]), np.zeros(0)


def _pack_tensors(step: RankStep, agreement: Agreement) -> tuple[Array, Array]:
    rows = len(agreement.tensors)
    values = np.tile(NEUTRAL, (rows, 1))
    compared = np.full((rows, 2), -np.inf)
    seen = np.full(rows, -np.inf)
    vectors = [[np.zeros(width) for width in widths] for _, widths in agreement.tensors]
    place = {identity: row for row, (identity, _) in enumerate(agreement.tensors)}
    table = step.table
    for row, entry in enumerate(() if table is None else table.entries):
        at = place.get(entry.identity)
        if at is None or table is None:
            continue
        seen[at] = -table.first[row]
        compared[at] = _comparable(entry, table.values[row])
        if _is_copy(entry, agreement.first_holder[at], step.rank):
            continue
        values[at] = table.values[row]
        for vector, name in zip(vectors[at], VECTORS, strict=True):
            found = table.vectors[name].get(row)
            if found is not None:
                vector[: len(found)] = found
    known = ~np.isneginf(compared)
    sums = [
        values[:, _SUMS].ravel(),
        np.where(known, compared, 0.0).ravel(),
        known.astype(float).ravel(),
    ]
    first = np.where(np.isfinite(seen), seen * MAX_RANKS - step.rank, -np.inf)
    maxes = [
        _key(values[:, _AMAX], step.rank),
        values[:, _MAXES].ravel(),
        -values[:, _MINS].ravel(),
        first,
        _key(compared, step.rank).ravel(),
        _key(np.where(known, -compared, -np.inf), step.rank).ravel(),
    ]
    return np.concatenate([*sums, *itertools.chain(*vectors)]), np.concatenate(maxes)


def _is_copy(entry: Entry, first_holder: int, rank: int) -> bool:
    """Whether another process counts the same numbers."""
    if not entry.part.counted:
        return True
    # Data-parallel processes hold the same weights; pieces of one differ.
    return entry.identity.role == "weight" and not entry.part.sharded and rank != first_holder


def _comparable(entry: Entry, values: Array) -> tuple[float, float]:
    """What data-parallel peers must have in common: log2 of the scale, and a weight's amax."""
    scale = values[_SCALE] if entry.agreed and not entry.part.sharded else np.inf
    copied = entry.identity.role == "weight" and not entry.part.sharded
    amax = values[_AMAX] if copied and not entry.identity.what_if else -np.inf
    return (scale if np.isfinite(scale) else -np.inf, amax)


@dataclass(slots=True)
class Merged:
    """One step of all processes.

    Attributes:
        step: 0-based optimizer step.
        ranks: How many took part.
        incomplete: Whether somebody knows a name that the agreement lacks.
        in_step: Whether all were at the same step.
        scalars: Means, or the largest where the slowest rank counts.
        gradients, parameters: Norms over all processes by name.
        table: Sums over all processes, or None.
        first_broken: Lowest rank that met a non-finite value, or None.
        events: Disagreements and non-finite tensors of other ranks.
    """

    step: int
    ranks: int
    incomplete: bool
    in_step: bool
    scalars: dict[str, float]
    gradients: dict[str, float]
    parameters: dict[str, float]
    table: SumTable | None
    first_broken: int | None
    events: tuple[Event, ...] = ()


class _Reader:
    """Takes a vector apart from its front."""

    def __init__(self, vector: Array) -> None:
        self._vector = vector
        self._at = 0

    def take(self, count: int) -> Array:
        part = self._vector[self._at : self._at + count]
        self._at += count
        return part


def unpack(sums: Array, maxes: Array, agreement: Agreement, *, tensors: bool) -> Merged:
    """What the reduced vectors say."""
    added, largest = _Reader(sums), _Reader(maxes)
    ranks, incomplete = added.take(2)
    latest, earliest = largest.take(2)
    names = agreement.scalars
    values, given, most = added.take(len(names)), added.take(len(names)), largest.take(len(names))
    (broken,) = largest.take(1)
    scalars = {
        name: _scalar(name, value, count, top)
        for name, value, count, top in zip(names, values, given, most, strict=True)
        if count > 0
    }
    gradients, parameters = (_norms(added, agreement) for _ in range(2))
    table, events = _unpack_tensors(added, largest, agreement) if tensors else (None, ())
    return Merged(
        int(latest),
        int(ranks),
        bool(incomplete > 0),
        bool(latest == -earliest),
        scalars,
        gradients,
        parameters,
        table,
        None if np.isneginf(broken) else int(MAX_RANKS - broken),
        events,
    )


def _norms(added: _Reader, agreement: Agreement) -> dict[str, float]:
    count = len(agreement.parameters)
    squares, given = added.take(count), added.take(count)
    told = np.array([copies for _, copies in agreement.parameters])
    norms = np.sqrt(squares / np.where(told == _PLAIN, np.maximum(given, 1.0), 1.0))
    names = (name for name, _ in agreement.parameters)
    return {n: float(v) for n, v, there in zip(names, norms, given, strict=True) if there > 0}


def _scalar(name: str, total: float, count: float, largest: float) -> float:
    if name in _LARGEST_OF and not np.isnan(total):
        return float(largest)
    return float(total / count)


def _unpack_tensors(
    added: _Reader, largest: _Reader, agreement: Agreement
) -> tuple[SumTable, tuple[Event, ...]]:
    rows = len(agreement.tensors)
    values = np.tile(NEUTRAL, (rows, 1))
    values[:, _SUMS] = added.take(rows * len(_SUMS)).reshape(rows, len(_SUMS))
    compared, counts = added.take(rows * 2).reshape(rows, 2), added.take(rows * 2).reshape(rows, 2)
    vectors = [[added.take(width) for width in widths] for _, widths in agreement.tensors]
    _, holders = _unkey(largest.take(rows))
    values[:, _MAXES] = largest.take(rows * len(_MAXES)).reshape(rows, len(_MAXES))
    values[:, _MINS] = -largest.take(rows * len(_MINS)).reshape(rows, len(_MINS))
    first = largest.take(rows)
    highest, lowest = (
        largest.take(rows * 2).reshape(rows, 2),
        largest.take(rows * 2).reshape(rows, 2),
    )
    entries = tuple(Entry(identity, None) for identity, _ in agreement.tensors)
    events = [
        *_nonfinite_events(entries, first),
        *_disagreements(entries, compared, counts, highest, lowest),
    ]
    there = values[:, FIELDS.index("observations")] > 0
    at = np.flatnonzero(there)
    table = SumTable(
        tuple(entries[row] for row in at),
        values[at],
        np.full(len(at), np.inf),
        holders[at],
        {
            name: {new: vectors[old][i] for new, old in enumerate(at) if len(vectors[old][i])}
            for i, name in enumerate(VECTORS)
        },
    )
    return table, tuple(events)


def _nonfinite_events(entries: Sequence[Entry], first: Array) -> Iterable[Event]:
    for row in np.flatnonzero(np.isfinite(first)):
        # first = -micro_batch x MAX_RANKS - rank
        micro_batch, rank = divmod(-first[row], MAX_RANKS)
        identity = entries[int(row)].identity
        yield Event(
            "nonfinite",
            int(micro_batch),
            identity.layer,
            identity.role,
            int(rank),
            "elements are not finite",
        )


_COMPARED: Final = ("log2 of the scale", "amax")
_TOLERANCE: Final = 1e-6


def _disagreements(
    entries: Sequence[Entry], total: Array, counts: Array, highest: Array, lowest: Array
) -> Iterable[Event]:
    """Peers that must hold the same number and do not; the one farthest from the mean is named."""
    most, most_rank = _unkey(highest)
    least, least_rank = _unkey(lowest)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = most + least  # least holds the negative of the smallest value
        mean = total / counts
    for row, column in np.argwhere((counts > 1) & (spread > _TOLERANCE)):
        high, low = most[row, column], -least[row, column]
        # Of two peers neither is farther from their mean; then it is the larger one.
        above = high - mean[row, column] >= mean[row, column] - low - _TOLERANCE
        rank = most_rank[row, column] if above else least_rank[row, column]
        identity = entries[row].identity
        value, peers = high if above else low, counts[row, column]
        yield Event(
            "rank_disagrees",
            layer=identity.layer,
            role=identity.role,
            rank=int(rank),
            detail=(
                f"{_COMPARED[column]} is {value:.6g} there; {peers:.0f} peers have {low:.6g} "
                f"to {high:.6g}: wrong reduction group or a bad device"
            ),
        )


def as_single(step: RankStep) -> Merged:
    """One process alone."""
    return Merged(
        step.step,
        1,
        False,
        True,
        dict(step.scalars),
        dict(step.gradients),
        dict(step.parameters),
        step.table,
        step.rank if step.broken else None,
    )


def with_norms(merged: Merged) -> Merged:
    """Adds grad_norm and param_norm, the norms over all parameters."""
    scalars = dict(merged.scalars)
    with np.errstate(over="ignore", invalid="ignore"):
        for norms, name in ((merged.gradients, "grad_norm"), (merged.parameters, "param_norm")):
            if norms:
                scalars.setdefault(name, float(np.sqrt(np.square(list(norms.values())).sum())))
    return replace(merged, scalars=scalars)
