"""Constrains answers to grammars: computes the tokens that may come next with llguidance, an Earley parser."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from fractions import Fraction
from functools import cached_property, lru_cache

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from serve_app.core.requests import Grammar
from serve_app.engines.text.json_schema import location_of, prepared_schema
from serve_app.errors import InvalidRequest, ServeAppError

logger = logging.getLogger(__name__)

_MAX_CHARACTERS = 65_536
# Above the number of tools of a request, each of which may be compiled alone.
_CACHED_GRAMMARS = 160
# Rules, or references of a JSON schema. llguidance follows a chain of them recursively: a chain of about 2,000
# overflows the thread's stack, which ends the process (measured with 1.9.1: 1,000 work, 3,000 do not).
_MAX_DEFINITIONS = 500
# Properties of one object that a JSON schema does not require. llguidance's work is their square: 500 take 30 ms of
# processor time, 2,000 take 0.4 s, and 5,000 take 3 s.
_MAX_OPTIONAL = 500
# llguidance builds an automaton with as many states as the least common multiple of the values of `multipleOf`, within
# none of its limits: 9,973 take 30 ms, 99,991 take 0.7 s, and 999,983 take 12 s.
_MAX_MULTIPLE = 10_000
# At most half of llguidance's defaults. With these limits the slowest mask of grammars made to be slow took 48 ms.
# llguidance's documentation states 1 to 2 kB of memory for each lexer state.
_LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=50_000, verbose_errors=False)


class Constraint:
    """The state of one answer in its grammar. Belongs to one sequence; one thread at a time uses it."""

    def __init__(self, matcher: LLMatcher, end_ids: frozenset[int], ignore_eos: bool, field: str) -> None:
        self._matcher = matcher
        self._field = field
        self._end_ids = end_ids
        self._ignore_eos = ignore_eos

    def allowed(self) -> bytearray | ServeAppError:
        """One bit for each token of the vocabulary, lowest bit of a byte first: whether the token may come next.

        End tokens are allowed where the text may end; with `ignore_eos`, only where it must end. InvalidRequest if the
        grammar exceeds the limits of computation.
        """
        bits = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            return InvalidRequest(f"the grammar cannot be followed: {_error_text(self._matcher)}", param=self._field)
        may_end = self._matcher.is_stopped() or (self._matcher.is_accepting() and not self._ignore_eos)
        for token in self._end_ids:
            bits[token // 8] = bits[token // 8] & ~(1 << token % 8) | may_end << token % 8
        return bits

    def accept(self, token_id: int) -> bool:
        """Add the next token of the answer. True if the answer is complete and no token can follow."""
        if token_id in self._end_ids:
            return True
        return self._matcher.consume_token(token_id) and self._matcher.is_stopped()


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Can be used from any thread.

    The trie of the tokenizer's tokens is built with the first grammar: for 49,152 tokens that holds the interpreter
    lock for 0.25 s, so the loader compiles a grammar before the model serves requests.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int], vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._end_ids = frozenset(token for token in end_ids if token < vocabulary)
        self._vocabulary = vocabulary
        self._compiled = lru_cache(_CACHED_GRAMMARS)(self._compile)

    def constraint(self, grammar: Grammar, ignore_eos: bool) -> Constraint | ServeAppError:
        """The constraint of a new answer; InvalidRequest if the grammar cannot be compiled."""
        compiled = self._compiled(grammar)
        if isinstance(compiled, str):
            errors = (self.constraint(part, ignore_eos) for part in grammar.parts)
            error = next((error for error in errors if isinstance(error, ServeAppError)), None)
            return error or InvalidRequest(compiled, param=grammar.field)
        tokenizer = compiled.tokenizer
        ends = self._end_ids or frozenset(token for token in [tokenizer.eos_token] if token < self._vocabulary)
        return Constraint(compiled.new_matcher(), ends, ignore_eos, grammar.field)

    def marker_tokens(self, token_ids: Iterable[int]) -> frozenset[int] | None:
        """The given tokens that are not text to a grammar; None if the tokenizer does not support grammars."""
        trie = self._trie
        return None if isinstance(trie, str) else frozenset(filter(trie.is_special_token, token_ids))

    def _compile(self, grammar: Grammar) -> _CompiledGrammar | str:
        """The compiled grammar, or the sentence of the error."""
        if isinstance(self._trie, str):
            return self._trie
        try:
            source = _source(grammar)
        except _TooMuch as error:
            return str(error)
        except (TypeError, ValueError, RecursionError) as error:
            return f"the grammar ({grammar.kind}) cannot be read: {error}"
        characters = len(source if grammar.kind == "json_schema" else grammar.text)
        if characters > _MAX_CHARACTERS:
            return f"the grammar has {characters} characters; at most {_MAX_CHARACTERS} are allowed"
        matcher = _matcher(self._trie, source)
        matcher.compute_bitmask()  # the first mask is the slowest, and can already exceed the limits
        if matcher.is_error():
            fault = _error_text(matcher)
            place = location_of(grammar.text, fault) if grammar.kind == "json_schema" else ""
            return f"the grammar ({grammar.kind}) does not compile: {place}{fault}"
        return _CompiledGrammar(self._trie, source, matcher)

    @cached_property
    def _trie(self) -> LLTokenizer | str:
        """The tokenizer for llguidance, or the sentence of the error."""
        eos = min(self._end_ids, default=None)
        try:
            return LLTokenizer(self._tokenizer.to_str(), n_vocab=self._vocabulary, eos_token=eos)
        except ValueError as error:
            logger.warning("no grammars for this model: %s", error)
            return "this model's tokenizer does not support grammars"


class _CompiledGrammar:
    """A grammar without errors. Makes one matcher for each answer; the first is the one that found no errors.

    Matchers are not copied: copies share a lexer, and an answer that takes the lexer past its limit would make it
    unusable for all other answers.
    """

    def __init__(self, tokenizer: LLTokenizer, source: str, first: LLMatcher) -> None:
        self.tokenizer = tokenizer
        self._source = source
        self._first = [first]

    def new_matcher(self) -> LLMatcher:
        try:
            return self._first.pop()  # atomic: threads that compile the same grammar never share a matcher
        except IndexError:
            return _matcher(self.tokenizer, self._source)


class _TooMuch(Exception):
    def __init__(self, count: int, what: str, most: int) -> None:
        super().__init__(f"the grammar has {count} {what}; at most {most} are allowed")


def _matcher(tokenizer: LLTokenizer, source: str) -> LLMatcher:
    return LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)


def _error_text(matcher: LLMatcher) -> str:
    return " ".join(matcher.get_error().replace("<non-verbose/>", "").split())


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form.

    Raises ValueError, TypeError or RecursionError if its text does not fit its kind, and _TooMuch.
    """
    match grammar.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema(prepared_schema('{"type": "object"}', True))
        case "json_schema":
            _check_definitions(_references(json.loads(grammar.text)))
            return LLMatcher.grammar_from_json_schema(prepared_schema(grammar.text, grammar.strict))
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            return f"start: CHOICE\nCHOICE: {' | '.join(json.dumps(choice) for choice in _choices(grammar.text))}"
        case "lark":
            _check_definitions(_lark_definitions(grammar.text))
            return LLMatcher.grammar_from_lark(grammar.text)


def _choices(text: str) -> list[str]:
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise TypeError("choices must be a JSON list of one or more strings")
    return choices


def _check_definitions(count: int) -> None:
    if count > _MAX_DEFINITIONS:
        raise _TooMuch(count, "rules or references", _MAX_DEFINITIONS)


def _lark_definitions(text: str) -> int:
    """The number of rules, counted as lines with a colon, and of references in the schemas after `%json`.

    Raises ValueError or RecursionError if a schema is not JSON, and _TooMuch for its optional properties.
    """
    count = 0
    while (position := text.find("%json")) >= 0:
        document = text[position + len("%json") :].lstrip()
        schema, end = json.JSONDecoder().raw_decode(document)
        count += _references(schema) + _rules(text[:position])
        text = document[end:]
    return count + _rules(text)


def _rules(text: str) -> int:
    return sum(":" in line for line in text.splitlines())


def _references(schema: object) -> int:
    """The number of `$ref` members. Raises _TooMuch for other parts that take llguidance much time."""
    count, multiples, remaining = 0, list[Fraction](), [schema]
    while remaining:
        match remaining.pop():
            case dict() as section:
                count += "$ref" in section
                _check_optional(section)
                multiple = section.get("multipleOf")
                if isinstance(multiple, (int, float)) and multiple > 0:
                    multiples.append(Fraction(str(multiple)))
                remaining += section.values()
            case list() as members:
                remaining += members
    _check_multiples(multiples)
    return count


def _check_multiples(multiples: list[Fraction]) -> None:
    unit = math.lcm(*(each.denominator for each in multiples))
    common = math.lcm(*(int(each * unit) for each in multiples))
    if common > _MAX_MULTIPLE:
        raise _TooMuch(common, "as the least common multiple of its values of multipleOf", _MAX_MULTIPLE)


def _check_optional(section: dict[str, object]) -> None:
    properties, required = section.get("properties"), section.get("required")
    if isinstance(properties, dict):
        optional = len(properties) - (len(required) if isinstance(required, list) else 0)
        if optional > _MAX_OPTIONAL:
            raise _TooMuch(optional, "optional properties in one object", _MAX_OPTIONAL)
