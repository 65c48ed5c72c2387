"""What a demonstration showed, from what the service stored: pure, and the last line for scripts.

Where things went wrong is decided by `labels` on the loss alone; when it was said, by the alerts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foreshock.api.labels import label_run

__all__ = ["Outcome", "outcome"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The demonstration in numbers.

    Attributes:
        seed: Of both runs.
        fault_step: Step at which the fault set in.
        first_alarm: First firing alarm of the failing run from there on; None if none came.
        onset: Start of the rise in the failing run's loss; None if the loss did not diverge.
        kind: Of that alarm, forecast or detection.
        cause: Likeliest cause that the alert named.
        layers: Layers that it named.
        delivered: Whether another process received that alert over HTTP.
        healthy_alarms: Alarms of the twin, and of the failing run before the fault.
    """

    seed: int
    fault_step: int
    first_alarm: int | None
    onset: int | None
    kind: str | None
    cause: str | None
    layers: tuple[str, ...]
    delivered: bool
    healthy_alarms: int

    @property
    def lead(self) -> int | None:
        """Steps from the alarm to the onset; negative when the alarm came after it."""
        if self.first_alarm is None or self.onset is None:
            return None
        return self.onset - self.first_alarm

    @property
    def complete(self) -> bool:
        """Whether there was an onset and an alarm at all."""
        return self.lead is not None

    def line(self) -> str:
        """The last line of the demonstration."""
        words = {
            "seed": self.seed,
            "fault_step": self.fault_step,
            "first_alarm": self.first_alarm,
            "onset": self.onset,
            "lead": self.lead,
            "cause": self.cause,
            "layers": ",".join(self.layers) or None,
            "delivered": "yes" if self.delivered else "no",
            "healthy_alarms": self.healthy_alarms,
        }
        return "demo: " + " ".join(f"{k}={'none' if v is None else v}" for k, v in words.items())


def outcome(
    *,
    seed: int,
    fault_step: int,
    steps: Sequence[int],
    losses: Sequence[float],
    alerts: Sequence[Mapping[str, Any]],
    twin_alerts: Sequence[Mapping[str, Any]],
    received: Sequence[str],
) -> Outcome:
    """Judge a demonstration.

    Args:
        seed: Of both runs.
        fault_step: Step at which the fault set in.
        steps: Steps of the failing run, rising.
        losses: Its loss at each.
        alerts: Its alerts as the service lists them.
        twin_alerts: Those of the healthy run.
        received: Texts of the messages that the receiver got.
    """
    fired = sorted(_fired(alerts), key=lambda alert: int(alert["fired_step"]))
    true = [alert for alert in fired if alert["fired_step"] >= fault_step]
    first = true[0] if true else None
    cause = (first.get("causes") or [{}])[0] if first else {}
    return Outcome(
        seed=seed,
        fault_step=fault_step,
        first_alarm=None if first is None else int(first["fired_step"]),
        onset=label_run(np.asarray(steps), np.asarray(losses, dtype=np.float64)).onset,
        kind=None if first is None else str(first["kind"]),
        cause=cause.get("name"),
        layers=tuple(cause.get("layers") or ())[:3],
        delivered=first is not None and _was_received(first, received),
        healthy_alarms=len(_fired(twin_alerts)) + len(fired) - len(true),
    )


def _fired(alerts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [alert for alert in alerts if alert.get("fired_step") is not None]


def _was_received(alert: Mapping[str, Any], received: Sequence[str]) -> bool:
    """Whether a message names the run and the step that the alert fired at."""
    run, step = str(alert["run"]), str(alert["fired_step"])
    return any(run in text and step in text for text in received)
