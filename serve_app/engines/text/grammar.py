"""Answers that follow a grammar: which tokens may come next, by llguidance (Earley parser over a trie of tokens)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from functools import cached_property, lru_cache

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from serve_app.core.requests import Grammar
from serve_app.errors import InvalidRequest, ServeAppError

logger = logging.getLogger(__name__)

_MOST_CHARACTERS = 65_536
_CHECKED = 32
# Rules, or references of a schema. llguidance follows them one inside the other, and some 2,000 in a chain overflow a
# thread's stack, which is the end of the process (1.9.1: 1,000 are fine, 3,000 are not).
_MOST_DEFINITIONS = 500
# Between the parts of a JSON document; without a bound an unsure model writes spaces until its tokens are used up.
_SPACE = r" |\r?\n[ \t]{0,24}"
# Half and less of llguidance's own bounds. Of grammars made to be slow the worst mask took 48 ms then; its states may
# take 1 to 2 kB each, says the library.
_LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=50_000, verbose_errors=False)


class Constraint:
    """Where one answer is in its grammar. Belongs to one sequence, and is used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, end_ids: frozenset[int], ignore_eos: bool, field: str) -> None:
        self._matcher = matcher
        self._field = field
        self._end_ids = end_ids
        self._ignore_eos = ignore_eos

    def allowed(self) -> bytearray | ServeAppError:
        """One bit for each token of the vocabulary, lowest first in a byte: whether it may come next.

        The end tokens may exactly where the text may end; with ignore_eos, where it can only end. An error when the
        grammar asks for more computing than is given.
        """
        bits = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            return InvalidRequest(f"the grammar cannot be followed: {_why(self._matcher)}", param=self._field)
        may_end = self._matcher.is_stopped() or (self._matcher.is_accepting() and not self._ignore_eos)
        for token in self._end_ids:
            bits[token // 8] = bits[token // 8] & ~(1 << token % 8) | may_end << token % 8
        return bits

    def accept(self, token_id: int) -> bool:
        """Take in the answer's next token; whether the answer is complete, and nothing more can follow."""
        if token_id in self._end_ids:
            return True
        return self._matcher.consume_token(token_id) and self._matcher.is_stopped()


class Grammars:
    """Compiles grammars for one tokenizer, and knows of the last ones whether they can be. To be used from any thread.

    Nothing compiled is kept: copies of a matcher share their lexer, and one answer that takes it past its bound
    would leave it unusable for all others. The tokenizer's trie is built with the first grammar, best before
    anybody is served: for 49,152 tokens that holds the interpreter for 0.25 s.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int], vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._end_ids = frozenset(token for token in end_ids if token < vocabulary)
        self._vocabulary = vocabulary
        self._checked = lru_cache(_CHECKED)(self._check)

    def constraint(self, grammar: Grammar, ignore_eos: bool) -> Constraint | ServeAppError:
        """The beginning of an answer in this grammar; InvalidRequest if there can be none."""
        source, why_not = self._checked(grammar)
        if why_not:
            refusals = (self.constraint(part, ignore_eos) for part in grammar.parts)
            named = next((refusal for refusal in refusals if isinstance(refusal, ServeAppError)), None)
            return named or InvalidRequest(why_not, param=grammar.field)
        tokenizer = self._trie
        assert isinstance(tokenizer, LLTokenizer), "what was compiled was compiled for it"
        ends = self._end_ids or frozenset(token for token in [tokenizer.eos_token] if token < self._vocabulary)
        return Constraint(_matcher(tokenizer, source), ends, ignore_eos, grammar.field)

    def signs(self, token_ids: Iterable[int]) -> frozenset[int] | None:
        """Those of these tokens that are no text to a grammar; None if there are no grammars for this tokenizer."""
        trie = self._trie
        return None if isinstance(trie, str) else frozenset(filter(trie.is_special_token, token_ids))

    def _check(self, grammar: Grammar) -> tuple[str, str]:
        """The grammar as llguidance takes it, and a sentence why it does not: one of them is empty."""
        if len(grammar.text) > _MOST_CHARACTERS:
            return "", f"the grammar has {len(grammar.text)} characters; at most {_MOST_CHARACTERS} are taken"
        if isinstance(self._trie, str):
            return "", self._trie
        try:
            source, definitions = _source(grammar), _definitions(grammar)
        except (TypeError, ValueError, RecursionError) as error:
            return "", f"the grammar ({grammar.kind}) cannot be read: {error}"
        if definitions > _MOST_DEFINITIONS:
            return "", f"the grammar has {definitions} rules or references; at most {_MOST_DEFINITIONS} are taken"
        matcher = _matcher(self._trie, source)
        matcher.compute_bitmask()  # the first one takes longest, and may be too much already
        if matcher.is_error():
            return "", f"the grammar ({grammar.kind}) does not compile: {_why(matcher)}"
        return source, ""

    @cached_property
    def _trie(self) -> LLTokenizer | str:
        """The tokenizer as llguidance wants it; or a sentence why it does not."""
        eos = min(self._end_ids, default=None)
        try:
            return LLTokenizer(self._tokenizer.to_str(), n_vocab=self._vocabulary, eos_token=eos)
        except ValueError as error:
            logger.warning("no grammars for this model: %s", error)
            return "this model's tokenizer is of a kind that grammars cannot be used with"


def _matcher(tokenizer: LLTokenizer, source: str) -> LLMatcher:
    """At its beginning."""
    return LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)


def _definitions(grammar: Grammar) -> int:
    """How many things it may define by another one; of Lark every line with a colon, of JSON every `$ref`.

    Raises ValueError and RecursionError.
    """
    if grammar.kind == "json_schema":
        return _references(json.loads(grammar.text))
    if grammar.kind != "lark":
        return 0
    count, rest = 0, grammar.text
    while (at := rest.find("%json")) >= 0:  # which has a schema behind it
        document = rest[at + len("%json") :].lstrip()
        schema, end = json.JSONDecoder().raw_decode(document)
        count += _references(schema) + _rules(rest[:at])
        rest = document[end:]
    return count + _rules(rest)


def _rules(text: str) -> int:
    return sum(":" in line for line in text.splitlines())


def _references(schema: object) -> int:
    count, left = 0, [schema]
    while left:
        match left.pop():
            case dict() as section:
                count += "$ref" in section
                left += section.values()
            case list() as members:
                left += members
    return count


def _why(matcher: LLMatcher) -> str:
    return " ".join(matcher.get_error().replace("<non-verbose/>", "").split())


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises ValueError or TypeError when its text is not what its kind says."""
    match grammar.kind:
        case "json_object":
            return _json_schema({"type": "object"})
        case "json_schema":
            return _json_schema(json.loads(grammar.text))
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            return f"start: CHOICE\nCHOICE: {' | '.join(json.dumps(choice) for choice in _choices(grammar.text))}"
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)


def _json_schema(schema: object) -> str:
    if not isinstance(schema, dict):
        raise TypeError("a JSON schema is an object here")
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _SPACE})


def _choices(text: str) -> list[str]:
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise TypeError("choices are a JSON list of strings, at least one")
    return choices
