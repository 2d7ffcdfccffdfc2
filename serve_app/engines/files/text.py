"""Loads the tokenizer, the chat template and the grammars of a model from its files, without its weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from serve_app.config import Model, template_path
from serve_app.core.requests import Grammar
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.text.tokenizer import HFText

if TYPE_CHECKING:
    from transformers import GenerationConfig

logger = logging.getLogger(__name__)


def load_text(config: Model, folder: str, vocabulary: int, end_ids: Iterable[int]) -> HFText:
    """The text processing of the model in `folder`, which has `vocabulary` token ids.

    `end_ids` are the tokens that end an answer by the model's generation settings; those of the tokenizer are added.
    Raises SourceError if the tokenizer or the configured chat template cannot be used.
    """
    try:
        tokenizer = _read_tokenizer(folder, config.trust_remote_code)
    except Exception as error:  # a parser may raise any exception for a damaged file
        raise SourceError(explain(config, error)) from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise SourceError(f"{config.source}: the tokenizer has no fast form (tokenizer.json), which streaming needs")
    if config.chat_template is not None:
        tokenizer.chat_template = _read_template(config.chat_template, tokenizer)
    own = (getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "eot", "eom"))  # of answer, turn, message
    ends = frozenset([*end_ids, *(int(token) for token in own if token is not None)])
    text = HFText(tokenizer, ends, vocabulary, config.sanitize_control_tokens)
    # Builds the tokenizer's tables for grammars now. Built by the first request, they would delay all running requests.
    text.constraint(Grammar("json_object"), ignore_eos=False)
    chat = text.chat
    logger.info("tool call format: %s", "none" if chat.tools is None else repr(chat.tools.before))
    logger.info(
        "reasoning: %s", "none" if chat.reasoning is None else f"{chat.reasoning.start!r} to {chat.reasoning.end!r}"
    )
    return text


def explain(config: Model, error: BaseException) -> str:
    """The reason why the model cannot be loaded, for an exception of a library that read its files."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            f"{config.source} contains its own code, which is not run; if you trust the code, set "
            f"trust_remote_code: true and pin `revision`"
        )
    if "safetensors" in text:
        return f"{config.source} has no safetensors weights, and pickled weights are not loaded; convert them ({text})"
    if "ignore_mismatched_sizes" in text:
        return f"{config.source}: the shapes of the weights do not match config.json"
    if isinstance(error, (ArithmeticError, AttributeError, LookupError, TypeError)):
        text = f"{type(error).__name__}: {text}"  # the message of such an error is often a single word
    # The rest of the message would be a list of all architectures.
    return f"{config.source} cannot be loaded: {text.partition(' Model type should be one of')[0]}"


def _read_template(source: str, tokenizer: Any) -> str:
    """The text of the configuration's chat template. Raises SourceError if it cannot be read or is not valid Jinja."""
    path = template_path(source)
    try:
        template = path.read_text(encoding="utf-8")
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"chat_template: {path} cannot be read: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise SourceError(f"chat_template: {path}, line {error.lineno}: {error.message}") from None
    except Exception:  # noqa: BLE001 - a template may refuse this conversation; requests then get its error
        return template
    return template


def configured_ends(generation: GenerationConfig | None, source: str) -> tuple[int, ...]:
    """The end tokens of generation_config.json. Raises SourceError if they are no numbers."""
    ids = generation.eos_token_id if generation is not None else None
    try:
        return tuple(int(token) for token in (ids if isinstance(ids, list) else [ids]) if token is not None)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{source}: eos_token_id in generation_config.json is not a token id") from error


def _read_tokenizer(folder: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a model. AutoTokenizer imports torch and the settings of all models, which takes 2 s.

    Most tokenizers are of the class that needs none of them, as their file says.
    """
    if _tokenizer_class(folder) == "TokenizersBackend":
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        return TokenizersBackend.from_pretrained(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _tokenizer_class(folder: str) -> str | None:
    """The class that tokenizer_config.json names; None if it names none, or code of the model's own."""
    try:
        settings = json.loads((Path(folder) / "tokenizer_config.json").read_bytes())
        return None if "auto_map" in settings else settings.get("tokenizer_class")
    except (OSError, ValueError, TypeError, AttributeError):
        return None
