"""The limits and the usage of the keys of one ingress."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from serve_app.config import AppConfig
from serve_app.core.tenants import Tenants
from serve_app.core.usage import UsageQuery
from serve_app.database import first_line, open_database
from serve_app.errors import NotReady
from serve_app.gateway.near_budgets import NearBudgets
from serve_app.gateway.shared_quotas import SharedQuotas, open_counters
from serve_app.telemetry.metrics import QuotaSeries
from serve_app.tenants.ledger import Ledger
from serve_app.tenants.usage_store import UsageStore

logger = logging.getLogger("ray.serve")


class IngressQuotas:
    """Counts for the keys of one ingress, and keeps their usage. `ingress` is its id. Implements `UsageReports`."""

    def __init__(self, config: AppConfig, ingress: str, meter: QuotaSeries) -> None:
        self._config = config
        self._ingress = ingress
        self._meter = meter
        self._ledger = Ledger(self._open_store, config.quotas.flush_s, meter)
        self._reader: UsageStore | None = None
        self._shared: SharedQuotas | None = None

    async def start(self, tenants: Tenants) -> SharedQuotas:
        """What the quota stages need. A database that cannot be read delays the start by its time limit at most."""
        options = self._config.quotas
        if options.url is None and self._config.ingress.deployment.most_replicas > 1:
            logger.warning(
                "Each replica of the ingress counts the limits of keys and tenants for itself, so that a key can use "
                "them several times. Set quotas.url to a Redis or Valkey server."
            )
        try:
            seeds = await asyncio.to_thread(lambda: self._open_reader().used_of_budgets())
        except SQLAlchemyError:
            logger.exception("The usage cannot be read from the database: the budgets begin with nothing used.")
            seeds = {}
        self._ledger.start()
        counters = open_counters(options, self._ingress, seeds, self._meter)
        self._shared = SharedQuotas(options, tenants, counters, self._ledger, self._meter, NearBudgets())
        self._meter.watch_budgets(self._shared.near.count)
        return self._shared

    async def report(self, query: UsageQuery) -> list[dict[str, Any]]:
        try:
            return await asyncio.to_thread(lambda: self._open_reader().report(query))
        except SQLAlchemyError as error:
            logger.warning("The usage cannot be read from the database. %s", first_line(error))
            raise NotReady("The usage cannot be read now. Try again later.", retry_after_s=5) from None

    async def stop(self) -> None:
        """Send the last refunds, and write the last usage."""
        if self._shared is not None:
            await self._shared.counters.close()
        await asyncio.to_thread(self._ledger.stop)
        if self._reader is not None:
            await asyncio.to_thread(self._reader.close)

    def _open_store(self) -> UsageStore:
        return UsageStore(open_database(self._config.database))

    def _open_reader(self) -> UsageStore:
        """Connections of their own, so that a slow report does not delay the ledger."""
        if self._reader is None:
            self._reader = self._open_store()
        return self._reader
