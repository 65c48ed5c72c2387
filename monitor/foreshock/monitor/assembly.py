"""From what came off the device to a record: the worker thread's half of a step.

Pure numpy and Arrow but for the exchange with other processes; never sees a model. Merging is
`SumTable` over micro-batches and `Ranks` over processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from foreshock.monitor.budget import Budget, Plan, PlanBook
from foreshock.monitor.containment import Containment
from foreshock.monitor.forensics import NonfiniteWatch
from foreshock.monitor.rank_reports import Reporter
from foreshock.monitor.ranks import Ranks, RanksLost
from foreshock.monitor.record import (
    FIELD_REDUCTIONS,
    Event,
    IdentityColumns,
    PlainColumns,
    TensorIdentity,
    record_batch,
)
from foreshock.monitor.record.model import ROLES
from foreshock.monitor.reduction import Merged, RankStep, as_single, with_norms
from foreshock.monitor.snapshot import Snapshot
from foreshock.monitor.table import SumTable, extremes_only
from foreshock.monitor.transfer import HostArray

__all__ = ["Assembler"]

_STEPS_AHEAD: Final = 32
_FIELDS = len(FIELD_REDUCTIONS)
_NONFINITE = list(FIELD_REDUCTIONS).index("nonfinite")


class Assembler:
    """Makes the records of one run.

    Args:
        layers: Layer names in the order in which their rows shall stand.
        rank: This process's global rank.
        ranks: The other processes, or None.
        shares: By parameter name, how many processes hold the same piece.
        plans: When tensors are measured, for all processes alike.
        budget: Changes the plans; None leaves the first one in force.
        reporter: Tells a relay about every step of this process; None tells nobody.
    """

    def __init__(
        self,
        layers: Sequence[str],
        *,
        rank: int,
        ranks: Ranks | None = None,
        shares: Mapping[str, float | None] | None = None,
        plans: PlanBook | None = None,
        budget: Budget | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self._reporter = reporter
        self._order = {name: position for position, name in enumerate(layers)}
        self._rank = rank
        self._ranks = ranks
        # Added to as parameters are: the very mapping is kept.
        self._shares = {} if shares is None else shares
        self._nonfinite = NonfiniteWatch(rank)
        self._columns: tuple[tuple[TensorIdentity, ...], IdentityColumns] | None = None
        self._guard = Containment("exchange with the other processes")
        self._plans = plans or PlanBook(Plan())
        self._budget = budget
        self._kernel_seconds = 0.0

    @property
    def guard(self) -> Containment:
        """Where failures of the exchange are counted."""
        return self._guard

    @property
    def kernel_seconds(self) -> float:
        """Time of the kernels of a measured step on the device, as last seen; 0 on a CPU."""
        return self._kernel_seconds

    def record(self, snapshot: Snapshot, events: Sequence[Event] = ()) -> pa.RecordBatch | None:
        """The record of a step, with more events than the snapshot holds.

        Waits for the device and for the other processes.

        Returns:
            None in a process whose part another one records.
        """
        arrays = snapshot.packed.arrays()
        self._kernel_seconds = snapshot.kernel_seconds() or self._kernel_seconds
        scalars = _scalars(snapshot, arrays)
        table = self._table(snapshot, arrays) if snapshot.measured else None
        found = self._nonfinite.events(snapshot, arrays, table, scalars)
        step = RankStep(
            snapshot.step,
            self._rank,
            scalars,
            dict(zip(snapshot.names["gradients"], arrays["gradients"].tolist(), strict=True)),
            dict(zip(snapshot.names["parameters"], arrays["parameters"].tolist(), strict=True)),
            table,
            broken=bool(found),
        )
        if self._reporter is not None:
            self._reporter.take(step, (*snapshot.events, *events, *found))
        # Not what this process measured, but what all of them were to measure.
        planned = snapshot.measured
        if self._ranks is not None:
            planned = self._plans.at(snapshot.step).cadence.measures(snapshot.step)
        merged = with_norms(self._merge(step, measured=planned))
        events = (*events, *self._keep_to_budget(merged, planned))
        if self._rank != 0:
            return None
        # Of this process's own non-finite values more is known than a reduction carries.
        others = tuple(
            event
            for event in merged.events
            if event.kind != "nonfinite" or event.rank != self._rank
        )
        return self._batch(snapshot, merged, (*snapshot.events, *events, *found, *others))

    def _keep_to_budget(self, merged: Merged, planned: bool) -> list[Event]:
        if self._budget is None or not {"step_seconds", "overhead_ratio"} <= merged.scalars.keys():
            return []
        plan = self._budget.take(
            step_seconds=merged.scalars["step_seconds"],
            overhead_ratio=merged.scalars["overhead_ratio"],
            measured=planned,
        )
        if plan is None:
            return []
        # Other processes may be a few steps ahead of this worker; all change at the same one.
        start = merged.step + (_STEPS_AHEAD if merged.ranks > 1 else 1)
        self._plans.add(start, plan)
        share = self._budget.expected
        detail = f"tensors {plan} from step {start} on; {share:.2%} of the step time expected"
        return [Event("budget", detail=detail)]

    def _merge(self, step: RankStep, *, measured: bool) -> Merged:
        if self._ranks is not None:
            try:
                return self._ranks.merge(step, self._shares, tensors=measured)
            except RanksLost as error:
                self._ranks = None
                self._guard.report(error)
        return as_single(step)

    def _table(self, snapshot: Snapshot, arrays: Mapping[str, HostArray]) -> SumTable:
        sums = arrays["sums"].reshape(len(snapshot.entries), _FIELDS)
        device = arrays["device"].reshape(len(snapshot.device_entries), _FIELDS + 1)
        history = extremes_only(arrays["history"].reshape(-1, 2), snapshot.history_entries)
        micro_batches = np.array([e.micro_batch or 0 for e in snapshot.entries], dtype=float)
        first = np.where(sums[:, _NONFINITE] > 0, micro_batches, np.inf)
        return SumTable.of(
            (*snapshot.entries, *snapshot.history_entries, *snapshot.device_entries),
            np.concatenate([sums, history, device[:, :_FIELDS]]),
            np.concatenate([first, np.full(len(history), np.inf), device[:, _FIELDS]]),
            rank=self._rank,
            vectors={
                "channels": _pieces(snapshot.channels, arrays["channels"]),
                "blocks": _pieces(snapshot.blocks, arrays["blocks"]),
                "exponents": _pieces(snapshot.exponents, arrays["exponents"]),
                "mus": _pieces(snapshot.mus, arrays["mus"]),
            },
        )

    def _batch(self, snapshot: Snapshot, merged: Merged, events: Sequence[Event]) -> pa.RecordBatch:
        identities = statistics = sources = exponents = None
        if merged.table is not None and merged.table.entries:
            table = merged.table.sorted(self._order, ROLES)
            identities = self._identities(tuple(entry.identity for entry in table.entries))
            statistics = _statistics(table)
            sources = [entry.source for entry in table.entries]
            exponents = _exponents(table)
        return record_batch(
            step=snapshot.step,
            time=snapshot.time,
            scalars=merged.scalars,
            events=tuple(events),
            identities=identities,
            statistics=statistics,
            sources=sources,
            exponents=exponents,
        )

    def _identities(self, identities: tuple[TensorIdentity, ...]) -> IdentityColumns:
        # The set of tensors of a run rarely changes.
        if self._columns is None or self._columns[0] != identities:
            self._columns = (identities, IdentityColumns.of(identities))
        return self._columns[1]


def _statistics(table: SumTable) -> PlainColumns:
    count = len(table.entries)
    columns: dict[str, tuple[HostArray, Any]] = {}
    what_if = np.array([entry.identity.what_if for entry in table.entries], dtype=bool)
    for rows in table.alike():
        found = table.sums(rows).columns(what_if=what_if[rows])
        for name, (values, valid) in found.items():
            if name not in columns:
                columns[name] = np.zeros(count), np.zeros(count, dtype=bool)
            whole, shown = columns[name]
            whole[rows], shown[rows] = values, valid
    if mus := table.vectors["mus"]:
        columns["mu"] = np.zeros(count), np.zeros(count, dtype=bool)
        for row, (total, seen) in mus.items():
            columns["mu"][0][row], columns["mu"][1][row] = total / max(seen, 1.0), seen > 0
    # What was lost in a cast can no longer be read from its codes.
    codes = [row for row, entry in enumerate(table.entries) if entry.source == "codes"]
    for name in ("underflow_ratio", "sqnr_db"):
        columns[name][1][codes] = False
    return columns


def _exponents(table: SumTable) -> list[list[int] | None] | None:
    of = table.vectors["exponents"]
    if not of:
        return None
    rows = (of.get(row) for row in range(len(table.entries)))
    return [None if counts is None else counts.astype(np.int64).tolist() for counts in rows]


def _pieces(
    widths: Sequence[tuple[TensorIdentity, int]], values: HostArray
) -> dict[TensorIdentity, HostArray]:
    ends = np.cumsum([width for _, width in widths])
    starts = [0, *ends[:-1]]
    return {
        identity: values[start:end]
        for (identity, _), start, end in zip(widths, starts, ends, strict=False)
    }


def _scalars(snapshot: Snapshot, arrays: Mapping[str, HostArray]) -> dict[str, float]:
    found: dict[str, float] = {}
    if arrays["losses"].size:
        found["loss"] = float(arrays["losses"].mean())
    logged = zip(snapshot.names["scalars"], arrays["scalars"].tolist(), strict=True)
    # What the user logged stands against what was found.
    return found | dict(snapshot.scalars) | dict(logged)
