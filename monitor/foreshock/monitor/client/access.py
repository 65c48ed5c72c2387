"""The administrator's calls of the client: tokens and the audit log.

A part of `Client`, apart for its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from foreshock.monitor.client.calls import Calls, operation

__all__ = ["AccessCalls"]


class AccessCalls(Calls):
    """Needs a token with the scope admin; answers are JSON as the service gives it."""

    @operation("list_tokens")
    def tokens(self) -> list[Mapping[str, Any]]:
        """Every token, without its secret."""
        found: list[Mapping[str, Any]] = self._http.ask("GET", "api/v1/tokens").json()["tokens"]
        return found

    @operation("create_token")
    def create_token(
        self,
        name: str,
        scopes: Sequence[str],
        *,
        projects: Sequence[str] | None = None,
        lifetime_seconds: int | None = None,
    ) -> Mapping[str, Any]:
        """Make a token; its `secret` is in the answer and nowhere else.

        Args:
            name: For people.
            scopes: Of read, write, admin.
            projects: That it is good for; None for all.
            lifetime_seconds: Until it ends by itself; None never.
        """
        given = {"name": name, "scopes": list(scopes), "lifetime_seconds": lifetime_seconds}
        given |= {"projects": None if projects is None else list(projects)}
        body = {key: value for key, value in given.items() if value is not None}
        # Not asked twice: the secret of the first would be lost, and the token live.
        answer: Mapping[str, Any] = self._http.ask(
            "POST", "api/v1/tokens", json=body, again=False
        ).json()
        return answer

    @operation("rotate_token")
    def rotate_token(self, token_id: str, *, grace_seconds: int | None = None) -> Mapping[str, Any]:
        """Give a token a new secret; the old one is good for `grace_seconds` more."""
        body = {} if grace_seconds is None else {"grace_seconds": grace_seconds}
        path = f"api/v1/tokens/{token_id}/rotation"
        answer: Mapping[str, Any] = self._http.ask("POST", path, json=body, again=False).json()
        return answer

    @operation("revoke_token")
    def revoke_token(self, token_id: str) -> None:
        """End a token at once."""
        self._http.ask("DELETE", f"api/v1/tokens/{token_id}")

    @operation("list_audit")
    def audit(self, **query: Any) -> Iterator[Mapping[str, Any]]:
        """Entries of the audit log, newest first, page after page."""
        before = None
        while True:
            given = {"before": before, **query}
            page = self._http.ask("GET", "api/v1/audit", query=given).json()
            yield from page["entries"]
            before = page["before"]
            if before is None:
                return
