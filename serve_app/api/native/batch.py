"""Many native bodies in one call: each is judged, run and answered for itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from starlette.requests import Request

from serve_app.api.completion import CompletionState, milliseconds, rate, usage
from serve_app.api.context import RequestContext, generation_id
from serve_app.api.error_handlers import native_error
from serve_app.api.generation import collect, side_by_side
from serve_app.api.native.encoder import whole
from serve_app.api.native.schema import GenerateBody
from serve_app.core.requests import TextPrompt
from serve_app.errors import InvalidRequest, ServeAppError


class Batch:
    """One call's items and what became of them, in their order."""

    def __init__(self, context: RequestContext, http: Request, items: Sequence[object]) -> None:
        self._context = context
        self._request_id: str = http.state.request_id
        self._id = generation_id(http)
        self._http = http
        self._items = items
        self._tallies: list[CompletionState] = []

    async def run(self) -> dict[str, object]:
        """The body of the answer. Cancelled, it leaves no generator open."""
        began = self._context.clock()
        results = await side_by_side(partial(self._result, index) for index in range(len(self._items)))
        return self._body(results, self._context.clock() - began)

    async def _result(self, index: int) -> dict[str, object]:
        model: str | None = None
        try:
            body = GenerateBody.parse(self._items[index])
            served = self._context.model(body.model)
            model = served.name
            params = body.params(served.sampling_defaults)
            request = self._context.request(
                self._http, f"{self._id}-{index}", served, TextPrompt(body.prompt), params, body
            )
            tally = await collect(self._context.gateway, request, self._context.config.limits.warm_wait_s)
        except ServeAppError as error:
            self._context.gateway.refused(error, model)
            return {"index": index, "error": native_error(error, self._request_id)}
        self._tallies.append(tally)
        return {"index": index, **whole(request, tally)}

    def _body(self, results: list[dict[str, object]], elapsed_s: float) -> dict[str, object]:
        tokens = sum(tally.tokens for tally in self._tallies)
        return {
            "results": results,
            "usage": usage(
                sum(tally.prompt_tokens for tally in self._tallies),
                sum(tally.cached_tokens for tally in self._tallies),
                tokens,
            ),
            "metrics": {"elapsed_ms": milliseconds(elapsed_s), "tokens_per_second": rate(tokens, elapsed_s)},
        }


def check_size(items: Sequence[object], most: int, param: str) -> None:
    """Raises InvalidRequest."""
    if not items:
        raise InvalidRequest(f"{param} is empty; send 1 to {most} items", param=param)
    if len(items) > most:
        raise InvalidRequest(f"{param} has {len(items)} items; send at most {most} in one call", param=param)
