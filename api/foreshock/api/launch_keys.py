"""What a launch is called in the database: its id means something within its project only."""

from __future__ import annotations

import hashlib
from typing import Final

import sqlalchemy as sa

from foreshock.api.registry_tables import launches, runs

__all__ = ["announced", "key_for", "keys_of"]

_OF: Final = "@"


def announced(key: str) -> str:
    """The id that a launch's client gave it, from its key."""
    return key.partition(_OF)[0]


def keys_of(launch_id: str) -> sa.ColumnElement[bool]:
    """Which rows of `launches` have this id, in any project."""
    named = launches.c.launch_id
    return sa.or_(named == launch_id, named.startswith(f"{launch_id}{_OF}"))


def key_for(connection: sa.Connection, project: str, launch_id: str) -> str:
    """The key of a launch of a project: its id, and more where another project has that one."""
    digest = hashlib.sha256(project.encode()).hexdigest()[:16]
    own = f"{launch_id}{_OF}{digest}"
    query = (
        sa.select(launches.c.launch_id, runs.c.project)
        .join(runs, runs.c.run_id == launches.c.run_id)
        .where(launches.c.launch_id.in_([launch_id, own]))
    )
    taken = {row.launch_id: row.project for row in connection.execute(query)}
    free = taken.get(launch_id, project) == project
    return launch_id if free and own not in taken else own
