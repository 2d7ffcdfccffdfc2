"""The requests of a load: random prompts that no cache has seen before, or one fixed prompt."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

# Each word is one token in most tokenizers, so a prompt of n words has about n tokens.
_TEXT = (
    "the people water first light house world small great number sound place live where after back little only round "
    "year came show every good give our under name very through just form much think say help low line before turn "
    "cause same mean move right boy old too does tell sentence set three want air well also play home read hand port "
    "large spell add even land here must big high such follow act why ask men change went kind off need picture try"
)
WORDS = _TEXT.split()
_OPENING = 5  # 80^5 openings: no two prompts of a run start with the same words


@dataclass(frozen=True, slots=True)
class Request:
    """One call with one or more prompts; each prompt gets up to `max_tokens` tokens."""

    prompts: tuple[str, ...]
    max_tokens: int
    streaming: bool = True


@dataclass(frozen=True)
class Workload:
    """Prompts of `words` random words drawn by `seed`, or `fixed_prompt` for every request if it is set.

    The first words of a prompt also depend on `salt`, which differs between runs: a server that was measured before
    has no cached prefix of them.
    """

    words: int
    max_tokens: int
    seed: int
    fixed_prompt: str | None = None
    salt: str = ""

    def requests(self, part: str, batch: int = 1, streaming: bool = True) -> Iterator[Request]:
        """An endless sequence; each `part` of a run has its own requests, the same ones in every run."""
        rng = random.Random(f"{self.seed} {part}")
        while True:
            prompts = tuple(self.prompt(rng) for _ in range(batch))
            yield Request(prompts, self.max_tokens, streaming)

    def prompt(self, rng: random.Random, words: int | None = None) -> str:
        if self.fixed_prompt is not None:
            return self.fixed_prompt
        drawn = rng.choices(WORDS, k=words or self.words)
        opening = random.Random(f"{self.salt} {drawn}").choices(WORDS, k=min(_OPENING, len(drawn)))
        return " ".join([*opening, *drawn[len(opening) :]])
