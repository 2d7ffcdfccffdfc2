"""Samples tokens from logits. A draw depends on the request's seed and the token's position, not on other rows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from math import isfinite
from typing import TypeVar

import numpy as np
import torch

from serve_app.core.events import Logprobs, TokenLogprob
from serve_app.engines.native.failure import Failure, failure
from serve_app.engines.native.sequence import Sampled, Sequence
from serve_app.engines.protocol import Cause
from serve_app.errors import ServeAppError

logger = logging.getLogger(__name__)

T = TypeVar("T")

CANDIDATES = 256
_MASK = 2**64 - 1
_ROWS = 64
# A smaller divisor could make a logit infinite, and its probability NaN.
_MIN_DIVISOR = 1e-6

# A token with its log probability.
Describe = Callable[[int, float], TokenLogprob]


def sample(
    logits: torch.Tensor,
    sequences: list[Sequence],
    describe: Describe,
    ahead: list[int] | None = None,
) -> list[Sampled | ServeAppError | Failure]:
    """One token for each row of `[R, V]` logits, or why there is none: an error of its grammar, or a failure.

    A row without a finite maximum fails: NaN, infinity, or minus infinity for every token that may follow. Row i is the
    distribution of the token at `ahead[i]` positions after the next one of `sequences[i]`, by default 0.
    """
    ahead = ahead or [0] * len(sequences)
    adjusted, failed = _adjust(logits, sequences)
    largest, ids = _argmax(adjusted)
    tokens, maxima = ids.tolist(), largest.tolist()
    drawn = [row for row, sequence in enumerate(sequences) if sequence.params.temperature > 0]
    if drawn:
        rows = adjusted.float() if len(drawn) == len(sequences) else adjusted[drawn].float()
        for row, token in zip(drawn, _draw(rows, [(sequences[row], ahead[row]) for row in drawn]), strict=True):
            tokens[row] = token
    for row, maximum in enumerate(maxima):
        if not isfinite(maximum):
            failed.setdefault(row, failure(Cause.NOT_FINITE))
    return [
        failed.get(row)
        or (Sampled(token) if s.params.logprobs is None else _with_logprobs(logits[row], token, s, describe))
        for row, (token, s) in enumerate(zip(tokens, sequences, strict=True))
    ]


def prompt_logprobs(logits: torch.Tensor, tokens: list[int], alternatives: int, describe: Describe) -> list[Logprobs]:
    """Log probability and rank of each of the R prompt tokens by the logits `[R, V]` of the positions before them.

    Processes 64 rows at a time: for 2,000 rows and a vocabulary of 128,000 each float32 copy would take a gigabyte.
    Raises FloatingPointError for NaN.
    """
    parts = [slice(first, first + _ROWS) for first in range(0, len(tokens), _ROWS)]
    return [
        logprobs for part in parts for logprobs in _prompt_logprobs(logits[part], tokens[part], alternatives, describe)
    ]


def _prompt_logprobs(logits: torch.Tensor, tokens: list[int], alternatives: int, describe: Describe) -> list[Logprobs]:
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    if chosen.isnan().any():
        raise FloatingPointError("the log probabilities of a prompt are NaN")
    ranks = (logprobs > chosen).sum(-1) + 1
    values, ids = logprobs.topk(min(alternatives, logits.shape[1]))
    return [
        Logprobs(describe(token, logprob), _top_logprobs(top, best, describe), rank)
        for token, logprob, rank, top, best in zip(
            tokens, chosen[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True
        )
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 52 bits that depends only on `seed` and `position`.

    SplitMix64 used as a counter-based generator: Steele, Lea, Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014. With 52 bits, u * total is always below total in double precision.
    """
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 12) * 2.0**-52


def _argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest value of each row and its index, by the native operation: torch's takes four times as long on CPU."""
    supported = logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16)
    if supported and hasattr(torch.ops.serve_app, "argmax_of_rows"):
        values, indices = torch.ops.serve_app.argmax_of_rows(logits.contiguous())
        return values, indices
    largest = logits.max(-1)
    return largest.values, largest.indices


def _adjust(logits: torch.Tensor, sequences: list[Sequence]) -> tuple[torch.Tensor, dict[int, ServeAppError | Failure]]:
    """Logits after biases, penalties, min_tokens and grammars, and the errors of the rows that have no token.

    Copies the logits only when a row needs an adjustment.
    """
    failed: dict[int, ServeAppError | Failure] = {}
    adjusted_rows = [(row, s) for row, s in enumerate(sequences) if _needs_adjustment(s)]
    if not adjusted_rows:
        return logits, failed
    logits = logits.to(torch.float32, copy=True)
    _bias(logits, adjusted_rows)
    for row, sequence in adjusted_rows:
        error = _or_failure(sequence, partial(_adjust_row, logits[row], sequence))
        if error is not None:
            failed[row] = error
    return logits, failed


def _needs_adjustment(sequence: Sequence) -> bool:
    p = sequence.params
    penalized = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
    return penalized or sequence.generated < p.min_tokens or bool(p.logit_bias) or sequence.constraint is not None


def _bias(logits: torch.Tensor, adjusted_rows: list[tuple[int, Sequence]]) -> None:
    """Add the biases of all rows in place, in one operation."""
    biases = [(row, *bias) for row, s in adjusted_rows for bias in s.params.logit_bias if bias[0] < logits.shape[1]]
    if biases:
        rows, tokens, values = (torch.tensor(column, device=logits.device) for column in zip(*biases, strict=True))
        logits.index_put_((rows, tokens), values.to(logits.dtype), accumulate=True)


def _adjust_row(row: torch.Tensor, sequence: Sequence) -> ServeAppError | None:
    """Apply penalties, min_tokens and the grammar in place; returns the grammar's error."""
    _penalize(row, sequence)
    return _constrain(row, sequence)


def _penalize(row: torch.Tensor, sequence: Sequence) -> None:
    """Apply penalties and min_tokens in place.

    The repetition penalty applies to tokens of prompt and answer (Keskar et al. 2019, CTRL), the presence and frequency
    penalties to tokens of the answer (OpenAI).
    """
    p = sequence.params
    if p.repetition_penalty != 1:
        seen = torch.unique(torch.tensor(sequence.tokens, device=row.device))
        value, penalty = row[seen], max(p.repetition_penalty, _MIN_DIVISOR)
        row[seen] = torch.where(value > 0, value / penalty, value * penalty)
    if sequence.generated and (p.presence_penalty or p.frequency_penalty):
        answer = torch.tensor(sequence.tokens[sequence.prompt_len :], device=row.device)
        generated, counts = torch.unique(answer, return_counts=True)
        row[generated] -= p.presence_penalty + p.frequency_penalty * counts
    if sequence.generated < p.min_tokens and sequence.constraint is None:
        row[_ends(row, sequence)] = -torch.inf


def _constrain(row: torch.Tensor, sequence: Sequence) -> ServeAppError | None:
    """Set tokens that the sequence's grammar does not allow to minus infinity, in place; returns the grammar's error.

    An end token before min_tokens is allowed where the grammar allows no other token.
    """
    if sequence.constraint is None:
        return None
    bits = sequence.constraint.allowed()
    if isinstance(bits, ServeAppError):
        return bits
    allowed = np.unpackbits(np.frombuffer(bits, np.uint8), count=row.shape[0], bitorder="little").view(np.bool_)
    if sequence.generated < sequence.params.min_tokens:
        without_end = allowed.copy()
        without_end[_ends(row, sequence)] = False
        allowed = without_end if without_end.any() else allowed
    row.masked_fill_(torch.from_numpy(~allowed).to(row.device), -torch.inf)
    return None


def _ends(row: torch.Tensor, sequence: Sequence) -> list[int]:
    return [token for token in sequence.end_ids if token < row.shape[0]]


def _draw(logits: torch.Tensor, positions: list[tuple[Sequence, int]]) -> list[int]:
    """Inverse-transform sampling of rows `[M, V]`, in float64 so that a draw does not depend on the summation order."""
    sequences = [sequence for sequence, _ in positions]
    params = [s.params for s in sequences]
    device = logits.device
    scaled = logits / torch.tensor([max(p.temperature, _MIN_DIVISOR) for p in params], device=device)[:, None]
    draws = torch.tensor(
        [uniform(s.seed, s.generated + ahead) for s, ahead in positions], dtype=torch.float64, device=device
    )
    filtered = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
    unfiltered = [i for i in range(len(params)) if i not in set(filtered)]
    tokens = [0] * len(params)
    if unfiltered:
        ids = _first_above(torch.softmax(scaled[unfiltered].double(), dim=-1), draws[unfiltered])
        for i, token in zip(unfiltered, ids.tolist(), strict=True):
            tokens[i] = token
    if filtered:
        chosen = _draw_filtered(scaled[filtered], draws[filtered], [sequences[i] for i in filtered], CANDIDATES)
        for i, token in zip(filtered, chosen, strict=True):
            tokens[i] = token
    return tokens


def _draw_filtered(scaled: torch.Tensor, draws: torch.Tensor, sequences: list[Sequence], candidates: int) -> list[int]:
    """Top-k, then top-p of the remaining tokens, then min-p, on the most likely `candidates`; no full sort.

    If the candidates of a row do not include all tokens that its filters keep, the row is drawn again alone from as
    many candidates as its filters need. The number of candidates decides the order of equal values and must not
    depend on other rows.
    """
    params = [s.params for s in sequences]
    vocabulary = scaled.shape[-1]
    width = min(vocabulary, candidates)
    values, ids = scaled.topk(width, dim=-1)
    probs = (values - scaled.logsumexp(dim=-1, keepdim=True)).double().exp()

    def column(numbers: list[float]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=scaled.device)[:, None]

    top_k = column([p.top_k or vocabulary for p in params])
    top_p, min_p = column([p.top_p for p in params]), column([p.min_p for p in params])
    weights = probs * (torch.arange(width, device=scaled.device) < top_k)
    total = torch.where(top_k < vocabulary, weights.sum(-1, keepdim=True), 1.0)
    cumulative = weights.cumsum(-1)
    keep = (cumulative - weights < top_p * total) & (probs >= min_p * probs[:, :1])
    keep[:, 0] = True  # a very small filter may be rounded to 0, which would keep no token
    reached = (cumulative[:, -1:] >= top_p * total) | (probs[:, -1:] < min_p * probs[:, :1])
    enough = (top_k <= width) | ((top_k >= vocabulary) & reached)
    tokens: list[int] = ids.gather(1, _first_above(weights * keep, draws)[:, None])[:, 0].tolist()
    for i in [] if width == vocabulary else (~enough[:, 0]).nonzero()[:, 0].tolist():
        needed = params[i].top_k or vocabulary
        tokens[i] = _draw_filtered(scaled[i : i + 1], draws[i : i + 1], [sequences[i]], needed)[0]
    return tokens


def _first_above(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Index `[M]` of the first column whose cumulative weight exceeds draw * total."""
    cumulative = weights.cumsum(-1)
    found = torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=weights.shape[1] - 1)  # NaN weights of one row must not fail the step of all rows


def _with_logprobs(row: torch.Tensor, token: int, sequence: Sequence, describe: Describe) -> Sampled | Failure:
    return _or_failure(sequence, lambda: Sampled(token, _logprobs(row, token, sequence, describe)))


def _or_failure(sequence: Sequence, work: Callable[[], T]) -> T | Failure:
    """The result of work for one sequence. An exception fails only this one."""
    try:
        return work()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of a Rust extension is a BaseException
        logger.exception("sampling for request %s failed", sequence.stream.request.id)
        return failure(Cause.ERROR)


def _logprobs(row: torch.Tensor, token: int, sequence: Sequence, describe: Describe) -> Logprobs:
    """Log probabilities of the model's distribution, before biases, penalties, temperature and filters."""
    logprobs = row.float().log_softmax(-1)
    values, ids = logprobs.topk(min(sequence.params.logprobs or 0, row.shape[0]))
    chosen = describe(token, logprobs[token].item())
    return Logprobs(chosen, _top_logprobs(ids.tolist(), values.tolist(), describe))


def _top_logprobs(ids: list[int], logprobs: list[float], describe: Describe) -> tuple[TokenLogprob, ...]:
    return tuple(describe(i, logprob) for i, logprob in zip(ids, logprobs, strict=True))
