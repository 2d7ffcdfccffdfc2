"""Checks tokens (JWT) of an identity provider by its public keys (JWKS), which a thread keeps up to date."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import threading
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jwt

from serve_app.auth_config import Oidc
from serve_app.core.tenants import CredentialsRefused, Identity, Scope, is_tenant_name
from serve_app.errors import NotReady

log = logging.getLogger(__name__)

_FETCH_TIMEOUT_S = 5.0
_LARGEST_JWKS = 1_048_576
_MOST_KEYS = 100
# Anyone can send tokens with unknown keys: they cause at most one request to the identity provider in this time.
_UNKNOWN_KEY_INTERVAL_S = 10.0
# A token is checked once: verifying a signature takes up to 0.2 ms.
_CHECKED_TOKENS = 4096
_LONGEST_TOKEN = 16_384
_RETRY_S = 5.0
# The algorithms that a kind of key can have signed with. A key must never be used with an algorithm of another kind.
_ALGORITHMS = {"RSA": ("RS", "PS"), "EC": ("ES",), "OKP": ("EdDSA",)}
_SUBJECT = re.compile(r"[\x21-\x7e]{1,128}")
_MALFORMED = (jwt.PyJWTError, TypeError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class _PublicKey:
    """`algorithms` are the configured ones that the key can have signed with."""

    key: Any
    algorithms: tuple[str, ...]


class Tokens:
    """The valid tokens of one identity provider. `start` reads the keys once, and then again and again in a thread."""

    def __init__(self, options: Oidc) -> None:
        self._options = options
        self._keys: dict[str, _PublicKey] = {}
        self._read_at: float | None = None
        self._asked_at = float("-inf")
        self._failing = False
        self._checked: OrderedDict[bytes, tuple[Identity, float]] = OrderedDict()
        self._fetching = asyncio.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jwks", daemon=True)

    def start(self) -> None:
        self._fetch()
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=2 * _FETCH_TIMEOUT_S)

    async def identify(self, token: str) -> Identity:
        """Raises CredentialsRefused; NotReady if the keys of the identity provider were never read."""
        if len(token) > _LONGEST_TOKEN:
            raise _refused("The token is too long.")
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        known = self._checked.get(digest)
        if known is not None and known[1] > time.time():
            return known[0]
        key = await self._key_of(token)
        claims = self._claims(token, key)
        identity = self._to_identity(claims)
        self._checked[digest] = (identity, int(claims["exp"]) + self._options.leeway_s)
        while len(self._checked) > _CHECKED_TOKENS:
            self._checked.popitem(last=False)
        return identity

    async def _key_of(self, token: str) -> _PublicKey:
        """The key that the token names. An unknown one can be new: the keys are read again, but not often."""
        try:
            key_id = str(jwt.get_unverified_header(token).get("kid", ""))
        except _MALFORMED:
            raise _refused("The API key or token is not valid.") from None
        async with self._fetching:
            if key_id not in self._keys and time.monotonic() - self._asked_at > _UNKNOWN_KEY_INTERVAL_S:
                await asyncio.to_thread(self._fetch)
        if self._read_at is None:
            raise NotReady("The service cannot read the keys of the identity provider.", retry_after_s=_RETRY_S)
        key = self._keys.get(key_id)
        if key is None:
            raise _refused("The token is signed with an unknown key.")
        return key

    def _claims(self, token: str, key: _PublicKey) -> Mapping[str, Any]:
        """The claims of a token whose signature, issuer, audience and times are right. Raises CredentialsRefused."""
        options = self._options
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key.key,
                algorithms=key.algorithms,
                audience=options.audience,
                issuer=options.issuer,
                leeway=options.leeway_s,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.ExpiredSignatureError:
            raise _refused("The token has expired.") from None
        except _MALFORMED:
            raise _refused("The token is not valid.") from None
        return claims

    def _to_identity(self, claims: Mapping[str, Any]) -> Identity:
        """Raises CredentialsRefused if a claim that the service needs is missing or cannot be used."""
        options, subject = self._options, claims["sub"]
        tenant = claims.get(options.tenant_claim)
        if not isinstance(tenant, str) or not is_tenant_name(tenant):
            raise _refused(f"The token has no name of a tenant in its claim {options.tenant_claim!r}.")
        if not isinstance(subject, str) or not _SUBJECT.fullmatch(subject):
            raise _refused("The token has no subject that can be used.")
        scopes = frozenset(options.default_scopes)
        if options.scope_claim is not None:
            scopes = frozenset(map(Scope, set(_words(claims.get(options.scope_claim))) & set(Scope)))
        models = None if options.models_claim is None else frozenset(_words(claims.get(options.models_claim)))
        return Identity(tenant, f"oidc:{subject}", scopes, models)

    def _run(self) -> None:
        while not self._stopped.wait(self._options.refresh_s):
            self._fetch()

    def _fetch(self) -> None:
        """Read the keys. After a failure the last ones stay."""
        self._asked_at = time.monotonic()
        try:
            keys = _read_keys(self._options)
        except Exception as error:  # noqa: BLE001 - the provider can answer anything, and the thread must go on
            if not self._failing:
                log.error("The keys at %s cannot be read; the last ones stay. %s", self._options.jwks_url, error)
            self._failing = True
            return
        if keys.keys() != self._keys.keys():  # a key that was withdrawn must not go on through what was checked
            self._checked = OrderedDict()
        self._keys = keys
        self._failing, self._read_at = False, time.monotonic()


def _read_keys(options: Oidc) -> dict[str, _PublicKey]:
    """The usable keys of a JWKS by their ids. Raises any exception if the answer cannot be used."""
    with urllib.request.urlopen(options.jwks_url, timeout=_FETCH_TIMEOUT_S) as answer:
        text = answer.read(_LARGEST_JWKS + 1)
    if len(text) > _LARGEST_JWKS:
        raise ValueError(f"the answer is larger than {_LARGEST_JWKS} bytes")
    document = json.loads(text)
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise ValueError("the answer is no set of keys")
    usable = [one for one in listed[:_MOST_KEYS] if isinstance(one, dict) and one.get("use", "sig") == "sig"]
    keys: dict[str, _PublicKey] = {}
    for one in usable:
        prefixes = _ALGORITHMS.get(str(one.get("kty")), ())  # a symmetric key must not be in public
        algorithms = tuple(name for name in options.algorithms if name.startswith(prefixes))
        if "alg" in one:
            algorithms = tuple(name for name in algorithms if name == one["alg"])
        if not algorithms:
            continue
        try:
            keys[str(one.get("kid", ""))] = _PublicKey(jwt.PyJWK(one).key, algorithms)
        except _MALFORMED as error:
            log.warning("A key of the identity provider cannot be used: %s", type(error).__name__)
    return keys


def _words(claim: object) -> list[str]:
    """The words of a claim, which is a text with spaces or a list of texts."""
    if isinstance(claim, str):
        return claim.split()
    return [one for one in claim if isinstance(one, str)] if isinstance(claim, list) else []


def _refused(message: str) -> CredentialsRefused:
    return CredentialsRefused("token", message)
