"""A model's tokenizer: prompts and chat messages to ids, ids to text."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence as Seq
from functools import cached_property
from typing import Any

import jinja2
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from serve_app.core.events import TextToken
from serve_app.core.requests import ChatPrompt, Grammar, Prompt, TextPrompt, TokenPrompt
from serve_app.engines.text.grammar import Constraint, Grammars
from serve_app.engines.text.tool_format import Convention, Manner, Signs, ToolCallFormat, learn
from serve_app.errors import InternalError, InvalidRequest, ServeAppError

logger = logging.getLogger(__name__)

# A decoder needs a little of the prompt to know, for example, whether its first token starts with a space.
_CONTEXT_TOKENS = 8


class StreamDecoder:
    """Incremental decoding by the tokenizers library: whole characters only, special tokens left out or by name."""

    def __init__(self, tokenizer: Tokenizer, prompt: Seq[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        context = list(prompt[-_CONTEXT_TOKENS:])
        self._stream = DecodeStream(ids=context, skip_special_tokens=self._skip)
        # What ends in half a character, or in U+FFFD, the stream takes for text that it still has to give.
        text = tokenizer.decode(context, skip_special_tokens=self._skip)
        self._prompt_text = text if text.endswith("\ufffd") else ""

    def step(self, token_id: int) -> str:
        text = self._step(token_id)
        if text and self._prompt_text:
            text, self._prompt_text = text[_agreement(text, self._prompt_text) :], ""
        return text

    def _step(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # noqa: BLE001 - the library raises no other
            # A tokenizer that falls back to bytes decodes a row of them together: one that does not fit makes those
            # before it wrong, which were given already. What is held back is lost, and the text goes on from here.
            self._stream = DecodeStream(skip_special_tokens=self._skip)
            self._prompt_text = ""
            return self._stream.step(self._tokenizer, token_id) or ""


def _agreement(one: str, other: str) -> int:
    """Up to which character two texts are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class HFText:
    """Wraps a fast transformers tokenizer.

    Works on the Rust tokenizer below it, whose methods used here leave it unchanged, because the engine's
    thread decodes while the event loop's worker encodes.
    """

    def __init__(self, tokenizer: Any, end_ids: frozenset[int], vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._rust: Tokenizer = tokenizer.backend_tokenizer
        self._rust.no_padding()
        self._rust.no_truncation()
        self.vocabulary = vocabulary
        self.end_ids = end_ids
        self._added = self._rust.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, about in self._added.items() if about.special)
        self._grammars = Grammars(self._rust, end_ids, vocabulary)

    def encode(self, prompts: Seq[Prompt]) -> list[list[int] | ServeAppError]:
        results: list[list[int] | ServeAppError] = [InvalidRequest("the prompt is empty", param="prompt")] * len(
            prompts
        )
        plain, rendered = [], []
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, TextPrompt):
                plain.append((i, prompt.text))
            elif isinstance(prompt, TokenPrompt):
                results[i] = self._known(prompt)
            else:
                text = self._render(prompt)
                if isinstance(text, ServeAppError):
                    results[i] = text
                else:
                    rendered.append((i, text))
        # A chat template writes the special tokens itself.
        for texts, special in ((plain, True), (rendered, False)):
            encodings = self._rust.encode_batch([text for _, text in texts], add_special_tokens=special)
            for (i, _), encoding in zip(texts, encodings, strict=True):
                if encoding.ids:
                    results[i] = encoding.ids
        return results

    def tokenize(self, prompt: Prompt, special_tokens: bool) -> tuple[TextToken, ...] | ServeAppError:
        if isinstance(prompt, TokenPrompt):
            known = self._known(prompt)
            if isinstance(known, ServeAppError):
                return known
            return tuple(TextToken(token, self.token_text(token), 0, 0) for token in known)
        text = self._render(prompt) if isinstance(prompt, ChatPrompt) else prompt.text
        if isinstance(text, ServeAppError):
            return text
        encoding = self._rust.encode(text, add_special_tokens=special_tokens and isinstance(prompt, TextPrompt))
        return tuple(
            TextToken(token, self.token_text(token), *span)
            for token, span in zip(encoding.ids, encoding.offsets, strict=True)
        )

    def detokenize(self, token_ids: Seq[int], skip_special_tokens: bool) -> str | ServeAppError:
        known = self._known(TokenPrompt(tuple(token_ids)))
        return known if isinstance(known, ServeAppError) else self._rust.decode(known, skip_special_tokens)

    def decoder(self, prompt: Seq[int], skip_special_tokens: bool = True) -> StreamDecoder:
        return StreamDecoder(self._rust, prompt, skip_special_tokens)

    def constraint(self, grammar: Grammar, ignore_eos: bool) -> Constraint | ServeAppError:
        return self._grammars.constraint(grammar, ignore_eos)

    @property
    def tools(self) -> ToolCallFormat | None:
        return None if self._convention is None else self._convention.syntax

    def token_text(self, token_id: int) -> str:
        """One token by itself, special tokens by name."""
        return str(self._rust.decode([token_id], skip_special_tokens=False))

    def _known(self, prompt: TokenPrompt) -> list[int] | ServeAppError:
        wrong = next((token for token in prompt.token_ids if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            return InvalidRequest(f"token id {wrong} is outside 0 to {self.vocabulary - 1}", param="prompt")
        return list(prompt.token_ids) or InvalidRequest("the prompt is empty", param="prompt")

    def _render(self, prompt: ChatPrompt) -> str | ServeAppError:
        if not self._tokenizer.chat_template:
            return InvalidRequest("this model has no chat template; use /v1/completions or /generate", param="messages")
        refusal = self._without_tools(prompt)
        if refusal is not None:
            return refusal
        manner = Manner() if self._convention is None else self._convention.manner
        messages = [manner.message(message) for message in prompt.messages]
        try:
            return self._written(
                messages, [json.loads(tool) for tool in prompt.tools] or None, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            return InvalidRequest(f"the model's chat template refuses these messages: {error}", param="messages")
        except Exception:
            # A template is somebody's program; its faults are not those of the others who came in together.
            logger.exception("the chat template failed")
            return InternalError("the model's chat template failed on these messages", param="messages")

    def _without_tools(self, prompt: ChatPrompt) -> InvalidRequest | None:
        """A refusal of tools and their calls, if there are any and the template takes none."""
        called = any(message.tool_calls or message.role == "tool" for message in prompt.messages)
        if not (prompt.tools or called) or self._convention is not None:
            return None
        return InvalidRequest(
            "this model's chat template takes no tools", param="tools" if prompt.tools else "messages"
        )

    def _written(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, **options: bool) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options))

    @cached_property
    def _convention(self) -> Convention | None:
        """How the chat template writes calls of tools. Learned best before anybody is served."""
        signs = self._grammars.signs(self._added)
        if signs is None or not self._tokenizer.chat_template:
            return None
        names = {about.content: token for token, about in self._added.items() if token in signs}
        return learn(self._written, Signs(names, self.special_ids, self.end_ids))
