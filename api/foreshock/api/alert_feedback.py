"""How often alerts were right, by people's answers to "was this right?", one line per rule.

What nobody answered is counted apart and never taken for right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, cast

import sqlalchemy as sa

from foreshock.api.alert_model import ALERT_NAMES, SEVERITIES, AlertKind
from foreshock.api.alert_tables import alerts
from foreshock.api.registry import Registry

__all__ = ["RuleFeedback", "feedback_by_rule", "interval"]

_Z: Final = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleFeedback:
    """What people said of the alerts of one rule.

    Attributes:
        kind: Of the alerts.
        fired: Alerts that fired, pending ones left out.
        right, wrong: So many of them were answered so.
    """

    kind: AlertKind
    fired: int = 0
    right: int = 0
    wrong: int = 0

    @property
    def name(self) -> str:
        """The alertname."""
        return ALERT_NAMES[self.kind]

    @property
    def severity(self) -> str:
        """Of the alerts."""
        return SEVERITIES[self.kind]

    @property
    def unanswered(self) -> int:
        """Alerts that nobody has judged."""
        return self.fired - self.right - self.wrong

    @property
    def false_share(self) -> float | None:
        """Wrong ones of those answered; None without an answer."""
        answered = self.right + self.wrong
        return self.wrong / answered if answered else None


def interval(hits: int, count: int) -> tuple[float, float] | None:
    """95 % interval of a share (Wilson 1927); None of nothing."""
    if not count:
        return None
    share = hits / count
    middle = share + _Z**2 / (2 * count)
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def feedback_by_rule(
    registry: Registry,
    *,
    run_id: str | None = None,
    projects: frozenset[str] | None = None,
    since: datetime | None = None,
) -> tuple[RuleFeedback, ...]:
    """Answers for each rule, the rules in the order of `ALERT_NAMES`.

    Args:
        registry: Its database holds the alerts.
        run_id: Only this run's.
        projects: Only those of these projects; None = all.
        since: Only alerts that started at or after this time.
    """
    query = (
        sa.select(alerts.c.kind, alerts.c.correct, sa.func.count())
        .where(alerts.c.state != "pending")
        .group_by(alerts.c.kind, alerts.c.correct)
    )
    if run_id is not None:
        query = query.where(alerts.c.run_id == run_id)
    if projects is not None:
        query = query.where(alerts.c.project.in_(sorted(projects)))
    if since is not None:
        query = query.where(alerts.c.starts_at >= since.astimezone(UTC).replace(tzinfo=None))
    with registry.engine.begin() as connection:
        rows = connection.execute(query).all()
    counts = {(kind, correct): int(count) for kind, correct, count in rows}
    return tuple(
        RuleFeedback(
            kind=kind,
            fired=sum(counts.get((kind, answer), 0) for answer in (True, False, None)),
            right=counts.get((kind, True), 0),
            wrong=counts.get((kind, False), 0),
        )
        for kind in cast(tuple[AlertKind, ...], tuple(ALERT_NAMES))
    )
