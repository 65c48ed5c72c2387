"""Examples that the description of the service shows; each is valid under its schema (tested).

Made up: one run, llama-1b, on its way out. Holds data only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["EXAMPLES", "RECORDS"]

_RUN_ID: Final = "5f0c8a1e9b7d4c3f8e2a6b1d0c9f7e5a"
_LAUNCH: Final = "0b9f2c4e-6f1d-4a53-9d0e-2f7c1b8a6e35"


_RUN: Final[dict[str, Any]] = {
    "run_id": _RUN_ID,
    "project": "default",
    "run": "llama-1b",
    "status": "live",
    "attempts": 2,
    "attempt": 2,
    "first_step": 0,
    "last_step": 4120,
    "created_at": "2026-01-30T08:00:00Z",
    "last_received": "2026-01-31T12:00:00Z",
    "loss": 2.81,
    "state": "pending",
    "kind": "forecast",
    "risk": {"10": 0.02, "100": 0.31, "1000": None},
}

_ATTEMPT: Final[dict[str, Any]] = {
    "number": 1,
    "launch_id": _LAUNCH,
    "parent_launch": None,
    "first_step": 0,
    "last_step": 3900,
    "started_at": "2026-01-30T08:00:00Z",
    "last_received": "2026-01-31T10:00:00Z",
}

_DRIVER: Final[dict[str, Any]] = {
    "signal": "grad_output.kurtosis.max",
    "contribution": 1.4,
    "layer": "blocks.3.mlp.down",
}

_RISK: Final[dict[str, Any]] = {
    "step": 4120,
    "probability": {"10": 0.12, "100": 0.71, "1000": None},
    "band": {"10": [0.05, 0.2], "100": [0.5, 0.85]},
    "reasons": {"1000": "the corpus holds no run that long"},
    "expected_lead": 43.0,
    "kind": "forecast",
    "state": "firing",
    "drivers": [_DRIVER],
    "model_version": "2026.11-1",
}

_HISTORY: Final[dict[str, Any]] = {
    "step": [4119, 4120],
    "probability": {"10": [0.08, 0.12], "100": [0.55, 0.71], "1000": [None, None]},
    "low": {"10": [0.03, 0.05], "100": [0.4, 0.5], "1000": [None, None]},
    "high": {"10": [0.15, 0.2], "100": [0.7, 0.85], "1000": [None, None]},
    "state": ["pending", "firing"],
    "kind": ["forecast", "forecast"],
}

_CAUSE: Final[dict[str, Any]] = {
    "name": "outlier",
    "probability": 0.83,
    "layers": ["blocks.3.mlp.down"],
    "role": "input",
    "statistic": "channel_kurtosis",
    "since_step": 4040,
    "evidence": "channel_kurtosis of blocks.3.mlp.down input rose 9.1 times over its usual value",
    "remedy": "give the layer finer scales (per row or block), or bf16",
    "source": "Fishman et al. 2409.12517",
}

_ALERT: Final[dict[str, Any]] = {
    "id": 17,
    "name": "TrainingDivergenceRisk",
    "run_id": _RUN_ID,
    "project": "default",
    "run": "llama-1b",
    "attempt": 2,
    "kind": "forecast",
    "severity": "warning",
    "state": "firing",
    "step": 4120,
    "opened_step": 4118,
    "fired_step": 4120,
    "resolved_step": None,
    "starts_at": "2026-01-31T12:00:00Z",
    "ends_at": None,
    "end_reason": None,
    "summary": "llama-1b: the loss is likely to diverge, in about 43 steps (step 4120)",
    "probability": {"10": 0.12, "100": 0.71, "1000": None},
    "band": {"10": [0.05, 0.2], "100": [0.54, 0.86]},
    "expected_lead": 43.0,
    "step_seconds": 3.1,
    "hours_at_risk": 0.4,
    "world_size": 64,
    "gpu_hours_at_risk": 25.6,
    "causes": [_CAUSE],
    "drivers": [_DRIVER],
    "model_version": "2026.11-1",
    "labels": {
        "alertname": "TrainingDivergenceRisk",
        "project": "default",
        "run": "llama-1b",
        "severity": "warning",
    },
    "annotations": {"summary": "llama-1b: the loss is likely to diverge", "step": "4120"},
    "correct": None,
    "note": None,
    "mute": {
        "decision": "snoozed",
        "by": "anna",
        "at": "2026-01-31T12:03:00Z",
        "until": "2026-01-31T14:03:00Z",
        "note": "back after the meeting",
    },
    "deliveries": [
        {
            "channel": "alertmanager",
            "transition": "firing",
            "tries": 1,
            "delivered_at": "2026-01-31T12:00:01Z",
            "abandoned": False,
            "error": None,
        }
    ],
}

RECORDS: Final[dict[str, Any]] = {
    "records": [
        {
            "step": 0,
            "time": "2026-01-31T12:00:00Z",
            "scalars": {"loss": 5.5, "grad_norm": 1.2},
            "events": [],
            "tensors": [
                {
                    "layer": "blocks.0.mlp.up",
                    "role": "input",
                    "format": "e4m3",
                    "call_index": 0,
                    "granularity": "tensor",
                    "what_if": False,
                    "numel": 65536,
                    "observations": 1,
                    "amax": 4.25,
                    "kurtosis": 3.2,
                }
            ],
        },
        {"step": 1, "time": "2026-01-31T12:00:01Z", "scalars": {"loss": "NaN"}},
    ]
}

_TOKEN: Final[dict[str, Any]] = {
    "id": "3f9a1c7b20de",
    "name": "cluster-a",
    "scopes": ["write"],
    "projects": ["llama"],
    "created_at": "2026-01-31T12:00:00Z",
    "created_by": "FORESHOCK_TOKEN",
    "expires_at": "2026-05-01T12:00:00Z",
    "revoked_at": None,
    "previous_until": None,
    "last_used": "2026-02-01T08:00:00Z",
}

EXAMPLES: Final[Mapping[str, dict[str, Any]]] = {
    "LaunchBody": {
        "run": "llama-1b",
        "launch_id": _LAUNCH,
        "first_step": 0,
        "config": {"learning_rate": 0.0003},
        "layers": ["blocks.0.mlp.up", "blocks.0.mlp.down"],
        "tokens_per_step": 1048576,
        "world_size": 64,
    },
    "LaunchAnswer": {"run_id": _RUN_ID, "attempt": 1},
    "BatchReceipt": {"duplicate": False, "attempts": [1], "records": 32},
    "RunList": {"runs": [_RUN], "next": None},
    "RunDetail": _RUN
    | {
        "tokens_per_step": 1048576,
        "world_size": 64,
        "config": {"learning_rate": 0.0003},
        "layers": ["blocks.0.mlp.up"],
        "scalars": ["grad_norm", "loss"],
        "roles": ["input", "weight", "grad_output"],
        "formats": ["e4m3", "e5m2"],
        "statistics": ["amax", "kurtosis"],
        "history": [_ATTEMPT],
    },
    "SeriesBody": {
        "step": [0, 2],
        "min": [2.5, "NaN"],
        "mean": [2.6, "NaN"],
        "max": [2.7, "NaN"],
        "nonfinite": [0, 2],
    },
    "HeatmapBody": {
        "layers": ["blocks.0.mlp.up"],
        "counts": [1],
        "steps": [0, 8],
        "values": [[3.1, None]],
        "worst": "max",
    },
    "TensorsBody": {
        "step": 4120,
        "worst": "max",
        "tensors": [
            {
                "layer": "blocks.3.mlp.down",
                "role": "input",
                "format": "e4m3",
                "what_if": False,
                "kurtosis": 58.0,
                "top_channel": 17,
            }
        ],
    },
    "RiskAnswer": _RISK
    | {
        "run_id": _RUN_ID,
        "attempt": 2,
        "time": "2026-01-31T12:00:00Z",
        "horizon_steps": [10, 100, 1000],
        "steps_per_record": 1,
        "hours_at_risk": 0.4,
    },
    "RiskHistory": _HISTORY,
    "DiagnosisAnswer": {"step": 4120, "causes": [_CAUSE]},
    "ForecastAnswer": {"horizon_steps": [10, 100, 1000], "risks": [_RISK]},
    "ComparisonAnswer": {
        "first_step": 0,
        "last_step": 4120,
        "width": 1,
        "layer_width": 9,
        "layers": 144,
        "judged_layers": 96,
        "series": 102,
        "too_short": 0,
        "parted": True,
        "partings": [
            {
                "step": 3871,
                "statistic": "kurtosis",
                "layer": "blocks.3.mlp.down",
                "role": "input",
                "kind": "sustained",
                "a": 4.1,
                "b": 58.0,
                "noise_units": 9.3,
                "largest_noise_units": 41.0,
                "asked_noise_units": 6.8,
            }
        ],
    },
    "ForecasterCard": {
        "version": "2026.11-1",
        "budget": "1",
        "horizons": [10, 100, 1000],
        "heads": [
            {
                "name": "loss",
                "features": 7,
                "alarm_horizon": 100,
                "thresholds": {"0.1": None, "1": 0.23},
                "reasons": {"0.1": "9000 healthy steps cannot tell a budget of 0.1 per 10,000"},
                "base_rate": 0.0003,
                "unsupported": {"1000": "the corpus holds no run that long"},
            }
        ],
        "data": {"runs": 256, "events": 58},
        "training_runs": 256,
        "evaluation": {"risk": {"loss, 100 steps": {"calibration": [[0.004, 0.003]]}}},
    },
    "AlertList": {"alerts": [_ALERT], "next": "WyJhbGVydHMiLDE3XQ"},
    "AlertModel": _ALERT,
    "Acknowledgement": {"note": "lowering the rate"},
    "Snooze": {"seconds": 7200, "note": "back after the meeting"},
    "Feedback": {"correct": True, "note": "the rate was too high"},
    "FeedbackRates": {
        "since": None,
        "rules": [
            {
                "name": "TrainingDivergenceRisk",
                "kind": "forecast",
                "severity": "warning",
                "fired": 12,
                "right": 6,
                "wrong": 2,
                "unanswered": 4,
                "false_share": 0.25,
                "interval": [0.071, 0.591],
            }
        ],
    },
    "Health": {"status": "ok", "reasons": []},
    "TokenRequest": {
        "name": "cluster-a",
        "scopes": ["write"],
        "projects": ["llama"],
        "lifetime_seconds": 7_776_000,
    },
    "Rotation": {"grace_seconds": 86_400},
    "TokenBody": _TOKEN,
    "SecretBody": _TOKEN | {"secret": "fsk_3f9a1c7b20de_..."},
    "TokenList": {"tokens": [_TOKEN]},
    "AuditPage": {
        "entries": [
            {
                "id": 17,
                "at": "2026-01-31T12:00:00Z",
                "action": "token.revoke",
                "actor_id": "bootstrap",
                "actor": "FORESHOCK_TOKEN",
                "address": "10.0.0.7",
                "project": "llama",
                "subject": "3f9a1c7b20de",
                "detail": {},
            }
        ],
        "before": None,
    },
}
"""By name of the schema. Not on the models: FastAPI drops nulls from what stands there."""
