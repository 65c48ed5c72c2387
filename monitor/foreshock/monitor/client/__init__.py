"""A typed client of the service: `from foreshock.monitor import Client`.

Needs httpx, pyarrow and numpy, as all of `foreshock.monitor` does; frames need pandas, `draw`
matplotlib.
"""

from foreshock.monitor.client.answers import (
    Alert,
    Attempt,
    Heatmap,
    Launch,
    Mute,
    Receipt,
    RecordedEvent,
    RiskHistory,
    RunDetail,
    RunRisk,
    RunSummary,
    ServiceEvent,
)
from foreshock.monitor.client.client import Client
from foreshock.monitor.client.diagnosis import Cause, Diagnosis, PrecisionAdvice
from foreshock.monitor.client.drawing import draw
from foreshock.monitor.client.errors import (
    ClientError,
    Conflict,
    Forbidden,
    InvalidRequest,
    MissingPackage,
    NoAnswer,
    NotFound,
    Problem,
    RateLimited,
    ServiceFailure,
    TooLarge,
    Unauthorized,
)
from foreshock.monitor.client.http import Retry

__all__ = [
    "Alert",
    "Attempt",
    "Cause",
    "Client",
    "ClientError",
    "Conflict",
    "Diagnosis",
    "Forbidden",
    "Heatmap",
    "InvalidRequest",
    "Launch",
    "MissingPackage",
    "Mute",
    "NoAnswer",
    "NotFound",
    "PrecisionAdvice",
    "Problem",
    "RateLimited",
    "Receipt",
    "RecordedEvent",
    "Retry",
    "RiskHistory",
    "RunDetail",
    "RunRisk",
    "RunSummary",
    "ServiceEvent",
    "ServiceFailure",
    "TooLarge",
    "Unauthorized",
    "draw",
]
