"""The likeliest cause of an alarm, from the latest records: what a guard's `diagnose` is.

Reads no store and no configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from foreshock.api.diagnosis import diagnose
from foreshock.api.run_window import run_window
from foreshock.monitor.record import StepRecord, Suspect, records_to_table

__all__ = ["suspect_of"]

_LONGEST: Final = 300


def suspect_of(records: Sequence[StepRecord]) -> Suspect | None:
    """Diagnose the end of a run's records.

    Args:
        records: In order of their steps, the last being the moment of the alarm.

    Returns:
        The likeliest cause; None when there are too few records.
    """
    latest = list(records)[-_LONGEST:]
    if not latest:
        return None
    window = run_window(records_to_table(latest))
    causes = diagnose(window)
    if not causes:
        return None
    first = causes[0]
    watched = {i.layer for i in window.identities}
    return Suspect(
        name=first.name,
        layers=first.layers,
        share=len(first.layers) / len(watched) if watched else 0.0,
        probability=first.probability,
        since=first.since_step,
    )
