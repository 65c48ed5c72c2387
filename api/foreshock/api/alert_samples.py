"""An alert of each kind, made up but of the usual shape: what a preview shows without a service."""

from __future__ import annotations

from datetime import UTC, datetime

from foreshock.api.alert_model import (
    OF_RISK,
    Alert,
    AlertContent,
    AlertKind,
    AlertSubject,
    Stakes,
    Transition,
)

__all__ = ["sample_alert"]

_STEP = 4120


def sample_alert(kind: AlertKind, transition: Transition = "firing") -> Alert:
    """An alert of a run that does not exist.

    Args:
        kind: Which.
        transition: resolved gives one that is over.
    """
    over = transition == "resolved"
    now = datetime.now(UTC)
    return Alert(
        id=17,
        subject=AlertSubject("0f" * 16, "pretraining", "llama-1b-fp8", 2),
        kind=kind,
        state="resolved" if over else "firing",
        opened_step=_STEP - 2,
        fired_step=_STEP,
        resolved_step=_STEP + 60 if over else None,
        starts_at=now,
        ends_at=now if over else None,
        end_reason="risk is back to normal" if over else None,
        content=_content(kind),
        correct=None,
        note=None,
    )


def _content(kind: AlertKind) -> AlertContent:
    if kind not in OF_RISK:
        return AlertContent(step=_STEP)
    cause = {
        "name": "activation_outlier",
        "probability": 0.83,
        "layers": ("blocks.3.mlp.down", "blocks.2.mlp.down"),
        "role": "input",
        "statistic": "channel_kurtosis",
        "since_step": _STEP - 80,
        "evidence": "channel_kurtosis of blocks.3.mlp.down input rose 9.1 times",
        "remedy": "give the layer finer scales (per row or block), or bf16",
        "source": "Fishman et al. 2409.12517",
    }
    return AlertContent(
        step=_STEP,
        probability={10: 0.12, 100: 0.71, 1000: None},
        band={10: (0.05, 0.2), 100: (0.54, 0.86)},
        stakes=Stakes(step_seconds=3.1, hours_at_risk=0.4, world_size=64),
        expected_lead=43.0 if kind == "forecast" else None,
        causes=(cause,),
        model_version="sample",
    )
