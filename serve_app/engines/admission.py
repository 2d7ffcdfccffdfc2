"""Prepares requests for an engine: tokenizes and checks their prompts, and prepares grammars and tool calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import TypeVar

from serve_app.core.requests import GenerationRequest, Prompt
from serve_app.engines.stream import TokenStream
from serve_app.engines.text.prompt_details import prompt_details
from serve_app.engines.text.protocol import AnswerPlan, Text
from serve_app.errors import DeadlineExceeded, InternalError, InvalidRequest, PromptTooLong, ServeAppError, rounded_s

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The most log probabilities, each with the text of its token, that one request may have of its prompt.
MAX_PROMPT_LOGPROBS = 65_536
UNREADABLE = "the request could not be read"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can be computed: its open stream, the token ids of its prompt, and how to generate its answer."""

    stream: TokenStream
    prompt: list[int]
    plan: AnswerPlan


def prepare(streams: Seq[TokenStream], text: Text, context: int, now: float) -> list[Prepared | ServeAppError]:
    """What an engine computes for each stream, or the reason why its request is refused.

    The prompts are tokenized together. `context` is the largest number of tokens of a prompt and its answer. A fault in
    one request refuses only that request. Raises KeyboardInterrupt and SystemExit.
    """
    refusals = [_expired(stream.request, now) for stream in streams]
    in_time = [stream for stream, refusal in zip(streams, refusals, strict=True) if refusal is None]
    encoded = iter(_encode([stream.request.prompt for stream in in_time], text))
    return [
        refusal or _prepare_guarded(stream, next(encoded), text, context)
        for stream, refusal in zip(streams, refusals, strict=True)
    ]


def guarded(work: Callable[[], T | ServeAppError], what: str, message: str) -> T | ServeAppError:
    """The result of `work`, or InternalError with `message` if it raises.

    A panic of a Rust extension is a BaseException and no Exception.
    """
    try:
        return work()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        logger.exception("%s failed", what)
        return InternalError(message)


def _encode(prompts: list[Prompt], text: Text) -> list[list[int] | ServeAppError]:
    """The token ids of each prompt. If the batched call fails, the prompts are tokenized one by one."""
    together = guarded(partial(_encode_all, text, prompts), f"tokenization of {len(prompts)} prompts", UNREADABLE)
    if not isinstance(together, ServeAppError):
        return together
    one_by_one = [
        guarded(partial(_encode_all, text, [prompt]), "tokenization of one prompt", UNREADABLE) for prompt in prompts
    ]
    return [result if isinstance(result, ServeAppError) else result[0] for result in one_by_one]


def _encode_all(text: Text, prompts: list[Prompt]) -> list[list[int] | ServeAppError]:
    encoded = text.encode(prompts)
    assert len(encoded) == len(prompts), f"{len(encoded)} results for {len(prompts)} prompts"
    return encoded


def _prepare_guarded(
    stream: TokenStream, ids: list[int] | ServeAppError, text: Text, context: int
) -> Prepared | ServeAppError:
    if isinstance(ids, ServeAppError):
        return ids
    what = f"admission of request {stream.request.id}"
    return guarded(partial(_prepare, stream, ids, text, context), what, UNREADABLE)


def _prepare(stream: TokenStream, ids: list[int], text: Text, context: int) -> Prepared | ServeAppError:
    """Open the stream of a prompt with token ids `ids`, or return why the request is refused."""
    request = stream.request
    kept = _truncate(ids, request.truncate_prompt_tokens, context)
    if isinstance(kept, ServeAppError):
        return kept
    refusal = (
        _too_long(len(kept), context)
        or _over_reservation(len(kept), request.prompt_limit)
        or _invalid_bias(request.params.logit_bias, text.vocabulary)
        or _too_many_logprobs(len(kept), request.params.prompt_logprobs)
    )
    if refusal is not None:
        return refusal
    prompt = prompt_details(text, request, kept) if request.prompt_details else None
    if isinstance(prompt, ServeAppError):
        return prompt
    plan = text.plan(request, kept)
    if isinstance(plan, ServeAppError):
        return plan
    stream.open(len(kept), text.decoder(kept, plan.params.skip_special_tokens), plan, prompt)
    return Prepared(stream, kept, plan)


def _truncate(ids: list[int], keep: int | None, context: int) -> list[int] | ServeAppError:
    """The last `keep` token ids: all for None, and as many as the context allows for -1."""
    if keep is None:
        return ids
    if keep < 1 and keep != -1:
        message = "truncate_prompt_tokens is at least 1, or -1 for as many as the model takes"
        return InvalidRequest(message, param="truncate_prompt_tokens")
    return ids[-(context - 1 if keep == -1 else keep) :]


def _expired(request: GenerationRequest, now: float) -> ServeAppError | None:
    if now < request.deadline:
        return None
    return DeadlineExceeded(
        f"the request waited for its whole time limit of {rounded_s(request.timeout_s)} s before the model received "
        "it; try again when the service is less busy"
    )


def _invalid_bias(biases: Seq[tuple[int, float]], vocabulary: int) -> ServeAppError | None:
    for token, bias in biases:
        if not 0 <= token < vocabulary:
            return InvalidRequest(f"token id {token} is outside 0 to {vocabulary - 1}", param="logit_bias")
        if not isfinite(bias):
            return InvalidRequest(f"the bias of token {token} is not a finite number", param="logit_bias")
    return None


def _too_many_logprobs(tokens: int, alternatives: int | None) -> ServeAppError | None:
    if alternatives is None:
        return None
    if alternatives < 0:
        return InvalidRequest("prompt_logprobs is at least 0", param="prompt_logprobs")
    most = MAX_PROMPT_LOGPROBS // tokens - 1
    if alternatives <= most:
        return None
    return InvalidRequest(
        f"prompt_logprobs {alternatives} is too many for a prompt of {tokens} tokens; "
        + (f"ask for at most {most}" if most >= 0 else f"shorten the prompt to at most {MAX_PROMPT_LOGPROBS} tokens"),
        param="prompt_logprobs",
    )


def _over_reservation(tokens: int, limit: int | None) -> PromptTooLong | None:
    if limit is None or tokens <= limit:
        return None
    message = f"the prompt has {tokens} tokens, and {limit} are reserved"
    return PromptTooLong(message, param="prompt", tokens=tokens, maximum=limit, over_reservation=True)


def _too_long(tokens: int, context: int) -> ServeAppError | None:
    if tokens < context:
        return None
    return PromptTooLong(
        # "This model's maximum context length is" and "prompt is too long" are what clients recognize this error by.
        f"This model's maximum context length is {context} tokens, which includes the answer. However, the prompt is "
        f"too long: it has {tokens} tokens. Reduce the length of the prompt to at most {context - 1} tokens.",
        param="prompt",
        tokens=tokens,
        maximum=context - 1,
    )
