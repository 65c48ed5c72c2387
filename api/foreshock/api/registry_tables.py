"""Tables of the registry. Other parts (alerts) add theirs to the same `metadata`.

Holds no query; a change of a table needs a migration once the first release is out.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

__all__ = [
    "attempts",
    "batches",
    "counters",
    "deleted_runs",
    "launches",
    "layers",
    "leases",
    "metadata",
    "replicas",
    "run_ends",
    "run_risks",
    "runs",
    "writes",
]

metadata: Final = sa.MetaData()

_TIME: Final = sa.DateTime(timezone=True)

runs: Final = sa.Table(
    "runs",
    metadata,
    sa.Column("run_id", sa.String(32), primary_key=True),
    sa.Column("project", sa.String(128), nullable=False),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("created_at", _TIME, nullable=False),
    sa.Column("layers", sa.Text, nullable=False, default="[]"),
    sa.Column("config", sa.Text, nullable=False, default="{}"),
    sa.Column("tokens_per_step", sa.BigInteger),
    sa.Column("world_size", sa.Integer),
    sa.UniqueConstraint("project", "name"),
)

launches: Final = sa.Table(
    "launches",
    metadata,
    sa.Column("launch_id", sa.String(64), primary_key=True),
    sa.Column("run_id", sa.ForeignKey("runs.run_id"), nullable=False, index=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("started_at", _TIME, nullable=False),
)

attempts: Final = sa.Table(
    "attempts",
    metadata,
    sa.Column("run_id", sa.ForeignKey("runs.run_id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("launch_id", sa.ForeignKey("launches.launch_id"), nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("first_step", sa.BigInteger, nullable=False),
    sa.Column("last_step", sa.BigInteger),
    sa.Column("started_at", _TIME, nullable=False),
    sa.Column("parent_launch", sa.String(64)),
    sa.Column("last_received", _TIME),
    # Text, because SQLite stores NaN as NULL.
    sa.Column("last_loss", sa.String(32)),
    sa.UniqueConstraint("launch_id", "epoch"),
)

run_ends: Final = sa.Table(
    "run_ends",
    metadata,
    sa.Column("run_id", sa.ForeignKey("runs.run_id"), primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("ended_at", _TIME, nullable=False),
)

run_risks: Final = sa.Table(
    "run_risks",
    metadata,
    sa.Column("run_id", sa.ForeignKey("runs.run_id"), primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("kind", sa.String(16)),
    sa.Column("worst", sa.Double, nullable=False),
    sa.Column("probability", sa.Text, nullable=False),
)
"""The newest risk of each run (`risk_notes.py`)."""

deleted_runs: Final = sa.Table(
    "deleted_runs",
    metadata,
    sa.Column("run_id", sa.String(32), primary_key=True),
    sa.Column("deleted_at", _TIME, nullable=False),
)
"""Runs whose facts are still to be removed from the store."""

layers: Final = sa.Table(
    "layers",
    metadata,
    sa.Column("run_id", sa.ForeignKey("runs.run_id"), primary_key=True),
    sa.Column("layer_id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.UniqueConstraint("run_id", "name"),
)

batches: Final = sa.Table(
    "batches",
    metadata,
    sa.Column("launch_id", sa.ForeignKey("launches.launch_id"), primary_key=True),
    sa.Column("rank", sa.Integer, primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True),
    sa.Column("run_id", sa.ForeignKey("runs.run_id"), nullable=False, index=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("commit", sa.BigInteger, nullable=False, unique=True),
    sa.Column("first_epoch", sa.Integer, nullable=False),
    sa.Column("last_epoch", sa.Integer, nullable=False),
    sa.Column("last_step", sa.BigInteger, nullable=False),
    sa.Column("attempts", sa.Text, nullable=False),
    sa.Column("records", sa.Integer, nullable=False),
    sa.Column("received_at", _TIME, nullable=False),
)

# For several replicas of the service; times are seconds of the database's own clock.

counters: Final = sa.Table(
    "counters",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

replicas: Final = sa.Table(
    "replicas",
    metadata,
    sa.Column("replica", sa.String(32), primary_key=True),
    sa.Column("until", sa.Double, nullable=False),
)

writes: Final = sa.Table(
    "writes",
    metadata,
    sa.Column("first", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("last", sa.BigInteger, nullable=False),
    sa.Column("replica", sa.String(32), nullable=False),
    sa.Column("fenced", sa.Boolean, nullable=False),
    sa.Column("swept", sa.Double),
)

leases: Final = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("replica", sa.String(32), nullable=False),
    sa.Column("until", sa.Double, nullable=False),
)
