"""Keeps silences in an Alertmanager while an alert is acknowledged or snoozed, and no longer.

They are what keeps the rule's alert quiet too, for it has the same labels. Only silences made here
are ever touched.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa

from foreshock.api.alert_log import AlertLog
from foreshock.api.alert_model import Alert
from foreshock.api.alert_mutes import Mute
from foreshock.api.alert_tables import silences
from foreshock.api.channels import Channel, DeliveryError, Silencer
from foreshock.api.registry import Registry

__all__ = ["SilenceKeeper"]

logger = logging.getLogger(__name__)

_ACKNOWLEDGED: Final = timedelta(hours=24)
"""A silence has to end; that of an acknowledged alert is renewed when half of it is over."""


class SilenceKeeper:
    """The silences of one channel.

    Args:
        registry: Its database holds which silences are ours.
        log: The alerts and people's decisions about them.
        channel: Names the silences' rows.
        silencer: The Alertmanager.
    """

    def __init__(
        self, registry: Registry, log: AlertLog, channel: Channel, silencer: Silencer
    ) -> None:
        self._registry = registry
        self._log = log
        self._name = channel.name
        self._silencer = silencer

    def keep(self) -> None:
        """Make, renew and end silences as people decided.

        Raises:
            DeliveryError: The Alertmanager did not answer; call it again.
        """
        wanted = self._wanted()
        for alert_id, row in self._kept().items():
            if alert_id not in wanted:
                self._silencer.unsilence(row.silence_id)
                self._forget(alert_id)
        kept = self._kept()
        for alert_id, (alert, mute) in wanted.items():
            self._hold(alert, mute, kept.get(alert_id))

    def check(self) -> None:
        """Forget silences that the Alertmanager has lost, so that `keep` makes them anew."""
        for alert_id, row in self._kept().items():
            try:
                if not self._silencer.knows(row.silence_id):
                    self._forget(alert_id)
            except DeliveryError as error:
                logger.warning("silences of %s: %s", self._name, error)

    def _wanted(self) -> dict[int, tuple[Alert, Mute]]:
        firing = {alert.id: alert for alert in self._log.find(state="firing", limit=10_000)}
        return {key: (firing[key], mute) for key, mute in self._log.mutes.of(firing).items()}

    def _hold(self, alert: Alert, mute: Mute, row: Any) -> None:
        now = datetime.now(UTC)
        until = mute.until or now + _ACKNOWLEDGED
        if row is not None:
            ends = row.ends_at.replace(tzinfo=UTC)
            lasts = ends - now > _ACKNOWLEDGED / 2 if mute.until is None else ends == until
            if lasts:
                return
        known = None if row is None else row.silence_id
        made = self._silencer.silence(alert, mute, until, known)
        values = {"silence_id": made, "ends_at": until.replace(tzinfo=None)}
        with self._registry.write() as connection:
            connection.execute(sa.delete(silences).where(self._is(alert.id)))
            keys = {"alert_id": alert.id, "channel": self._name}
            connection.execute(sa.insert(silences).values(keys | values))

    def _kept(self) -> Mapping[int, Any]:
        query = sa.select(silences).where(silences.c.channel == self._name)
        with self._registry.engine.begin() as connection:
            return {row.alert_id: row for row in connection.execute(query)}

    def _forget(self, alert_id: int) -> None:
        with self._registry.write() as connection:
            connection.execute(sa.delete(silences).where(self._is(alert_id)))

    def _is(self, alert_id: int) -> sa.ColumnElement[bool]:
        return sa.and_(silences.c.alert_id == alert_id, silences.c.channel == self._name)
