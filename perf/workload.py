"""What is asked: prompts that nobody has seen before, or one that everybody sends."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

# Each is one token to most tokenizers, so that a prompt of n words has about n tokens.
_TEXT = (
    "the people water first light house world small great number sound place live where after back little only round "
    "year came show every good give our under name very through just form much think say help low line before turn "
    "cause same mean move right boy old too does tell sentence set three want air well also play home read hand port "
    "large spell add even land here must big high such follow act why ask men change went kind off need picture try"
)
WORDS = _TEXT.split()
_OPENING = 5  # 80 words to the fifth: no two prompts of a run begin alike


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: `prompts` of them in one call, each answered with up to `max_tokens`."""

    prompts: tuple[str, ...]
    max_tokens: int
    streaming: bool = True


@dataclass(frozen=True)
class Workload:
    """`fixed` is sent as it is by everybody; else prompts are `words` random words, by `seed`.

    The first few are by `salt` as well, one a run: a server that was measured before knows no beginning of them.
    """

    words: int
    max_tokens: int
    seed: int
    fixed: str | None = None
    salt: str = ""

    def asks(self, part: str, batch: int = 1, streaming: bool = True) -> Iterator[Ask]:
        """An endless stream of them; another `part` of a run has others, the same ones in every run."""
        rng = random.Random(f"{self.seed} {part}")
        while True:
            prompts = tuple(self.prompt(rng) for _ in range(batch))
            yield Ask(prompts, self.max_tokens, streaming)

    def prompt(self, rng: random.Random, words: int | None = None) -> str:
        if self.fixed is not None:
            return self.fixed
        drawn = rng.choices(WORDS, k=words or self.words)
        opening = random.Random(f"{self.salt} {drawn}").choices(WORDS, k=min(_OPENING, len(drawn)))
        return " ".join([*opening, *drawn[len(opening) :]])
