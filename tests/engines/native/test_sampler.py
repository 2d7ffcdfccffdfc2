"""Sampling, compared with naive references: distribution, filters, penalties and independence of other rows."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from serve_app.core.events import TokenLogprob
from serve_app.core.requests import SamplingParams
from serve_app.engines.native.failure import Failure
from serve_app.engines.native.sampler import prompt_logprobs, sample, uniform
from serve_app.engines.native.sequence import Sequence
from serve_app.engines.protocol import Cause
from tests.engines.native.helpers import Panic, describe, request, sequence, sequences, tokens_of

pytestmark = pytest.mark.model

WARM = SamplingParams(max_tokens=None)
GREEDY = SamplingParams(temperature=0.0)


def noise(*shape: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def seeded(count: int, params: SamplingParams) -> list[Sequence]:
    """Sequences with the same parameters and the seeds 0, 1, 2 ..."""
    return sequences([request(params=replace(params, seed=seed)) for seed in range(count)])


def chosen(logits: torch.Tensor, batch: list[Sequence]) -> list[int]:
    return [sampled.token_id for sampled in tokens_of(sample(logits, batch, describe))]


def draws(row: torch.Tensor, params: SamplingParams, count: int) -> list[int]:
    return chosen(row.expand(count, -1), seeded(count, params))


def reference(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities after temperature, top-k, top-p of the rest, then min-p, by a sort of the whole vocabulary."""
    probs = torch.softmax(row.double() / params.temperature, dim=-1)
    order = probs.argsort(descending=True).tolist()
    if params.top_k:
        order = order[: params.top_k]
    total, mass, kept = math.fsum(probs[order].tolist()), 0.0, []
    for token in order:
        if mass >= params.top_p * total:
            break
        mass += probs[token].item()
        if probs[token] >= params.min_p * probs[order[0]]:
            kept.append(token)
    result = torch.zeros_like(probs)
    result[kept] = probs[kept]
    return result / result.sum()


def matches(tokens: list[int], probs: torch.Tensor) -> bool:
    """Pearson's chi-square test with rare tokens pooled; bound of four standard deviations (Wilson and Hilferty)."""
    counts, expected = Counter(tokens), (probs * len(tokens)).tolist()
    observed_bins, expected_bins, rare_observed, rare_expected = [], [], 0, 0.0
    for token, share in enumerate(expected):
        if share < 5:
            rare_observed, rare_expected = rare_observed + counts[token], rare_expected + share
        else:
            observed_bins.append(counts[token])
            expected_bins.append(share)
    if rare_expected >= 5:
        observed_bins.append(rare_observed)
        expected_bins.append(rare_expected)
    freedom = len(expected_bins) - 1
    if freedom == 0:
        return True
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed_bins, expected_bins, strict=True))
    return bool(statistic < freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3)


# Distribution and filters


def test_temperature_0_chooses_the_argmax() -> None:
    logits = noise(20, 1000)
    assert chosen(logits, seeded(20, GREEDY)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    row, params = noise(30), replace(WARM, temperature=temperature)
    tokens = draws(row, params, 2000)
    assert matches(tokens, reference(row, params))
    assert not matches(tokens, reference(row, replace(params, temperature=temperature * 1.5)))


FILTERS = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.6},
    {"top_p": 0.01},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 10, "top_p": 0.7},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.1},
    {"top_p": 0.95, "min_p": 0.05},
    {"top_k": 10_000, "top_p": 0.5},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(("vocabulary", "spread"), [(40, 2.0), (700, 3.0)])
def test_filters_keep_the_same_tokens_as_a_naive_reference(
    filters: dict[str, Any], vocabulary: int, spread: float
) -> None:
    row, params = noise(vocabulary, seed=3, spread=spread), replace(WARM, temperature=1.3, **filters)
    expected = reference(row, params)
    tokens = draws(row, params, 600)
    assert set(tokens) <= set(expected.nonzero()[:, 0].tolist())
    assert matches(tokens, expected)


@pytest.mark.parametrize(
    "filters", [{"top_p": 0.9}, {"top_k": 300}, {"top_k": 350, "top_p": 0.9}, {"min_p": 0.3}, {"min_p": 0.001}], ids=str
)
def test_filters_that_keep_more_tokens_than_the_candidates_are_exact(filters: dict[str, Any]) -> None:
    """Each filter keeps more than 256 of 400 tokens with nearly equal logits."""
    row, params = noise(400, seed=5, spread=0.3), replace(WARM, **filters)
    expected = reference(row, params)
    kept = set(expected.nonzero()[:, 0].tolist())
    tokens = draws(row, params, 1200)
    assert len(kept) > 256
    assert set(tokens) <= kept
    assert len(set(tokens)) > 0.9 * len(kept)
    assert matches([token % 40 for token in tokens], expected.view(10, 40).sum(0))


@pytest.mark.parametrize(
    "smallest", [{"temperature": 1e-40}, {"temperature": 1e-300}, {"top_p": 5e-324}, {"top_p": 5e-324, "top_k": 3}]
)
def test_tiny_temperature_or_top_p_chooses_the_most_likely_token(smallest: dict[str, Any]) -> None:
    row = noise(500)
    assert set(draws(row, replace(WARM, **smallest), 20)) == {int(row.argmax())}


def test_a_tiny_repetition_penalty_makes_no_infinite_logit() -> None:
    params = replace(WARM, repetition_penalty=1e-40, seed=1)
    row = noise(300).abs()
    assert chosen(row[None], [sequence([1, 2, 3], params)])[0] == 1 + int(row[1:4].argmax())


# Independence of other rows


def mixed(count: int) -> list[SamplingParams]:
    rng = random.Random(11)
    return [
        SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.0, 1.8]),
            top_k=rng.choice([0, 0, 3, 300]),
            top_p=rng.choice([1.0, 0.6, 0.99]),
            min_p=rng.choice([0.0, 0.0, 0.1]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.5]),
            min_tokens=rng.choice([0, 5]),
            seed=seed,
        )
        for seed in range(count)
    ]


@pytest.mark.parametrize("spread", [0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_does_not_depend_on_other_rows_or_the_row_number(spread: float, dtype: torch.dtype) -> None:
    """In bfloat16 many logits are equal, and their order must not depend on other rows either."""
    logits = noise(60, 2000, seed=9, spread=spread).to(dtype)
    batch = sequences([request(params=params) for params in mixed(60)])
    alone = [chosen(logits[i : i + 1], [batch[i]])[0] for i in range(60)]
    for seed in range(3):
        order = random.Random(seed).sample(range(60), 60 - 20 * seed)
        assert chosen(logits[order], [batch[i] for i in order]) == [alone[i] for i in order]


@pytest.mark.parametrize("params", [WARM, replace(WARM, top_k=5), SamplingParams(), SamplingParams(min_tokens=5)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_without_finite_logits_fails_and_does_not_change_other_rows(bad: float, params: SamplingParams) -> None:
    logits, batch = noise(3, 400), seeded(3, params)
    expected = sample(logits, batch, describe)
    logits[1, slice(None) if bad == -math.inf else 7] = bad
    outcomes = sample(logits, batch, describe)
    assert (outcomes[0], outcomes[2]) == (expected[0], expected[2])
    assert isinstance(outcomes[1], Failure)
    assert outcomes[1].cause is Cause.NOT_FINITE


class Panicking:
    """A constraint that fails as a panic of a Rust extension."""

    def allowed(self) -> bytes:
        raise Panic


def test_an_exception_of_a_grammar_or_of_logprobs_fails_only_its_row() -> None:
    def fails_on_logprobs(token: int, logprob: float) -> TokenLogprob:
        raise ValueError("scripted")

    logits, batch = noise(3, 400), seeded(3, WARM)
    expected = sample(logits, batch, describe)
    batch[0].ending = replace(batch[0].ending, constraint=Panicking())  # type: ignore[arg-type]
    batch[2].params = replace(batch[2].params, logprobs=1)
    outcomes = sample(logits, batch, fails_on_logprobs)
    assert outcomes[1] == expected[1]
    assert [one.cause for one in (outcomes[0], outcomes[2]) if isinstance(one, Failure)] == [Cause.ERROR] * 2


def test_the_same_seed_repeats_an_answer_and_another_seed_changes_it() -> None:
    logits = noise(40, 500, spread=1.0)

    def answer(seed: int) -> list[int]:
        current = sequence(params=replace(WARM, seed=seed))
        for row in logits:
            current.tokens += chosen(row[None], [current])
        return current.tokens[current.prompt_len :]

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)
    assert len(set(answer(7))) > 30, "each position must have its own draw"


def test_the_generator_is_uniform_over_positions_and_over_seeds() -> None:
    for numbers in ([uniform(42, n) for n in range(4000)], [uniform(n, 0) for n in range(4000)]):
        assert all(0 <= u < 1 for u in numbers)
        assert matches([int(u * 20) for u in numbers], torch.full((20,), 0.05))


def test_the_generator_equals_splitmix64() -> None:
    """The first outputs of the reference implementation for seed 1234567, from Rosetta Code."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(uniform(1234567, n) * 2**52) for n in range(3)] == [number >> 12 for number in expected]


# Penalties, biases and min_tokens


def penalized(row: list[float], current: Sequence) -> list[float]:
    """Logits after penalties and min_tokens, by the definitions."""
    p, answer = current.params, current.tokens[current.prompt_len :]
    result = []
    for token, logit in enumerate(row):
        if token in current.tokens:
            logit = logit / p.repetition_penalty if logit > 0 else logit * p.repetition_penalty
        if token in answer:
            logit -= p.presence_penalty + p.frequency_penalty * answer.count(token)
        if token in current.end_ids and len(answer) < p.min_tokens:
            logit = -math.inf
        result.append(logit)
    return result


def test_penalties_equal_a_naive_reference() -> None:
    rng, vocabulary = random.Random(4), 8
    logits = noise(150, vocabulary, spread=1.0)
    batch, expected = [], []
    for row in logits:
        current = sequence(
            [rng.randrange(vocabulary) for _ in range(3)],
            SamplingParams(
                temperature=0.0,
                repetition_penalty=rng.choice([1.0, 0.6, 1.7]),
                presence_penalty=rng.choice([0.0, -0.8, 0.8]),
                frequency_penalty=rng.choice([0.0, -0.5, 0.5]),
                min_tokens=rng.choice([0, 2, 9]),
                stop_token_ids=(0, 1),
            ),
        )
        current.tokens += [rng.randrange(vocabulary) for _ in range(rng.choice([0, 1, 6]))]
        batch.append(current)
        reference_row = penalized(row.tolist(), current)
        expected.append(reference_row.index(max(reference_row)))
    before = logits.clone()
    tokens = chosen(logits, batch)
    assert tokens == expected
    assert tokens != logits.argmax(-1).tolist()
    assert torch.equal(logits, before), "sampling must not change the model's logits"


def test_biases_are_added_before_penalties_at_any_temperature() -> None:
    """Seven rows in one call, some with biases; penalties apply to the sum."""
    rows = noise(7, 50, spread=1.0)
    biases = [
        ((3, 50.0),),
        (),
        ((4, 50.0), (5, 60.0)),
        ((int(rows[3].argmax()), -100.0),),
        ((6, 30.0), (6, 30.0)),
        (),
        (),
    ]
    params = [
        SamplingParams(temperature=0.0 if i % 2 else 1.0, seed=i, logit_bias=bias) for i, bias in enumerate(biases)
    ]
    plain = [SamplingParams(temperature=0.0 if i % 2 else 1.0, seed=i) for i in range(7)]
    before = rows.clone()
    tokens = chosen(rows, [sequence(params=p) for p in params])
    unbiased = chosen(rows, [sequence(params=p) for p in plain])
    assert [tokens[i] for i in (0, 2, 4)] == [3, 5, 6]
    assert tokens[3] == int(rows[3].argsort(descending=True)[1])
    assert [tokens[i] for i in (1, 5, 6)] == [unbiased[i] for i in (1, 5, 6)]
    assert torch.equal(rows, before)
    penalized = SamplingParams(temperature=0.0, logit_bias=((1, 40.0), (2, 30.0)), repetition_penalty=2.0)
    assert chosen(rows[:1], [sequence([1], penalized)]) == [2]


def test_draws_with_a_bias_follow_the_shifted_softmax() -> None:
    row, params = noise(30), replace(WARM, logit_bias=((3, 1.5), (7, -2.0)))
    shifted = row.clone()
    shifted[3] += 1.5
    shifted[7] -= 2.0
    tokens = draws(row, params, 2000)
    assert matches(tokens, reference(shifted, WARM))
    assert not matches(tokens, reference(row, WARM))


def test_logprobs_do_not_include_the_bias() -> None:
    row = noise(50)
    current = [sequence(params=replace(GREEDY, logprobs=1, logit_bias=((3, 100.0),)))]
    (sampled,) = tokens_of(sample(row[None], current, describe))
    assert sampled.logprobs is not None
    assert sampled.token_id == 3
    assert sampled.logprobs.chosen.logprob == pytest.approx(row.log_softmax(-1)[3].item())
    assert sampled.logprobs.top[0].token_id == int(row.argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_token_before_min_tokens(temperature: float) -> None:
    """Token 256, the toy's end token, has the largest logit; stop ids beyond the vocabulary are ignored."""
    row = noise(300)
    row[256] = 50.0
    params = SamplingParams(temperature=temperature, min_tokens=2, stop_token_ids=(1000,), seed=0)
    current, ended = sequence(params=params), []
    for _ in range(3):
        (token,) = chosen(row[None], [current])
        current.tokens.append(token)
        ended.append(token == 256)
    assert ended == [False, False, True]


def test_min_tokens_without_end_tokens_changes_nothing() -> None:
    row = noise(300)
    current = sequence(params=SamplingParams(temperature=0.0, min_tokens=2, ignore_eos=True))
    assert chosen(row[None], [current]) == [int(row.argmax())]


# Logprobs


def test_logprobs_are_those_before_penalties_temperature_and_filters() -> None:
    row = noise(50)
    params = SamplingParams(temperature=0.3, top_k=2, repetition_penalty=1.9, seed=1, logprobs=4)
    current = [sequence([1, 2, 3], params)]
    (sampled,) = tokens_of(sample(row[None].bfloat16(), current, describe))
    own = row.bfloat16().float().log_softmax(-1)
    assert sampled.logprobs is not None
    token, top = sampled.logprobs.chosen, sampled.logprobs.top
    assert (token.token_id, token.token) == (sampled.token_id, f"<{sampled.token_id}>")
    assert token.logprob == pytest.approx(own[sampled.token_id].item())
    assert [t.logprob for t in top] == pytest.approx(own.sort(descending=True).values[:4].tolist())
    assert [own[t.token_id].item() for t in top] == pytest.approx([t.logprob for t in top])


@pytest.mark.parametrize(("requested", "returned"), [(0, 0), (3, 3), (99, 10)])
def test_the_number_of_alternatives_is_the_requested_one(requested: int, returned: int) -> None:
    (sampled,) = tokens_of(sample(noise(1, 10), [sequence(params=replace(GREEDY, logprobs=requested))], describe))
    assert sampled.logprobs is not None
    assert len(sampled.logprobs.top) == returned


def test_no_logprobs_without_a_request() -> None:
    (sampled,) = tokens_of(sample(noise(1, 10), seeded(1, GREEDY), describe))
    assert sampled.logprobs is None


def test_prompt_logprobs_are_log_softmax_and_rank() -> None:
    rows, tokens = noise(200, 300, seed=3), list(range(40, 240))  # more rows than one part
    rows[1] = 0.0  # equal logits
    for row, token, returned in zip(rows, tokens, prompt_logprobs(rows, tokens, 5, describe), strict=True):
        logprobs = row.double().log_softmax(-1)
        assert (returned.chosen.token_id, returned.chosen.token) == (token, f"<{token}>")
        assert returned.chosen.logprob == pytest.approx(logprobs[token].item(), abs=1e-5)
        assert returned.rank == 1 + int((row > row[token]).sum())
        assert [one.logprob for one in returned.top] == pytest.approx(logprobs.topk(5).values.tolist(), abs=1e-5)
        assert [one.logprob for one in returned.top] == pytest.approx(
            [logprobs[one.token_id].item() for one in returned.top]
        )


def test_prompt_logprobs_of_nan_are_an_error() -> None:
    with pytest.raises(FloatingPointError):
        prompt_logprobs(torch.full((1, 4), math.nan), [1], 0, describe)
