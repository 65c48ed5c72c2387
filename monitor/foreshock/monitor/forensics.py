"""Where the first non-finite value of a step came from.

Reads only what a record is made of anyway, after the fact; it never looks at a tensor itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from foreshock.monitor.entry import Entry
from foreshock.monitor.record import FIELD_REDUCTIONS, Event
from foreshock.monitor.snapshot import Snapshot
from foreshock.monitor.table import SumTable
from foreshock.monitor.transfer import HostArray

__all__ = ["NonfiniteWatch"]

_FORWARD, _LOSS, _BACKWARD = range(3)
_NONFINITE: Final = list(FIELD_REDUCTIONS).index("nonfinite")


class NonfiniteWatch:
    """Turns the step in which a run stops being finite into events.

    A run that stays non-finite is reported once; it is reported again when it was finite in
    between.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._was_finite = True

    def events(
        self,
        snapshot: Snapshot,
        arrays: Mapping[str, HostArray],
        table: SumTable | None,
        scalars: Mapping[str, float],
    ) -> tuple[Event, ...]:
        """The first non-finite value of the step; and the first one in a layer, if it was none."""
        candidates = self._candidates(snapshot, arrays, table)
        events = [event for _, event in sorted(candidates, key=lambda candidate: candidate[0])]
        if not events:
            events = [
                Event("nonfinite", rank=self._rank, detail=f"{name} is {value}")
                for name, value in scalars.items()
                if not np.isfinite(value)
            ][:1]
        was_finite, self._was_finite = self._was_finite, not events
        if not events or not was_finite:
            return ()
        first = events[0]
        in_layer = next((event for event in events if event.layer is not None), None)
        return (first,) if in_layer in (None, first) else (first, in_layer)

    def _candidates(
        self, snapshot: Snapshot, arrays: Mapping[str, HostArray], table: SumTable | None
    ) -> Iterator[tuple[tuple[int, int, int], Event]]:
        """Non-finite values with (micro-batch, phase, order within it)."""
        if table is not None:
            yield from self._measured(table)
        yield from self._probed(snapshot, arrays["probes"])
        for micro_batch, loss in enumerate(arrays["losses"].tolist()):
            if not np.isfinite(loss):
                event = Event(
                    "nonfinite", micro_batch, rank=self._rank, detail=f"the loss is {loss}"
                )
                yield (micro_batch, _LOSS, 0), event
        # Norms are taken once per step: after every micro-batch, parameters after the gradients.
        late = 2**31
        for order, (group, role) in enumerate(
            (("gradients", "grad_weight"), ("parameters", "weight"))
        ):
            for position in np.flatnonzero(~np.isfinite(arrays[group])):
                name = snapshot.names[group][position]
                event = Event(
                    "nonfinite",
                    layer=name.rpartition(".")[0] or name,
                    role=role,
                    rank=self._rank,
                    detail=f"the norm of {name} is {arrays[group][position]}",
                )
                yield (late, order, int(position)), event

    def _measured(self, table: SumTable) -> Iterator[tuple[tuple[int, int, int], Event]]:
        for row in np.flatnonzero(np.isfinite(table.first)):
            detail = f"{table.values[row, _NONFINITE]:.0f} elements are not finite"
            place = (int(table.first[row]), int(row))
            yield self._found(table.entries[row], place, detail)

    def _probed(
        self, snapshot: Snapshot, sums: HostArray
    ) -> Iterator[tuple[tuple[int, int, int], Event]]:
        for position in np.flatnonzero(~np.isfinite(sums)):
            entry = snapshot.probe_entries[position]
            detail = f"the sum over the tensor is {sums[position]}"
            yield self._found(entry, (entry.micro_batch or 0, int(position)), detail)

    def _found(
        self, entry: Entry, place: tuple[int, int], detail: str
    ) -> tuple[tuple[int, int, int], Event]:
        micro_batch, order = place
        identity = entry.identity
        phase = _BACKWARD if identity.role == "grad_output" else _FORWARD
        event = Event("nonfinite", micro_batch, identity.layer, identity.role, self._rank, detail)
        return (micro_batch, phase, order), event
