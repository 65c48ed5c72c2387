"""Make, list, rotate and revoke tokens, as `foreshock token --url` does.

A secret is in the answer that makes it and nowhere else.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Final, Self

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, Field

from foreshock.api.access.principal import Grant, GrantError, Principal, Scope
from foreshock.api.access.scopes import ADMIN
from foreshock.api.access.tokens import IssuedToken, Token, UnknownToken
from foreshock.api.problems import Problem
from foreshock.api.schemas import Name
from foreshock.api.services import Services, ServicesDep

__all__ = [
    "Rotation",
    "SecretBody",
    "TokenBody",
    "TokenList",
    "TokenRequest",
    "project_of",
    "router",
]

router = APIRouter(tags=["access"])

_LONGEST_SECONDS: Final = 10 * 366 * 24 * 3600
_DAY: Final = 24 * 3600


class TokenRequest(BaseModel):
    """A token to be made."""

    name: str = Field(min_length=1, max_length=128, description="For people.")
    scopes: list[Scope] = Field(min_length=1, max_length=3)
    projects: list[Name] | None = Field(None, max_length=1000, description="null = all of them.")
    lifetime_seconds: int | None = Field(
        None, ge=1, le=_LONGEST_SECONDS, description="null = it does not expire."
    )


class Rotation(BaseModel):
    """How a token gets a new secret."""

    grace_seconds: int = Field(
        _DAY, ge=0, le=_LONGEST_SECONDS, description="How long the secret before is taken."
    )


class TokenBody(BaseModel):
    """A token, without its secret."""

    id: str
    name: str
    scopes: list[Scope]
    projects: list[str] | None = Field(description="null = all of them.")
    created_at: datetime
    created_by: str = Field(description="Name of the token or account that made it.")
    expires_at: datetime | None
    revoked_at: datetime | None
    previous_until: datetime | None = Field(
        description="Until when the secret before the last rotation is taken."
    )
    last_used: datetime | None = Field(description="To about a minute.")

    @classmethod
    def of(cls, token: Token) -> Self:
        """The body of a token."""
        return cls.model_validate(_members(token))


class SecretBody(TokenBody):
    """A token with its secret, which is shown this once."""

    secret: str = Field(repr=False, description="Send it as Authorization: Bearer <secret>.")

    @classmethod
    def issued(cls, issued: IssuedToken) -> Self:
        """The body of a token just made or rotated."""
        return cls.model_validate(_members(issued.token) | {"secret": issued.secret})


class TokenList(BaseModel):
    """Tokens, oldest first, revoked and expired ones too."""

    tokens: list[TokenBody]


TokenId = Annotated[str, Path(alias="id", max_length=32, description="Id of a token.")]


@router.get("/tokens", dependencies=[ADMIN])
def list_tokens(services: ServicesDep) -> TokenList:
    """The tokens; an admin kept to projects sees those for no other project."""
    tokens = services.access.tokens.list()
    return TokenList(tokens=[TokenBody.of(t) for t in tokens if _covers(services.principal, t)])


@router.post("/tokens", status_code=201, dependencies=[ADMIN])
def create_token(body: TokenRequest, services: ServicesDep, response: Response) -> SecretBody:
    """Make a token. An admin kept to projects makes them for these only."""
    principal = services.principal
    projects = None if body.projects is None else frozenset(body.projects)
    if principal.grant is None or not principal.grant.covers(projects):
        raise Problem(403, "a token may be made only for projects that one has oneself")
    lifetime = None if body.lifetime_seconds is None else timedelta(seconds=body.lifetime_seconds)
    try:
        grant = Grant(frozenset(body.scopes), projects)
        issued = services.access.tokens.create(
            body.name, grant, by=principal.name, lifetime=lifetime
        )
    except GrantError as error:
        raise Problem(422, str(error)) from None
    services.note(
        "token.create",
        project=project_of(issued.token),
        subject=issued.token.id,
        name=issued.token.name,
        scopes=sorted(grant.scopes),
        projects=None if projects is None else sorted(projects),
    )
    return _secret(issued, response)


@router.post("/tokens/{id}/rotation", status_code=201, dependencies=[ADMIN])
def rotate_token(
    token_id: TokenId, body: Rotation, services: ServicesDep, response: Response
) -> SecretBody:
    """Give a token a new secret; the one before is taken for the grace period."""
    _find(services, token_id)
    try:
        issued = services.access.tokens.rotate(
            token_id, grace=timedelta(seconds=body.grace_seconds)
        )
    except UnknownToken as error:
        raise Problem(404, str(error)) from None
    services.note(
        "token.rotate",
        project=project_of(issued.token),
        subject=token_id,
        grace_seconds=body.grace_seconds,
    )
    return _secret(issued, response)


@router.delete("/tokens/{id}", dependencies=[ADMIN])
def revoke_token(token_id: TokenId, services: ServicesDep) -> TokenBody:
    """End a token; it stays in the list. A second time changes nothing."""
    _find(services, token_id)
    token = services.access.tokens.revoke(token_id)
    services.note("token.revoke", project=project_of(token), subject=token_id)
    return TokenBody.of(token)


def _covers(principal: Principal, token: Token) -> bool:
    return principal.grant is not None and principal.grant.covers(token.grant.projects)


def _find(services: Services, token_id: str) -> Token:
    token = next((t for t in services.access.tokens.list() if t.id == token_id), None)
    if token is None or not _covers(services.principal, token):
        raise Problem(404, f"there is no token {token_id!r}")
    return token


def project_of(token: Token) -> str | None:
    """The project an entry of the log is about: only where the token is for one."""
    projects = token.grant.projects
    return next(iter(projects)) if projects is not None and len(projects) == 1 else None


def _members(token: Token) -> dict[str, object]:
    grant = token.grant
    return {
        "id": token.id,
        "name": token.name,
        "scopes": sorted(grant.scopes),
        "projects": None if grant.projects is None else sorted(grant.projects),
        "created_at": token.created_at,
        "created_by": token.created_by,
        "expires_at": token.expires_at,
        "revoked_at": token.revoked_at,
        "previous_until": token.previous_until,
        "last_used": token.last_used,
    }


def _secret(issued: IssuedToken, response: Response) -> SecretBody:
    response.headers["Cache-Control"] = "no-store"
    return SecretBody.issued(issued)
