"""Tests of grammars: the tokens that may come next, and the grammars that are refused."""

from __future__ import annotations

import json
import random
import threading
import time

import jsonschema
import pytest

from serve_app.core.requests import Grammar
from serve_app.engines.text.grammar import Constraint
from serve_app.engines.text.tokenizer import HFText
from serve_app.errors import InvalidRequest

from .constraints import acceptance, allowed_ids, new_constraint, random_answer, token_ids
from .json_schemas import random_schema
from .sample_tokenizers import BYTE_VOCABULARY, END, byte_text, byte_tokenizer

pytestmark = pytest.mark.model

DIGITS = Grammar("regex", "[0-9]{1,3}")


@pytest.fixture(scope="module")
def text() -> HFText:
    """One token for each byte; 256 ends an answer."""
    return byte_text()


def allowed(constraint: Constraint, text: HFText) -> set[str]:
    """The names of all tokens that may come next."""
    return {text.token_text(token) for token in allowed_ids(constraint)}


def accept(constraint: Constraint, text: HFText, character: str) -> bool:
    (token,) = token_ids(text, character)
    return constraint.accept(token)


# Allowed tokens


def test_end_token_is_allowed_exactly_where_the_text_may_end(text: HFText) -> None:
    constraint = new_constraint(text, DIGITS)
    assert allowed(constraint, text) == set("0123456789")
    assert not accept(constraint, text, "4")
    assert allowed(constraint, text) == {*"0123456789", "<end>"}
    assert not accept(constraint, text, "2")
    assert accept(constraint, text, "0"), "no token can follow"
    assert allowed(constraint, text) == {"<end>"}
    assert constraint.accept(END)


def test_end_token_is_allowed_with_ignore_eos_only_where_the_text_must_end(text: HFText) -> None:
    constraint = new_constraint(text, DIGITS, ignore_eos=True)
    for digit in "420":
        assert allowed(constraint, text) == set("0123456789")
        complete = accept(constraint, text, digit)
    assert complete


def test_all_end_tokens_of_a_model_are_allowed_where_the_text_may_end() -> None:
    tilde = byte_tokenizer().convert_tokens_to_ids("~")
    text = HFText(byte_tokenizer(), frozenset({END, tilde}), BYTE_VOCABULARY)
    constraint = new_constraint(text, Grammar("regex", "[!-~]{1,2}"))
    assert not {"<end>", "~"} & allowed(constraint, text)
    accept(constraint, text, "a")
    assert {"<end>", "~"} <= allowed(constraint, text)
    assert constraint.accept(END)


@pytest.mark.parametrize(
    ("grammar", "complete", "incomplete", "wrong"),
    [
        (Grammar("json_object", ""), '{"a": [1, {"b": null}]}', '{"a": 1', "[1]"),
        (Grammar("json_schema", '{"type": "integer", "minimum": 10, "maximum": 20}'), "17", "1", "21"),
        (Grammar("regex", "(ab)+c"), "ababc", "abab", "aba"),
        (Grammar("choice", '["yes", "no", "a \\"third\\" ü"]'), 'a "third" ü', "ye", "maybe"),
        (Grammar("lark", 'start: "a" b+\nb: "b" | "c"'), "abc", "a", "b"),
    ],
)
def test_each_kind_of_grammar_constrains_the_answer(
    text: HFText, grammar: Grammar, complete: str, incomplete: str, wrong: str
) -> None:
    assert [acceptance(text, grammar, answer) for answer in (complete, incomplete)] == [True, False]
    assert not acceptance(text, grammar, wrong)


@pytest.mark.parametrize("values", [(0.01,), (5, 10, 100), (0.00007,), (0.5, 12), (9973,)])
def test_usual_multiples_are_allowed(text: HFText, values: tuple[float, ...]) -> None:
    assert isinstance(text.constraint(Grammar("json_schema", multiples(*values)), False), Constraint)


def test_choice_may_be_a_prefix_of_another_choice(text: HFText) -> None:
    grammar = Grammar("choice", '["a", "ab"]')
    assert [acceptance(text, grammar, answer) for answer in ("a", "ab", "abb")] == [True, True, None]


@pytest.mark.parametrize(("space", "result"), [(" ", True), ("\n" + " " * 24, True), ("  ", None), ("\n\n", None)])
def test_parts_of_a_json_document_are_separated_by_one_space_or_one_line_break(
    text: HFText, space: str, result: bool | None
) -> None:
    assert acceptance(text, Grammar("json_object", ""), f'{{{space}"a":{space}1{space}}}') is result


@pytest.mark.parametrize("number", range(40))
def test_every_answer_that_a_schema_allows_is_a_valid_document(text: HFText, number: int) -> None:
    """The tokens are bytes, so that the random answers contain every escape and character."""
    schema = random_schema(1000 + number)
    document = random_answer(text, Grammar("json_schema", json.dumps(schema)), seed=number)
    jsonschema.validate(json.loads(document), schema, jsonschema.Draft202012Validator)


# Answers with the same grammar


def test_answers_with_the_same_grammar_are_independent(text: HFText) -> None:
    one, other = new_constraint(text, DIGITS), new_constraint(text, DIGITS)
    accept(one, text, "1")
    assert (allowed(one, text) - allowed(other, text)) == {"<end>"}


def test_answer_that_exceeds_the_limits_leaves_other_answers_usable(text: HFText) -> None:
    """The lexer needs up to 2**30 states to know whether an `a` stands 30 characters before the end."""
    grammar = Grammar("regex", "(?s:.*a.{30})")
    first, second = new_constraint(text, grammar, True), new_constraint(text, grammar, True)
    letters, rng = token_ids(text, "ab"), random.Random(1)
    for _ in range(20_000):
        if isinstance(first.allowed(), InvalidRequest):
            break
        first.accept(rng.choice(letters))
    else:
        pytest.fail("the answer did not exceed the limits")
    assert isinstance(second.allowed(), bytearray)
    assert isinstance(new_constraint(text, grammar, True).allowed(), bytearray)


# Refusals


def chain(rule: str, start: str, count: int) -> str:
    """A Lark grammar of rules that refer to each next one. Compiling a chain of 3,000 overflows the stack."""
    rules = [rule.format(number, number + 1) for number in range(count - 1)]
    return "\n".join([start, *rules, rule.partition(":")[0].format(count - 1) + ': "x"'])


def references(count: int) -> str:
    """A JSON schema with a chain of references."""
    definitions = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(count)}
    document = {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{count}": {"type": "string"}}}
    return json.dumps(document, separators=(",", ":"))


def optional(count: int) -> str:
    """A JSON schema of an object with properties that are not required."""
    return json.dumps({"type": "object", "properties": {f"p{number}": {} for number in range(count)}})


def alternatives(levels: int) -> dict[str, object]:
    return {"anyOf": [alternatives(levels - 1)] * 10} if levels else {"type": "integer"}


def multiples(*values: float) -> str:
    return json.dumps({"allOf": [{"type": "number", "multipleOf": value} for value in values]})


# Sources of at most 65,536 characters that are slow to compile, or to compute the first mask of.
SLOW = {
    "optional properties": Grammar("json_schema", optional(500)),
    "objects with optional properties": Grammar("json_schema", json.dumps({"allOf": [json.loads(optional(400))] * 9})),
    "nested repetitions": Grammar("regex", "((a{1,100}){1,100}){1,100}"),
    "a long repetition": Grammar("regex", ".{1,60000}"),
    "classes of Unicode": Grammar("regex", r"(\p{L}{1,500}\p{N}){1,50}"),
    "ambiguous regex": Grammar("regex", "(a|aa|aaa|aaaa)*" * 200),
    "ambiguous rules": Grammar("lark", 'start: s\ns: s s | "a" | '),
    "optional texts": Grammar("lark", "start: " + " ".join(f'"x{number}"?' for number in range(5000))),
    "alternatives": Grammar("json_schema", json.dumps(alternatives(3))),
    "multiples": Grammar("json_schema", '{"type": "integer", "multipleOf": 9973, "maximum": 1000000000000000}'),
}


@pytest.mark.slow
@pytest.mark.parametrize("grammar", SLOW.values(), ids=SLOW)
def test_a_hostile_grammar_takes_little_time_and_other_threads_go_on(text: HFText, grammar: Grammar) -> None:
    """At most 1.5 s of processor time, and the interpreter lock is never held for long."""
    ended, pauses = threading.Event(), [0.0]

    def measure_pauses() -> None:
        last = time.perf_counter()
        while not ended.wait(0.001):
            pauses.append(time.perf_counter() - last)
            last = time.perf_counter()

    text.constraint(Grammar("json_object"), False)  # builds the tables
    thread = threading.Thread(target=measure_pauses)
    thread.start()
    began = time.process_time()
    text.constraint(grammar, False)
    seconds = time.process_time() - began
    ended.set()
    thread.join()
    assert seconds < 1.5
    assert max(pauses) < 0.5


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", "{"), "(json_schema) cannot be read"),
        (Grammar("json_schema", "[]"), "a JSON schema must be an object"),
        (Grammar("json_schema", '{"type": "strange"}'), "(json_schema) does not compile"),
        (Grammar("json_schema", '{"type": "string", "format": "unheard-of"}'), "unheard-of"),
        (Grammar("json_schema", '{"not": {"type": "string"}}'), "(json_schema) does not compile"),
        (Grammar("regex", "(a"), "(regex) does not compile"),
        (Grammar("regex", "(?=a)b"), "(regex) does not compile"),
        (Grammar("choice", "[]"), "a JSON list of one or more strings"),
        (Grammar("choice", '"yes"'), "a JSON list of one or more strings"),
        (Grammar("choice", "[1]"), "a JSON list of one or more strings"),
        (Grammar("lark", "start: other"), "(lark) does not compile"),
        (Grammar("json_schema", "[" * 30_000), "(json_schema) cannot be read"),
        (Grammar("regex", "x" * 65_537), "has 65537 characters; at most 65536 are allowed"),
        (Grammar("lark", chain("r{}: r{}", "start: r0", 5000)), "has 5001 rules or references; at most 500 are"),
        (Grammar("lark", chain("R{}: R{}", "start: R0", 5000)), "has 5001 rules or references; at most 500 are"),
        (Grammar("json_schema", references(1500)), "has 1501 rules or references; at most 500 are allowed"),
        (Grammar("lark", f"start: %json {references(1500)}\n"), "has 1502 rules or references; at most 500 are"),
        (Grammar("json_schema", optional(501)), "has 501 optional properties in one object; at most 500 are allowed"),
        (Grammar("json_schema", multiples(999_983)), "has 999983 as the least common multiple"),
        (
            Grammar("json_schema", multiples(97, 89, 83)),
            "has 716539 as the least common multiple",
        ),
        (Grammar("json_schema", multiples(0.007, 1009)), "has 7063000 as the least common multiple"),
        (Grammar("lark", f"start: %json {optional(5000)}\n"), "has 5000 optional properties in one object; at most"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else value.kind,
)
def test_grammar_that_cannot_be_followed_is_refused_each_time(text: HFText, grammar: Grammar, message: str) -> None:
    for _ in range(2):
        refusal = text.constraint(grammar, False)
        assert isinstance(refusal, InvalidRequest)
        assert message in refusal.message
        assert refusal.param == "grammar"


def test_tokenizer_without_grammar_support_refuses_every_grammar() -> None:
    refusal = HFText(byte_tokenizer(), frozenset({END}), 100).constraint(DIGITS, False)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.message == "this model's tokenizer does not support grammars"
