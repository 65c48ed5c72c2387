"""Reports into records: rank-tagged extremes, events of all ranks, health of the fleet. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from foreshock.api.collect.gathering import Addition
from foreshock.monitor.record import SCHEMA, TENSOR_TYPE, Event, Held, Place, StepReport
from foreshock.monitor.record.reports import event_key, rank_list

__all__ = ["fleet_scalars", "merge_events", "merged"]

_EVENT_NAMES: Final = ("kind", "micro_batch", "layer", "role", "rank", "detail")
_NAMED: Final = 16


def merged(table: pa.Table, additions: Sequence[Addition], world_size: int | None) -> pa.Table:
    """Records with what the ranks reported.

    A tensor's amax, with its rank, and its headroom are those of the rank that has the extreme,
    where that goes beyond the record's own; all other statistics stay.

    Args:
        table: Records of `record.SCHEMA`.
        additions: One per record.
        world_size: Ranks of the job, or None where it is not known.
    """
    table = table.combine_chunks()
    scalars, events = [], []
    rows = zip(table["scalars"].to_pylist(), table["events"].to_pylist(), additions, strict=True)
    for of_record, happened, addition in rows:
        known = dict(of_record or ())
        # What the training logged under such a name stays.
        scalars.append(list((fleet_scalars(addition.report, world_size) | known).items()))
        events.append(merge_events(happened or (), addition, world_size))
    columns = [
        table["step"],
        table["time"],
        pa.array(scalars, SCHEMA.field("scalars").type),
        pa.array(events, SCHEMA.field("events").type),
        _tensors(table["tensors"], [addition.report for addition in additions]),
    ]
    return pa.table(columns, schema=SCHEMA)


def fleet_scalars(report: StepReport | None, world_size: int | None) -> dict[str, float]:
    """Health of all ranks as scalars of the record.

    `ranks_heard`, `ranks_silent` (of the world size), `ranks_nonfinite` (that met a non-finite
    value), and for each name of `HEALTH` that was told `ranks_<name>` with the global rank that has
    it in `ranks_<name>_at`.
    """
    heard = 0 if report is None else report.ranks.bit_count()
    scalars = {"ranks_heard": float(heard)}
    if world_size is not None:
        scalars["ranks_silent"] = float(max(world_size - heard, 0))
    if report is None:
        return scalars
    scalars["ranks_nonfinite"] = float(report.broken.bit_count())
    for name, held in sorted(report.health.items()):
        scalars[f"ranks_{name}"] = held.value
        scalars[f"ranks_{name}_at"] = float(held.rank)
    return scalars


def merge_events(
    happened: Iterable[Mapping[str, Any]], addition: Addition, world_size: int | None
) -> list[dict[str, Any]]:
    """Events of a record and of the reports, each once.

    Of a non-finite value the rank that met it knows more than the record; what else happened stands
    as the record has it.
    """
    own = [Event(**dict(row)) for row in happened]
    report = addition.report
    told = {} if report is None else dict(report.events)
    events = []
    for event in own:
        better = told.pop(event_key(event), None)
        events.append(better if better is not None and event.kind == "nonfinite" else event)
    events += told.values()
    events += addition.late
    named = {event.rank for event in events if event.kind == "nonfinite"}
    events += _about_ranks(addition, named, world_size)
    return [{name: getattr(event, name) for name in _EVENT_NAMES} for event in events]


def _about_ranks(
    addition: Addition, named: Set[int | None], world_size: int | None
) -> Iterable[Event]:
    report = addition.report
    if report is not None:
        unnamed = [rank for rank in rank_list(report.broken) if rank not in named]
        if unnamed:
            detail = f"not finite on {_ranks(unnamed)} too"
            yield Event("ranks_nonfinite", rank=unnamed[0], detail=detail)
    silent = rank_list(addition.newly_silent)
    if silent:
        of = "" if world_size is None else f" of {world_size}"
        detail = f"no report of this step from {_ranks(silent)}{of}"
        yield Event("rank_silent", rank=silent[0], detail=detail)


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:_NAMED]))
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"{len(ranks)} rank{'s' if len(ranks) > 1 else ''} ({named}{more})"


def _tensors(column: pa.ChunkedArray, reports: Sequence[StepReport | None]) -> pa.Array:
    lists = column.chunk(0)
    if not any(report and (report.largest or report.tightest) for report in reports):
        return lists
    tensors = lists.flatten()
    columns = {f.name: pc.struct_field(tensors, f.name) for f in TENSOR_TYPE}
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    places = _places(columns)
    amax, ranks, headroom = (
        _Cells(columns[name]) for name in ("amax", "amax_rank", "headroom_log2")
    )
    for index, report in enumerate(reports):
        if report is None:
            continue
        for row in range(int(ends[index]), int(ends[index + 1])):
            place = places[row]
            if place is None:
                continue
            _raise_amax(amax, ranks, row, report.largest.get(place))
            _lower(headroom, row, report.tightest.get(place))
    columns |= {"amax": amax.array(), "amax_rank": ranks.array(), "headroom_log2": headroom.array()}
    struct = pa.StructArray.from_arrays(list(columns.values()), fields=list(TENSOR_TYPE))
    offsets = pa.array(ends, pa.int32())
    return pa.ListArray.from_arrays(offsets, struct, type=lists.type, mask=lists.is_null())


def _raise_amax(amax: _Cells, ranks: _Cells, row: int, held: Held | None) -> None:
    if held is None:
        return
    value = np.float32(held.value)
    if amax.missing[row] or value > amax.values[row]:
        amax.put(row, held.value)
        ranks.put(row, held.rank)
    elif value == amax.values[row] and ranks.missing[row]:
        ranks.put(row, held.rank)


def _lower(headroom: _Cells, row: int, held: Held | None) -> None:
    if held is None:
        return
    if headroom.missing[row] or np.float32(held.value) < headroom.values[row]:
        headroom.put(row, held.value)


def _places(columns: Mapping[str, pa.Array]) -> list[Place | None]:
    """Of each row the tensor it speaks of; None for a format that the run does not use."""
    names = ("layer", "role", "call_index", "expert", "what_if")
    rows = zip(*(columns[name].to_pylist() for name in names), strict=True)
    return [
        None if what_if else Place(layer, role, call, -1 if expert is None else expert)
        for layer, role, call, expert, what_if in rows
    ]


class _Cells:
    """A column to be changed here and there; null and NaN stay apart."""

    def __init__(self, column: pa.Array) -> None:
        self._type = column.type
        self.missing = column.is_null().to_numpy(zero_copy_only=False).copy()
        zeros = pc.fill_null(column, pa.scalar(0, column.type))
        self.values = zeros.to_numpy(zero_copy_only=False).copy()

    def put(self, row: int, value: float) -> None:
        self.values[row] = value
        self.missing[row] = False

    def array(self) -> pa.Array:
        return pa.array(self.values, self._type, mask=self.missing)
