"""A guard inside the training loop: reads the risk of each step and acts on it, by policy.

    guard = Guard(scorer, TorchControls(model, optimizer), GuardPolicy())
    w = watch(model, optimizer, run="llama-1b", sinks=[guard.sink])
    guard.attach(w)
    ...
    guard.step(step + 1)        # after each optimizer step; never waits, never raises

What to do is decided by pure functions (`decisions`); what can be done is what the loop's controls
offer (`controls`). Importing this package loads no torch; `TorchControls` and `Guard` do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foreshock.monitor.guard.actions import Action, RollBack
from foreshock.monitor.guard.policy import GuardPolicy
from foreshock.monitor.guard.state import Seen
from foreshock.monitor.record import Suspect

if TYPE_CHECKING:
    from foreshock.monitor.guard.controls import Controls, TorchControls
    from foreshock.monitor.guard.runtime import Entry, Guard
    from foreshock.monitor.guard.service import ServiceScorer

__all__ = [
    "Action",
    "Controls",
    "Entry",
    "Guard",
    "GuardPolicy",
    "RollBack",
    "Seen",
    "ServiceScorer",
    "Suspect",
    "TorchControls",
]

_PLACES = {
    "Controls": "controls",
    "TorchControls": "controls",
    "Entry": "runtime",
    "Guard": "runtime",
    "ServiceScorer": "service",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
