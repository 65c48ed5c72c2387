"""The real service with a scripted scorer, as a process: what the page shows is then known.

The rest is real: ingest, store, live analysis, diagnosis, alerts, events. Started by the tests of
the page as `python -m tests.api.page_service --port-file PATH`; settings from the environment.
"""

from __future__ import annotations

import argparse
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any, Final

import uvicorn

from foreshock.api.app import create_app
from foreshock.api.live_service import LiveService
from foreshock.api.scoring_records import ScoringRecord
from foreshock.api.settings import Settings
from foreshock.monitor.record import Driver, Risk

__all__ = ["DRIVERS", "FIRES_AT", "REASON"]

FIRES_AT: Final = 60
REASON: Final = "too few runs of 1,000 steps to learn from"
DRIVERS: Final = (
    Driver("input.kurtosis.max", 2.31, "blocks.3.mlp.down"),
    Driver("update_ratio.slope", 1.22),
    Driver("weight.headroom_log2.min", -0.3, "blocks.0.attention.qkv"),
)


class ScriptedScorer:
    """Rises with the largest gradient norm; fires from `FIRES_AT` on while it is above 1."""

    state: Any = None

    def score_record(self, record: ScoringRecord) -> Risk:
        """The risk after this record."""
        step, scalars = record.step, record.scalars
        high = scalars.get("grad_norm", 0.0) > 1
        middle = 0.75 if high else 0.02
        firing = high and step >= FIRES_AT
        return Risk(
            step=step,
            probability={10: middle / 2, 100: middle, 1000: None},
            band={10: (middle / 4, middle), 100: (middle / 2, min(1.0, middle * 1.2))},
            reasons={1000: REASON},
            expected_lead=42.0 if firing else None,
            kind="forecast" if firing else None,
            state="firing" if firing else "ok",
            drivers=DRIVERS if high else (),
            model_version="scripted",
        )


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--port-file", type=Path, required=True)
    given = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", given.port), backlog=64)
    app = create_app(
        Settings.from_environment(os.environ), live=partial(LiveService, new_scorer=ScriptedScorer)
    )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    server = _Server(config, given.port_file, listener.getsockname()[1])
    server.run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, port_file: Path, port: int) -> None:
        super().__init__(config)
        self._port_file, self._port = port_file, port

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say where."""
        await super().startup(sockets=sockets)
        self._port_file.write_text(f"{self._port}\n")


if __name__ == "__main__":
    main()
