"""Tables of tokens, page sessions and the audit log, in the registry's database.

No secret is in them: of tokens and cookies only SHA-256 digests. Holds no query.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from foreshock.api.registry_tables import metadata

__all__ = ["audit", "sessions", "tokens"]

_TIME: Final = sa.DateTime(timezone=True)

tokens: Final = sa.Table(
    "tokens",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    # The secret before the last rotation, and until when it is taken.
    sa.Column("previous_digest", sa.String(64)),
    sa.Column("previous_until", _TIME),
    sa.Column("scopes", sa.String(64), nullable=False),
    # JSON list of names; null is all projects.
    sa.Column("projects", sa.Text),
    sa.Column("created_at", _TIME, nullable=False),
    sa.Column("created_by", sa.String(256), nullable=False),
    sa.Column("issued_at", _TIME, nullable=False),
    sa.Column("expires_at", _TIME),
    sa.Column("revoked_at", _TIME),
    sa.Column("last_used", _TIME),
)

sessions: Final = sa.Table(
    "page_sessions",
    metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("token_id", sa.String(32), nullable=False, index=True),
    sa.Column("mark", sa.String(64), nullable=False),
    sa.Column("scopes", sa.String(64), nullable=False),
    sa.Column("created_at", _TIME, nullable=False),
    sa.Column("expires_at", _TIME, nullable=False, index=True),
)

audit: Final = sa.Table(
    "audit",
    metadata,
    # SQLite counts up by itself only for INTEGER.
    sa.Column(
        "id",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    sa.Column("at", _TIME, nullable=False, index=True),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("actor_id", sa.String(32), nullable=False),
    sa.Column("actor", sa.String(256), nullable=False),
    sa.Column("address", sa.String(64), nullable=False),
    sa.Column("project", sa.String(128)),
    sa.Column("subject", sa.String(256)),
    sa.Column("detail", sa.Text, nullable=False),
)
