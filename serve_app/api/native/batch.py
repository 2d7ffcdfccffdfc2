"""Runs the items of a /generate_batch call: each is validated, run and answered on its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from starlette.requests import Request

from serve_app.api.completion import CompletionState, total_usage
from serve_app.api.context import RequestContext, generation_id
from serve_app.api.generation import collect, run_in_parallel
from serve_app.api.native.encoder import to_answer
from serve_app.api.native.responses import BatchAnswer, BatchAnswers, BatchError, native_error
from serve_app.api.native.schema import GenerateBody
from serve_app.api.responses import milliseconds, rate
from serve_app.core.requests import TextPrompt
from serve_app.errors import ServeAppError, internal_error


class Batch:
    """The items of one call and their results."""

    def __init__(self, context: RequestContext, http: Request, items: Sequence[object]) -> None:
        self._context = context
        self._http = http
        self._id = generation_id(http)
        self._items = items
        self._states: list[CompletionState] = []

    async def run(self) -> BatchAnswers:
        began = self._context.clock()
        results = await run_in_parallel(partial(self._result, index) for index in range(len(self._items)))
        elapsed_s = self._context.clock() - began
        usage = total_usage(self._states)
        return {
            "results": results,
            "usage": usage,
            "metrics": {
                "elapsed_ms": milliseconds(elapsed_s),
                "tokens_per_second": rate(usage["completion_tokens"], elapsed_s),
            },
        }

    async def _result(self, index: int) -> BatchAnswer | BatchError:
        context, model = self._context, None
        try:
            body = GenerateBody.parse(self._items[index])
            served = context.model_of_body(self._http, body.model)
            model = served.name
            params, prompt = body.params(served.sampling_defaults), TextPrompt(body.prompt)
            request = context.request(self._http, f"{self._id}-{index}", served, prompt, params, stream=False)
            state = await collect(context.engine, body.scheduled(request), context.clock)
            answer = to_answer(request, state)
        except ServeAppError as error:
            return self._failed(index, error, model)
        except Exception as error:  # noqa: BLE001 (logged; it must not reach the other items)
            return self._failed(index, internal_error(error, f"{self._id}-{index}"), model)
        self._states.append(state)
        return {"index": index, **answer}

    def _failed(self, index: int, error: ServeAppError, model: str | None) -> BatchError:
        self._context.telemetry.refused(error, model)
        return {"index": index, "error": native_error(error, self._http.state.request_id)["error"]}
