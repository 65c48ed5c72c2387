"""Pages of long lists: a cursor says after which entry the next page starts, not how many came.

So entries that appear meanwhile neither repeat nor hide others. A cursor is opaque to clients, but
holds no secret and is checked like any other input.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Any, Final

from fastapi import Depends, Query, Request, Response

from foreshock.api.problems import Problem

__all__ = ["Cursor", "Page", "PageDep", "link_next", "read_cursor", "write_cursor"]

_MOST: Final = 1000

Limit = Annotated[int, Query(ge=1, le=_MOST, description="At most so many on a page.")]
Cursor = Annotated[
    str | None,
    Query(max_length=2048, description="`next` of the page before, with the same parameters."),
]


class Page:
    """The page of a list that a request asks for.

    Attributes:
        limit: Most entries.
        cursor: Of the page before; None for the first.
    """

    def __init__(
        self, request: Request, response: Response, limit: Limit = 100, cursor: Cursor = None
    ) -> None:
        self.limit = limit
        self.cursor = cursor
        self._request = request
        self._response = response

    def more(self, cursor: str | None) -> str | None:
        """Say where the next page is, if there is one, and give its cursor back."""
        link_next(self._request, self._response, cursor)
        return cursor


PageDep = Annotated[Page, Depends()]


def write_cursor(kind: str, *key: Any) -> str:
    """A cursor of a kind of list, from the key of the last entry shown."""
    text = json.dumps([kind, *key], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_cursor(cursor: str, kind: str, *types: type | tuple[type, ...]) -> tuple[Any, ...]:
    """The key in a cursor.

    Args:
        cursor: As `write_cursor` made it.
        kind: The list that it must belong to.
        types: Of the parts of the key.

    Raises:
        Problem: 422, it is none of this list's.
    """
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        found = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError):
        found = None
    if isinstance(found, list) and found[:1] == [kind] and len(found) == len(types) + 1:
        key = found[1:]
        if all(_fits(value, wanted) for value, wanted in zip(key, types, strict=True)):
            return tuple(key)
    raise Problem(422, "query.cursor: not a cursor of this list; start again without one")


def _fits(value: object, wanted: type | tuple[type, ...]) -> bool:
    if isinstance(value, str) and not (value.isascii() and value.isprintable()):
        # No name is like that, and not every database takes it.
        return False
    return isinstance(value, wanted) and not isinstance(value, bool)


def link_next(request: Request, response: Response, cursor: str | None) -> None:
    """Say where the next page is, in a Link header (RFC 8288), if there is one."""
    if cursor is not None:
        target = request.url.include_query_params(cursor=cursor)
        response.headers["Link"] = f'<{target.path}?{target.query}>; rel="next"'
