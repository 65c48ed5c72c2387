"""Tables of alerts and of their messages, beside the registry's.

Holds no query; a change of a table needs a migration once the first release is out.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from foreshock.api.registry import metadata

__all__ = ["alerts", "deliveries", "mutes", "silences"]

alerts: Final = sa.Table(
    "alerts",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.String, nullable=False, index=True),
    sa.Column("project", sa.String, nullable=False),
    sa.Column("run", sa.String, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("state", sa.String, nullable=False, index=True),
    sa.Column("opened_step", sa.BigInteger, nullable=False),
    sa.Column("fired_step", sa.BigInteger),
    sa.Column("resolved_step", sa.BigInteger),
    sa.Column("starts_at", sa.DateTime, nullable=False),
    sa.Column("ends_at", sa.DateTime),
    sa.Column("end_reason", sa.String),
    sa.Column("content", sa.Text, nullable=False),
    sa.Column("correct", sa.Boolean),
    sa.Column("note", sa.Text),
    # Scoring the same records again (a crash before the risk rows were stored) finds the same row.
    sa.UniqueConstraint("run_id", "attempt", "kind", "opened_step"),
)

deliveries: Final = sa.Table(
    "alert_deliveries",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("alert_id", sa.ForeignKey("alerts.id"), nullable=False),
    sa.Column("channel", sa.String, nullable=False, index=True),
    sa.Column("transition", sa.String, nullable=False),
    sa.Column("tries", sa.Integer, nullable=False, default=0),
    sa.Column("created_at", sa.DateTime, nullable=False),
    sa.Column("next_try_at", sa.DateTime, nullable=False),
    sa.Column("delivered_at", sa.DateTime),
    sa.Column("abandoned_at", sa.DateTime),
    sa.Column("error", sa.Text),
    sa.UniqueConstraint("alert_id", "channel", "transition"),
)

mutes: Final = sa.Table(
    "alert_mutes",
    metadata,
    sa.Column("alert_id", sa.ForeignKey("alerts.id"), primary_key=True),
    sa.Column("decision", sa.String, nullable=False),
    sa.Column("by", sa.String, nullable=False),
    sa.Column("at", sa.DateTime, nullable=False),
    sa.Column("until", sa.DateTime),
    sa.Column("note", sa.Text),
)
"""The newest decision of people about paging, one row an alert."""

silences: Final = sa.Table(
    "alert_silences",
    metadata,
    sa.Column("alert_id", sa.ForeignKey("alerts.id"), primary_key=True),
    sa.Column("channel", sa.String, primary_key=True),
    sa.Column("silence_id", sa.String, nullable=False),
    sa.Column("ends_at", sa.DateTime, nullable=False),
)
"""Silences of ours in Alertmanagers; others' are never touched."""
