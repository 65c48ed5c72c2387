"""Where `foreshock token` finds its tokens: a data folder's database, or a running service."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Protocol

import httpx

from foreshock.api.access.audit import Action, AuditLog, Detail
from foreshock.api.access.principal import Grant, GrantError, Principal, Scope
from foreshock.api.access.tokens import IssuedToken, Token, TokenBook, UnknownToken
from foreshock.api.database import DATABASE_LOST
from foreshock.api.registry import Registry
from foreshock.api.routes.tokens import SecretBody, TokenBody, project_of
from foreshock.api.settings import Settings
from foreshock.monitor.certificates import verification

__all__ = ["TokenPlace", "TokenPlaceError", "open_place"]

_REFUSALS: Final = (GrantError, UnknownToken)


class TokenPlaceError(Exception):
    """What went wrong, in one line."""


class TokenPlace(Protocol):
    """Tokens as JSON bodies of the service."""

    def create(
        self, name: str, scopes: Sequence[str], projects: Sequence[str] | None, lifetime: int | None
    ) -> dict[str, Any]:
        """Make one; lifetime in seconds."""
        ...

    def list(self) -> list[dict[str, Any]]:
        """All of them."""
        ...

    def revoke(self, token_id: str) -> None:
        """End one."""
        ...

    def rotate(self, token_id: str, grace: int) -> dict[str, Any]:
        """Give one a new secret; grace in seconds."""
        ...


@contextmanager
def open_place(data: Path | None, url: str | None) -> Iterator[TokenPlace]:
    """The place that the options name.

    Raises:
        TokenPlaceError: It cannot be opened, or refuses.
    """
    if url is not None:
        token = os.environ.get("FORESHOCK_TOKEN", "").strip()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        base = f"{url.rstrip('/')}/api/v1/"
        with httpx.Client(
            base_url=base, headers=headers, timeout=30, verify=verification()
        ) as client:
            yield _Service(client)
        return
    settings = Settings.from_environment(os.environ, {"data_dir": data})
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    try:
        registry = Registry(settings.database_place)
    except DATABASE_LOST as error:
        raise TokenPlaceError(f"the database does not answer: {type(error).__name__}") from None
    try:
        yield _Folder(registry)
    except _REFUSALS as error:
        raise TokenPlaceError(str(error)) from None
    finally:
        registry.close()


class _Folder:
    def __init__(self, registry: Registry) -> None:
        self._book = TokenBook(registry)
        self._audit = AuditLog(registry)
        self._actor = Principal("local", f"{getpass.getuser()} on this machine", address="local")

    def create(
        self, name: str, scopes: Sequence[str], projects: Sequence[str] | None, lifetime: int | None
    ) -> dict[str, Any]:
        grant = Grant(
            frozenset[Scope](scopes),  # type: ignore[arg-type]
            None if projects is None else frozenset(projects),
        )
        issued = self._book.create(
            name,
            grant,
            by=self._actor.name,
            lifetime=None if lifetime is None else timedelta(seconds=lifetime),
        )
        self._note("token.create", issued.token, name=name, scopes=sorted(scopes))
        return _secret(issued)

    def list(self) -> list[dict[str, Any]]:
        return [TokenBody.of(token).model_dump(mode="json") for token in self._book.list()]

    def revoke(self, token_id: str) -> None:
        self._note("token.revoke", self._book.revoke(token_id))

    def rotate(self, token_id: str, grace: int) -> dict[str, Any]:
        issued = self._book.rotate(token_id, grace=timedelta(seconds=grace))
        self._note("token.rotate", issued.token, grace_seconds=grace)
        return _secret(issued)

    def _note(self, action: Action, token: Token, **detail: Detail) -> None:
        self._audit.add(
            action, self._actor, project=project_of(token), subject=token.id, detail=detail
        )


def _secret(issued: IssuedToken) -> dict[str, Any]:
    return SecretBody.issued(issued).model_dump(mode="json")


class _Service:
    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def create(
        self, name: str, scopes: Sequence[str], projects: Sequence[str] | None, lifetime: int | None
    ) -> dict[str, Any]:
        body = {
            "name": name,
            "scopes": list(scopes),
            "projects": None if projects is None else list(projects),
            "lifetime_seconds": lifetime,
        }
        return self._ask("POST", "tokens", body)

    def list(self) -> list[dict[str, Any]]:
        tokens: list[dict[str, Any]] = self._ask("GET", "tokens")["tokens"]
        return tokens

    def revoke(self, token_id: str) -> None:
        self._ask("DELETE", f"tokens/{token_id}")

    def rotate(self, token_id: str, grace: int) -> dict[str, Any]:
        return self._ask("POST", f"tokens/{token_id}/rotation", {"grace_seconds": grace})

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, json=body)
            answer: dict[str, Any] = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise TokenPlaceError(f"the service did not answer: {error}") from None
        if not response.is_success:
            raise TokenPlaceError(f"{response.status_code}: {answer.get('detail', '')}")
        return answer
