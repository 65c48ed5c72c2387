"""Calls of the client that look across runs: two compared, the forecaster, alerts that were right.

A part of `Client`, apart for its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foreshock.monitor.client.access import AccessCalls
from foreshock.monitor.client.calls import operation, path_of

__all__ = ["InsightCalls"]


class InsightCalls(AccessCalls):
    """Answers are JSON as the service gives it.

    Attributes:
        project: Of runs that are given by name.
    """

    project: str

    @operation("get_run_comparison")
    def compare(self, run: str, other: str, **query: Any) -> Mapping[str, Any]:
        """Where `other` parts from `run`.

        Args:
            run: run_id, or the name.
            other: Likewise; may be the same run, with another attempt.
            query: attempt, other_attempt, other_project, role, statistic, first_step, last_step.
        """
        given = {"project": self.project, "other_project": self.project, "other": other, **query}
        answer = self._http.ask("GET", path_of(run, "/compare"), query=given)
        found: Mapping[str, Any] = answer.json()
        return found

    @operation("get_forecaster")
    def forecaster(self) -> Mapping[str, Any]:
        """The card of the forecaster that answers for live runs."""
        found: Mapping[str, Any] = self._http.ask("GET", "api/v1/forecaster").json()
        return found

    @operation("get_alert_feedback")
    def alert_feedback(
        self, run: str | None = None, *, days: int | None = None
    ) -> Sequence[Mapping[str, Any]]:
        """How many alerts people called right and wrong, one mapping for each rule.

        Args:
            run: Only this run's.
            days: Only alerts of the last days.
        """
        query = {"run": run, "project": self.project, "days": days}
        answer = self._http.ask("GET", "api/v1/alerts/feedback", query=query)
        rules: Sequence[Mapping[str, Any]] = answer.json()["rules"]
        return rules
