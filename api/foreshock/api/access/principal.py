"""Who a request comes from, and what it may touch.

A scope says what may be done, a project says with which runs; both have to allow it. Checks no
secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal, get_args

__all__ = [
    "ANYONE",
    "DEFAULT_PROJECT",
    "NOBODY",
    "SCOPES",
    "Grant",
    "GrantError",
    "Principal",
    "Scope",
]

Scope = Literal["read", "write", "admin"]
"""read: look; write: announce runs, send batches, answer alerts; admin: both, and tokens."""

SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
DEFAULT_PROJECT: Final = "default"

_PROJECT: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


class GrantError(ValueError):
    """A grant makes no sense; says what is allowed."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token allows.

    Attributes:
        scopes: A job's token needs `write` only: one that leaks from a cluster then reads nothing.
        projects: Names of projects; None for all, those of the future too.

    Raises:
        GrantError: No scope, an unknown one, no project or a name that is none.
    """

    scopes: frozenset[Scope]
    projects: frozenset[str] | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.scopes) - set(SCOPES))
        if unknown or not self.scopes:
            given = ", ".join(map(repr, unknown)) or "nothing"
            raise GrantError(f"scopes are {given}; allowed: one or more of {', '.join(SCOPES)}")
        if self.projects is None:
            return
        wrong = [name for name in sorted(self.projects) if _PROJECT.fullmatch(name) is None]
        if wrong:
            raise GrantError(
                f"project is {wrong[0]!r}; allowed: 1 to 128 letters, digits, '.', '_' and '-'"
            )
        if not self.projects:
            raise GrantError("a token needs a project, or all of them")

    def may(self, scope: Scope) -> bool:
        """Whether the scope is held; admin holds every one."""
        return scope in self.scopes or "admin" in self.scopes

    def sees(self, project: str) -> bool:
        """Whether runs of a project exist for this grant."""
        return self.projects is None or project in self.projects

    def covers(self, projects: Iterable[str] | None) -> bool:
        """Whether a grant for these projects (None = all) gives nothing that this one lacks."""
        if self.projects is None:
            return True
        return projects is not None and self.projects.issuperset(projects)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks.

    Attributes:
        id: Id of the token, for limits and the audit log; never secret.
        name: Its name, for people.
        grant: What it may do; a page's session may do less than its token.
        address: Where the request came from.
        session: Whether a cookie speaks for it.
        until: When the session ends; None = with the token.
    """

    id: str
    name: str
    grant: Grant | None = field(default=None)
    address: str = ""
    session: bool = False
    until: datetime | None = None

    def may(self, scope: Scope) -> bool:
        """Whether the scope is held."""
        return self.grant is not None and self.grant.may(scope)

    def sees(self, project: str) -> bool:
        """Whether runs of a project exist for this principal."""
        return self.grant is not None and self.grant.sees(project)

    @property
    def projects(self) -> frozenset[str] | None:
        """The projects it is kept to; None = all."""
        return frozenset() if self.grant is None else self.grant.projects

    def home(self, project: str) -> str:
        """The project that a request means.

        A token for one project other than `default` need not name it: its clients say `default`,
        or nothing, and mean theirs.
        """
        projects = self.projects
        if project != DEFAULT_PROJECT or projects is None or project in projects:
            return project
        return next(iter(projects)) if len(projects) == 1 else project


NOBODY: Final = Principal("nobody", "nobody")
"""Before a request has been let in: sees nothing."""

ANYONE: Final = Principal("anyone", "anyone on this machine", Grant(frozenset(SCOPES)))
"""A service on the loopback address that has no tokens."""
