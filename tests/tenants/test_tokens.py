"""Tokens of an identity provider, with a JWKS server of our own, and RSA and EC keys."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from serve_app.auth_config import Oidc
from serve_app.core.tenants import CredentialsRefused, Identity, Scope
from serve_app.errors import NotReady
from serve_app.tenants import tokens as tokens_module
from serve_app.tenants.tokens import Tokens

ISSUER, AUDIENCE = "https://login.example.com/", "serve_app"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def jwk(key: Any, **about: Any) -> dict[str, Any]:
    algorithm = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    public: dict[str, Any] = algorithm.to_jwk(key.public_key(), as_dict=True)
    return {**public, **about}


class Provider:
    """An identity provider: `document` is what it answers, `asked` the number of requests."""

    def __init__(self) -> None:
        self.document: Any = {"keys": [jwk(RSA, kid="rsa", use="sig"), jwk(EC, kid="ec", alg="ES256")]}
        self.asked = 0
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked += 1
                document = provider.document
                body = document if isinstance(document, bytes) else json.dumps(document).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *about: Any) -> None:
                """Write no log."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/jwks"


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.server.shutdown()
    provider.server.server_close()


@pytest.fixture
def opened(provider: Provider) -> Iterator[Callable[..., Tokens]]:
    made: list[Tokens] = []

    def open_tokens(**options: Any) -> Tokens:
        values = {"issuer": ISSUER, "audience": AUDIENCE, "jwks_url": provider.url, "leeway_s": 0, **options}
        made.append(Tokens(Oidc(**values)))
        made[-1].start()
        return made[-1]

    yield open_tokens
    for one in made:
        one.stop()


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    found = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": now + 60, "iat": now, "tenant": "acme", **changes}
    return {name: value for name, value in found.items() if value is not None}


def signed(payload: dict[str, Any], key: Any = RSA, algorithm: str = "RS256", kid: str | None = "rsa") -> str:
    return jwt.encode(payload, key, algorithm, headers={} if kid is None else {"kid": kid})


async def refusal(tokens: Tokens, token: str) -> str:
    with pytest.raises(CredentialsRefused) as refused:
        await tokens.identify(token)
    assert refused.value.reason == "token"
    return refused.value.message


async def test_tokens_of_both_kinds_of_keys(opened: Callable[..., Tokens]) -> None:
    tokens = opened()
    expected = Identity("acme", "oidc:ann", frozenset({Scope.INFERENCE}), None)
    assert await tokens.identify(signed(claims())) == expected
    assert await tokens.identify(signed(claims(), EC, "ES256", "ec")) == expected
    assert await tokens.identify(signed(claims(aud=["other", AUDIENCE]))) == expected


async def test_claims_name_scopes_and_models(opened: Callable[..., Tokens]) -> None:
    tokens = opened(tenant_claim="org", scope_claim="scope", models_claim="models")
    found = await tokens.identify(
        signed(claims(org="acme", scope="openid admin inference", models=["small", 3, "org/large"]))
    )
    assert found.scopes == {Scope.ADMIN, Scope.INFERENCE}
    assert found.models == frozenset({"small", "org/large"})
    nothing = await tokens.identify(signed(claims(org="acme")))
    assert (nothing.scopes, nothing.models) == (frozenset(), frozenset())


WRONG: dict[str, dict[str, Any]] = {
    "expired": {"exp": int(time.time()) - 5},
    "not yet valid": {"nbf": int(time.time()) + 3600},
    "without an expiry": {"exp": None},
    "of another issuer": {"iss": "https://evil.example.com/"},
    "without an issuer": {"iss": None},
    "for another audience": {"aud": "other"},
    "without an audience": {"aud": None},
    "without a subject": {"sub": None},
    "with a long subject": {"sub": "x" * 129},
    "without a tenant": {"tenant": None},
    "with NUL in the tenant": {"tenant": "acme\0x"},
    "with a number as tenant": {"tenant": 3},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
async def test_a_token_with_wrong_claims_is_refused(opened: Callable[..., Tokens], changes: dict[str, Any]) -> None:
    await refusal(opened(), signed(claims(**changes)))


async def test_a_token_of_another_key_is_refused(opened: Callable[..., Tokens]) -> None:
    assert await refusal(opened(), signed(claims(), OTHER)) == "The token is not valid."


def unsigned(header: dict[str, Any]) -> str:
    parts = [json.dumps(part).encode() for part in (header, claims())]
    return ".".join([*(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts), ""])


async def test_algorithms_that_prove_nothing_are_refused(opened: Callable[..., Tokens]) -> None:
    """`none`, and HS256 with the public key as its secret."""
    tokens = opened()
    for name in ("none", "None", "NONE", ""):
        await refusal(tokens, unsigned({"alg": name, "kid": "rsa"}))
    public = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    head, payload, _ = unsigned({"alg": "HS256", "typ": "JWT", "kid": "rsa"}).split(".")
    signature = hmac.new(public, f"{head}.{payload}".encode(), sha256).digest()
    await refusal(tokens, f"{head}.{payload}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}")
    await refusal(tokens, signed(claims(), "x" * 32, "HS256"))


async def test_a_key_signs_only_with_its_own_algorithms(provider: Provider, opened: Callable[..., Tokens]) -> None:
    tokens = opened(algorithms=["RS256", "PS256", "ES256"])
    await tokens.identify(signed(claims(), RSA, "PS256"))
    await refusal(tokens, signed(claims(), RSA, "RS512"))
    await refusal(tokens, signed(claims(), EC, "ES256", "rsa"))
    await refusal(tokens, signed(claims(), RSA, "RS256", "ec"))
    provider.document = {"keys": [jwk(RSA, kid="rsa", alg="PS256"), jwk(EC, kid="enc", use="enc")]}
    tokens = opened(algorithms=["RS256", "PS256", "ES256"])
    await refusal(tokens, signed(claims(), RSA, "RS256"))
    assert await refusal(tokens, signed(claims(), EC, "ES256", "enc")) == "The token is signed with an unknown key."


async def test_a_symmetric_key_of_the_provider_is_not_used(provider: Provider, opened: Callable[..., Tokens]) -> None:
    secret = base64.urlsafe_b64encode(b"x" * 32).decode().rstrip("=")
    provider.document = {"keys": [{"kty": "oct", "k": secret, "kid": "rsa", "alg": "HS256"}, 3, {"kty": "RSA"}]}
    await refusal(opened(), signed(claims(), "x" * 32, "HS256"))


@pytest.mark.parametrize(
    "text",
    ["", "a", "a.b", "a.b.c", "é.é.é", "..", "\0", "e30.e30.e30", "[" * 16_000, f"{'W1' * 6000}.e30.e30", "x" * 20_000],
)
async def test_what_is_no_token_is_refused(opened: Callable[..., Tokens], text: str) -> None:
    await refusal(opened(), text)
    deep = base64.urlsafe_b64encode(b"[" * 12_000).decode()
    await refusal(opened(), f"{deep}.e30.e30")


async def test_a_new_key_of_the_provider_is_read(provider: Provider, opened: Callable[..., Tokens]) -> None:
    """Unknown keys make the service ask once, and not once a token."""
    tokens = opened()
    asked = provider.asked
    provider.document = {"keys": [jwk(OTHER, kid="new")]}
    token = signed(claims(), OTHER, kid="new")
    await refusal(tokens, token)
    assert provider.asked == asked, "it was asked a moment ago"
    tokens._asked_at -= tokens_module._UNKNOWN_KEY_INTERVAL_S
    found = await asyncio.gather(*(tokens.identify(token) for _ in range(20)))
    assert {one.tenant for one in found} == {"acme"}
    for number in range(20):
        await refusal(tokens, signed(claims(), OTHER, kid=f"{number}"))
    assert provider.asked == asked + 1


async def test_a_withdrawn_key_is_refused_after_the_refresh(provider: Provider, opened: Callable[..., Tokens]) -> None:
    tokens = opened(refresh_s=1)
    token = signed(claims())
    await tokens.identify(token)
    provider.document = {"keys": [jwk(EC, kid="ec")]}
    end = time.monotonic() + 10
    while True:
        try:
            await tokens.identify(token)
        except CredentialsRefused:
            break
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b'{"keys": 1}', b"[" * 100_000, b" " * 1_100_000])
async def test_the_last_keys_stay_if_the_provider_fails(
    provider: Provider, opened: Callable[..., Tokens], document: bytes
) -> None:
    tokens = opened()
    provider.document = document
    tokens._fetch()
    await tokens.identify(signed(claims()))


async def test_keys_that_were_never_read_are_an_error_of_the_service(
    provider: Provider, opened: Callable[..., Tokens]
) -> None:
    provider.document = b"{"
    with pytest.raises(NotReady):
        await opened().identify(signed(claims()))


async def test_a_checked_token_expires(opened: Callable[..., Tokens]) -> None:
    tokens = opened()
    token = signed(claims(exp=int(time.time()) + 2))
    assert await tokens.identify(token) is await tokens.identify(token), "the second time from memory"
    await asyncio.sleep(2.1)
    assert await refusal(tokens, token) == "The token has expired."
