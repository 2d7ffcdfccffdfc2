"""The headers with the limits a minute, in the forms of OpenAI and of Anthropic."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from math import ceil

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.core.quotas import CallQuota, RateLimit, current_call

_ANTHROPIC = "/v1/messages"


class RateLimitHeaders:
    """Adds the limits of the key, or of its tenant, to responses for which they were checked; also to refusals.

    The values are those when the call was let through or refused.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = CallQuota()

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start" and (call.requests or call.tokens):
                path: str = scope["path"].removeprefix(scope.get("root_path", ""))
                headers = anthropic_headers(call) if path.startswith(_ANTHROPIC) else openai_headers(call)
                MutableHeaders(scope=message).update(headers)
            await send(message)

        before = current_call.set(call)
        try:
            await self.app(scope, receive, send_with_limits)
        finally:
            current_call.reset(before)


def openai_headers(call: CallQuota) -> dict[str, str]:
    """https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers"""
    headers: dict[str, str] = {}
    for name, rate in (("requests", call.requests), ("tokens", call.tokens)):
        if rate is not None:
            headers[f"x-ratelimit-limit-{name}"] = str(rate.limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(rate.remaining)
            headers[f"x-ratelimit-reset-{name}"] = duration(rate.reset_s)
    return headers


def anthropic_headers(call: CallQuota) -> dict[str, str]:
    """https://docs.anthropic.com/en/api/rate-limits#response-headers

    One limit counts the tokens of prompts and of answers, so that all three kinds of tokens have its values.
    """
    headers: dict[str, str] = {}
    names = {"requests": call.requests} | dict.fromkeys(("tokens", "input-tokens", "output-tokens"), call.tokens)
    for name, rate in names.items():
        if rate is not None:
            headers[f"anthropic-ratelimit-{name}-limit"] = str(rate.limit)
            headers[f"anthropic-ratelimit-{name}-remaining"] = str(rate.remaining)
            headers[f"anthropic-ratelimit-{name}-reset"] = _instant(rate)
    return headers


def duration(seconds: float) -> str:
    """A time as OpenAI writes it, rounded up to milliseconds: 20ms, 1.5s, 6m0s."""
    milliseconds = ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"


def _instant(rate: RateLimit) -> str:
    """RFC 3339 in whole seconds."""
    at = datetime.now(UTC) + timedelta(seconds=ceil(rate.reset_s))
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


_BOTH_LIMITS = CallQuota(requests=RateLimit(0, 0, 0.0), tokens=RateLimit(0, 0, 0.0))
OPENAI_NAMES, ANTHROPIC_NAMES = tuple(openai_headers(_BOTH_LIMITS)), tuple(anthropic_headers(_BOTH_LIMITS))
