"""Checks API keys and the tokens of an identity provider for an HTTP server."""

from __future__ import annotations

from serve_app.auth_config import AuthOptions
from serve_app.core.tenants import Identity
from serve_app.database import open_database
from serve_app.database_config import DatabaseOptions
from serve_app.errors import NotReady
from serve_app.tenants.api_key import PREFIX
from serve_app.tenants.directory import Directory
from serve_app.tenants.store import TenantStore
from serve_app.tenants.tokens import Tokens

_RETRY_S = 5.0


class KeyAuthenticator:
    """Implements `core.tenants.Authenticator`. `directory` knows the keys and the tenants of the database."""

    def __init__(self, auth: AuthOptions, database: DatabaseOptions) -> None:
        self.directory = Directory(lambda: TenantStore(open_database(database)), auth.refresh_s)
        self._max_stale_s = auth.max_stale_s
        self._tokens = None if auth.oidc is None else Tokens(auth.oidc)

    def start(self) -> None:
        """Read the keys. Blocks for as long as the database and the identity provider may take to answer."""
        self.directory.start()
        if self._tokens is not None:
            self._tokens.start()

    def stop(self) -> None:
        if self._tokens is not None:
            self._tokens.stop()
        self.directory.stop()

    async def authenticate(self, credentials: str) -> Identity:
        if self._tokens is not None and not credentials.startswith(PREFIX):
            return await self._tokens.identify(credentials)
        age_s = self.directory.age_s()
        if age_s is None or age_s > self._max_stale_s:
            raise NotReady("The service cannot read its API keys.", retry_after_s=_RETRY_S)
        return self.directory.identify(credentials)
