"""A model's tokenizer: prompts to token ids, token ids to text, and the plan for an answer to a prompt."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence as Seq
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

from tokenizers import Encoding, Tokenizer
from tokenizers.decoders import DecodeStream

from serve_app.core.events import TextToken, TokenLogprob
from serve_app.core.queries import AddedToken, TokenizerInfo
from serve_app.core.requests import (
    ChatPrompt,
    GenerationRequest,
    Grammar,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
    ToolChoice,
)
from serve_app.engines.text.chat_template import ChatTemplate
from serve_app.engines.text.grammar import Constraint, GrammarCompiler
from serve_app.engines.text.overlap import common_prefix
from serve_app.engines.text.protocol import AnswerPlan
from serve_app.engines.text.reasoning import plan_with_reasoning
from serve_app.engines.text.tool_format import MarkerTokens
from serve_app.engines.text.tool_use import plan_tool_use
from serve_app.errors import InternalError, InvalidRequest, ServeAppError

logger = logging.getLogger(__name__)

# The last tokens of the prompt that a decoder reads, for example to know whether its first token begins with a space.
_CONTEXT_TOKENS = 8
# The chat templates of variants that are kept, besides the model's own.
_MOST_TEMPLATES = 8

# Stands in a text for bytes that are not a whole character.
_INCOMPLETE = "\ufffd"
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# GPT-2's characters for bytes: printable ones stand for themselves, the n-th other byte is character 256 + n.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + number): byte for number, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


class _PanicsAsErrors:
    """Raises RuntimeError in place of a Rust panic, which is a BaseException that no handler of errors catches."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if kind is not None and kind.__module__ == "pyo3_runtime":
            raise RuntimeError(f"the tokenizer panicked: {error}") from error


_panics_as_errors = _PanicsAsErrors()


class StreamDecoder:
    """Decodes one sequence token by token with the tokenizers library; emits whole characters only.

    Special tokens are left out, or written by name. Raises an Exception if the tokenizer fails.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Seq[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        context = list(prompt[-_CONTEXT_TOKENS:])
        self._stream = DecodeStream(ids=context, skip_special_tokens=self._skip)
        # DecodeStream emits again a prompt that ends with an incomplete character or U+FFFD.
        with _panics_as_errors:
            text = tokenizer.decode(context, skip_special_tokens=self._skip)
        self._prompt_text = text if text.endswith("\ufffd") else ""

    def step(self, token_id: int) -> str:
        with _panics_as_errors:
            text = self._step(token_id)
        if text and self._prompt_text:
            text, self._prompt_text = text.removeprefix(common_prefix(text, self._prompt_text)), ""
        return text

    def _step(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # noqa: BLE001 - the library raises no subclass
            # A tokenizer with byte fallback decodes consecutive bytes together. An invalid byte changes the text of the
            # bytes before it, which was emitted already. The text continues from here without the text held back.
            self._stream = DecodeStream(skip_special_tokens=self._skip)
            self._prompt_text = ""
            return self._stream.step(self._tokenizer, token_id) or ""


class HFText:
    """A fast transformers tokenizer with its chat template.

    Calls only methods of the Rust tokenizer that do not change it, because the engine's thread decodes while the event
    loop's worker thread encodes.
    """

    def __init__(
        self, tokenizer: Any, end_ids: frozenset[int], vocabulary: int, sanitize_control_tokens: bool = True
    ) -> None:
        """With `sanitize_control_tokens` the texts of a conversation never become control tokens."""
        self._tokenizer = tokenizer
        self._sanitize = sanitize_control_tokens
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self.vocabulary = vocabulary
        self.end_ids = end_ids
        self._added = self._backend.get_added_tokens_decoder()
        self.special_texts = {token.content: token_id for token_id, token in self._added.items() if token.special}
        self.special_ids = frozenset(self.special_texts.values())
        self._grammars = GrammarCompiler(self._backend, end_ids, vocabulary)
        self._templates: dict[str, ChatTemplate] = {}

    def encode(self, prompts: Seq[Prompt]) -> list[list[int] | ServeAppError]:
        """Token ids of each prompt, or the error of this prompt alone. Raises no error of a prompt."""
        results: dict[int, list[int] | ServeAppError] = {}
        texts: dict[bool, dict[int, str]] = {True: {}, False: {}}
        for i, prompt in enumerate(prompts):
            prepared = self._prepared(prompt)
            if isinstance(prepared, str):
                texts[self._adds_special_tokens(prompt)][i] = prepared
            else:
                results[i] = prepared
        for special_tokens, batch in texts.items():
            results |= zip(batch, self._encoded(list(batch.values()), special_tokens), strict=True)
        return [results[i] for i in range(len(prompts))]

    def tokenize(self, prompt: Prompt, special_tokens: bool) -> tuple[TextToken, ...] | ServeAppError:
        """The tokens of a prompt, with or without the special tokens that the tokenizer adds to a text."""
        prepared = self._prepared(prompt)
        if isinstance(prepared, ServeAppError):
            return prepared
        if not isinstance(prepared, str):
            return tuple(TextToken(token, self.token_text(token), 0, 0) for token in prepared)
        encoding = self._encoding(prepared, special_tokens and self._adds_special_tokens(prompt))
        if isinstance(encoding, ServeAppError):
            return encoding
        return tuple(
            TextToken(token, self.token_text(token), *span)
            for token, span in zip(encoding.ids, encoding.offsets, strict=True)
        )

    def detokenize(self, token_ids: Seq[int], skip_special_tokens: bool) -> str | ServeAppError:
        known = self._known(token_ids)
        return known if isinstance(known, ServeAppError) else self._decoded(known, skip_special_tokens)

    def info(self) -> TokenizerInfo:
        names = [field.name for field in fields(AddedToken)]
        added = {number: AddedToken(*(getattr(token, name) for name in names)) for number, token in self._added.items()}
        roles = {role: getattr(self._tokenizer, role) for role in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return TokenizerInfo(
            type(self._tokenizer).__name__, added, **roles, chat_template=self._tokenizer.chat_template or None
        )

    def decoder(self, prompt: Seq[int], skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for the tokens that follow `prompt`."""
        return StreamDecoder(self._backend, prompt, skip_special_tokens)

    def constraint(self, grammar: Grammar, ignore_eos: bool) -> Constraint | ServeAppError:
        """The constraint of a new answer; InvalidRequest if the grammar cannot be compiled."""
        return self._grammars.constraint(grammar, ignore_eos)

    @cached_property
    def chat(self) -> ChatTemplate:
        """Detected by rendering samples, so the loader reads this property before the model serves requests."""
        return self._chat_template("")

    def _chat_template(self, source: str) -> ChatTemplate:
        ids = self._grammars.marker_tokens(self._added)
        texts = {token.content: token_id for token_id, token in self._added.items() if token_id in (ids or ())}
        markers = None if ids is None else MarkerTokens(texts, self.special_ids, self.end_ids)
        return ChatTemplate(self._tokenizer, markers, self._sanitize, source)

    def _chat_of(self, prompt: Prompt) -> ChatTemplate:
        """The template for a prompt. Those that requests bring are from the configuration: there are few."""
        source = prompt.template if isinstance(prompt, ChatPrompt) else ""
        if not source:
            return self.chat
        if source not in self._templates:
            while len(self._templates) >= _MOST_TEMPLATES:
                self._templates.pop(next(iter(self._templates)))
            self._templates[source] = self._chat_template(source)
        return self._templates[source]

    def plan(self, request: GenerationRequest, prompt: Seq[int]) -> AnswerPlan | ServeAppError:
        """How to generate the answer to this prompt; InvalidRequest if its grammar or its tools are refused."""
        chat = self._chat_of(request.prompt)
        reasoning = chat.reasoning if request.separate_reasoning else None
        plan = self._plan_rest(chat, request.params, request.tool_choice)
        if isinstance(plan, ServeAppError):
            return plan
        if reasoning is not None:
            plan = plan_with_reasoning(plan, reasoning, prompt, self)
        return plan if isinstance(plan, ServeAppError) else self._with_stop_tokens(plan)

    def _with_stop_tokens(self, plan: AnswerPlan) -> AnswerPlan:
        """A stop string that is a special token ends the answer too, although the text does not show the token."""
        stops = {self.special_texts[text]: text for text in plan.params.stop if text in self.special_texts}
        if not stops:
            return plan
        ids = (*plan.params.stop_token_ids, *stops)
        return replace(plan, params=replace(plan.params, stop_token_ids=ids), stop_texts=stops)

    def _plan_rest(
        self, chat: ChatTemplate, params: SamplingParams, choice: ToolChoice | None
    ) -> AnswerPlan | ServeAppError:
        """The plan for an answer without reasoning."""
        if choice is not None:
            return plan_tool_use(chat.tools, choice, params, self.constraint)
        if params.grammar is None:
            return AnswerPlan(params)
        constraint = self.constraint(params.grammar, params.ignore_eos)
        return constraint if isinstance(constraint, ServeAppError) else AnswerPlan(params, constraint)

    def token_text(self, token_id: int) -> str:
        """The text of one token decoded alone; special tokens by name."""
        return self._decoded([token_id], skip_special_tokens=False)

    def token_logprob(self, token_id: int, logprob: float) -> TokenLogprob:
        text = self.token_text(token_id)
        raw = _bytes_of(self._backend.id_to_token(token_id)) if _INCOMPLETE in text else None
        return TokenLogprob(token_id, text, logprob, raw)

    def token_id(self, text: str) -> int | None:
        """The id of the added token with this text; None if there is none."""
        return next((token_id for token_id, token in self._added.items() if token.content == text), None)

    def _prepared(self, prompt: Prompt) -> str | list[int] | ServeAppError:
        """The text to encode; of a token prompt, its ids."""
        match prompt:
            case TextPrompt():
                return prompt.text
            case TokenPrompt():
                return self._known(prompt.token_ids)
            case ChatPrompt():
                return self._encode_chat(prompt)

    def _encode_chat(self, prompt: ChatPrompt) -> str | list[int] | ServeAppError:
        try:
            return self._chat_of(prompt).encode_or_render(prompt)
        except Exception:  # a template of an experiment that cannot be compiled must not fail the other prompts
            logger.exception("the chat template of a variant failed")
            return InternalError("the variant's chat template failed on these messages", param="messages")

    def _adds_special_tokens(self, prompt: Prompt) -> bool:
        """Whether the tokenizer adds its special tokens. A chat template writes them itself; a text may have the first.

        Without the second condition, a text that begins with the token for the beginning of a text would have it twice.
        """
        if not isinstance(prompt, TextPrompt) or not prompt.special_tokens:
            return False
        return not (self._first_token and prompt.text.startswith(self._first_token))

    @cached_property
    def _first_token(self) -> str:
        """The token for the beginning of a text, if the tokenizer adds it; else ""."""
        first = self._backend.encode("", add_special_tokens=True).tokens[:1]
        return self._tokenizer.bos_token if first and first[0] == self._tokenizer.bos_token else ""

    def _encoded(self, texts: list[str], special_tokens: bool) -> list[list[int] | ServeAppError]:
        try:
            with _panics_as_errors:
                encodings: Seq[Encoding | ServeAppError] = self._backend.encode_batch(
                    texts, add_special_tokens=special_tokens
                )
        except Exception:  # noqa: BLE001 - an error of one text; encoding each text alone finds and logs it
            encodings = [self._encoding(text, special_tokens) for text in texts]
        return [encoding if isinstance(encoding, ServeAppError) else _ids(encoding) for encoding in encodings]

    def _encoding(self, text: str, special_tokens: bool) -> Encoding | ServeAppError:
        try:
            with _panics_as_errors:
                return self._backend.encode(text, add_special_tokens=special_tokens)
        except Exception:
            logger.exception("the tokenizer failed on a prompt of %d characters", len(text))
            return InternalError("the model's tokenizer failed on this prompt", param="prompt")

    def _decoded(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        with _panics_as_errors:
            return str(self._backend.decode(token_ids, skip_special_tokens))

    def _known(self, token_ids: Seq[int]) -> list[int] | ServeAppError:
        wrong = next((token for token in token_ids if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            return InvalidRequest(f"token id {wrong} is outside 0 to {self.vocabulary - 1}", param="prompt")
        return list(token_ids) or _empty_prompt()


def _bytes_of(piece: str | None) -> bytes | None:
    """The bytes of a token that is not a text, by its name in the vocabulary; None if the name does not say.

    A tokenizer with byte fallback names a byte like `<0xE2>`; a byte-level one has a character for each byte.
    """
    fallback = _FALLBACK_BYTE.fullmatch(piece or "")
    if fallback is not None:
        return bytes([int(fallback[1], 16)])
    if not piece or not all(character in _BYTE_OF for character in piece):
        return None
    return bytes(_BYTE_OF[character] for character in piece)


def _ids(encoding: Encoding) -> list[int] | ServeAppError:
    return encoding.ids or _empty_prompt()


def _empty_prompt() -> InvalidRequest:
    return InvalidRequest("the prompt is empty", param="prompt")
