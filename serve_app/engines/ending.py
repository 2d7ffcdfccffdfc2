"""Decides with which token an answer ends, alike in every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.core.events import FinishReason
from serve_app.core.requests import GenerationRequest, SamplingParams
from serve_app.engines.text.protocol import Constraint
from serve_app.errors import DeadlineExceeded, InternalError, NotReady, rounded_s


@dataclass(frozen=True, slots=True)
class Ending:
    """What ends one answer: one of `end_ids` after `min_tokens` tokens, a complete grammar, or `max_tokens` tokens.

    A stop string ends the answer in the TokenStream, which has the text.
    """

    end_ids: frozenset[int]
    min_tokens: int
    max_tokens: int
    constraint: Constraint | None

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        constraint: Constraint | None,
        model_ends: frozenset[int],
        available: int,
    ) -> Ending:
        """The ending of an answer with these parameters, in a context that has `available` tokens for it.

        `model_ends` are the tokens with which the model ends an answer.
        """
        end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else model_ends)
        max_tokens = available if params.max_tokens is None else min(available, params.max_tokens)
        return cls(end_ids, params.min_tokens, max_tokens, constraint)

    def reason(self, token_id: int, generated: int) -> tuple[FinishReason | None, bool]:
        """Why the answer ends with this token, its number `generated`; None if it goes on. Call it for each token once.

        The second value is true if the grammar is complete with this token, so that the token is a part of the text.
        """
        if token_id in self.end_ids and generated >= self.min_tokens:
            return FinishReason.STOP, False
        if self.constraint is not None and self.constraint.accept(token_id):
            return FinishReason.STOP, True
        if generated >= self.max_tokens:
            return FinishReason.LENGTH, False
        return None, False

    def replay(self, tokens: Sequence[int]) -> InternalError | None:
        """Take the first tokens of the answer, which another replica has sent; an error if they end the answer."""
        for number, token_id in enumerate(tokens, start=1):
            if self.reason(token_id, number)[0] is not None:
                return InternalError("the answer cannot be resumed: it ends with the tokens that were sent")
        return None


def expired_error(request: GenerationRequest, generated: int) -> DeadlineExceeded:
    """The error of a request whose deadline passed after `generated` tokens."""
    return DeadlineExceeded(
        f"the request was not finished after {rounded_s(request.timeout_s)} s ({generated} tokens); ask for fewer "
        "tokens or try when the service is less busy"
    )


def stopping_error() -> NotReady:
    """The error of a request whose replica shuts down."""
    return NotReady("this replica is shutting down; send the request again", retry_after_s=1)


def engine_ended_error() -> NotReady:
    """The error of a request whose engine ended without being stopped."""
    return NotReady("the engine of this replica has ended; send the request again", retry_after_s=1)
