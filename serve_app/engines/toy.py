"""A model without weights, for tests of the rest of the service: its answer repeats its prompt."""

from __future__ import annotations

import ctypes
import threading
import time
from codecs import getincrementaldecoder
from collections.abc import Sequence as Seq
from hashlib import blake2b
from pathlib import Path
from typing import cast
from urllib.parse import parse_qsl, urlsplit

from serve_app.config import NativeOptions
from serve_app.core.events import Logprobs, TextToken, TokenLogprob
from serve_app.core.queries import AddedToken, TokenizerInfo
from serve_app.core.requests import Adapter, ChatPrompt, GenerationRequest, Prompt, TextPrompt, TokenPrompt
from serve_app.engines.native.failure import failure
from serve_app.engines.native.kv_cache import CacheOp
from serve_app.engines.native.sequence import Advance, Outcome, Sampled, Sequence, Step
from serve_app.engines.protocol import Cause
from serve_app.engines.text.protocol import AnswerPlan
from serve_app.errors import InvalidRequest, NotFound, ServeAppError

END, END_TEXT = 256, "<end>"
_CONTEXT = 2048


class ToyDecoder:
    """Decodes bytes as UTF-8 and holds incomplete characters back. The end token is special: "" or its name."""

    def __init__(self, skip_special_tokens: bool = True) -> None:
        self._utf8 = getincrementaldecoder("utf-8")(errors="replace")
        self._end = "" if skip_special_tokens else END_TEXT

    def step(self, token_id: int) -> str:
        return self._utf8.decode(bytes([token_id])) if token_id < END else self._end


class ToyText:
    """A tokenizer with one token for each byte of UTF-8; token 256 ends an answer.

    A chat template of a variant is written before the messages as it is.
    """

    end_ids = special_ids = frozenset({END})
    vocabulary = END + 1

    def encode(self, prompts: Seq[Prompt]) -> list[list[int] | ServeAppError]:
        return [self._encode(prompt) or InvalidRequest("the prompt is empty", param="prompt") for prompt in prompts]

    def tokenize(self, prompt: Prompt, special_tokens: bool) -> tuple[TextToken, ...] | ServeAppError:
        ids = self._encode(prompt)
        if isinstance(ids, ServeAppError):
            return ids
        return tuple(TextToken(token, self._decode([token]), at, at + 1) for at, token in enumerate(ids))

    def detokenize(self, token_ids: Seq[int], skip_special_tokens: bool) -> str | ServeAppError:
        ids = self._encode(TokenPrompt(tuple(token_ids)))
        return ids if isinstance(ids, ServeAppError) else self._decode(ids, skip_special_tokens)

    def info(self) -> TokenizerInfo:
        return TokenizerInfo("ToyText", {END: AddedToken(END_TEXT)}, eos_token=END_TEXT)

    def decoder(self, prompt: Seq[int], skip_special_tokens: bool = True) -> ToyDecoder:
        return ToyDecoder(skip_special_tokens)

    def plan(self, request: GenerationRequest, prompt: Seq[int]) -> AnswerPlan | InvalidRequest:
        grammar = request.params.grammar
        if request.tool_choice is not None:
            return InvalidRequest("the toy model calls no tools", param="tools")
        if grammar is not None:
            return InvalidRequest("the toy model follows no grammar; use another model", param=grammar.field)
        return AnswerPlan(request.params)

    def _decode(self, ids: Seq[int], skip_special_tokens: bool = False) -> str:
        decoder = ToyDecoder(skip_special_tokens)
        return "".join(decoder.step(token) for token in ids)

    def _encode(self, prompt: Prompt) -> list[int] | ServeAppError:
        if isinstance(prompt, TextPrompt):
            return list(prompt.text.encode())
        if isinstance(prompt, ChatPrompt):
            lines = [prompt.template] if prompt.template else []
            return list("\n".join([*lines, *(f"{m.role}: {m.content}" for m in prompt.messages)]).encode())
        if any(not 0 <= token <= END for token in prompt.token_ids):
            return InvalidRequest(f"token ids of this model are 0 to {END}", param="prompt")
        return list(prompt.token_ids)


class ToyRunner:
    """Token n of an answer is token n of the prompt, modulo the prompt's length. Each step takes `step_ms`.

    The toy holds no keys and values: `kv_memory_bytes` is the number of tokens that its cache counts. Every token of a
    prompt has probability 1. An embedding is the number of tokens with each remainder modulo 4.

    With `log`, the toy appends a line to that file for each token: monotonic seconds and the request's id. A step with
    a prompt that begins with `fails_on` fails, and a prompt that begins with `nan_on` gives no finite numbers. A step
    hangs if the file `hangs_if` exists, which it deletes, so that one replica hangs; it holds the interpreter's lock if
    the file has the content "lock".
    """

    def __init__(
        self,
        config: NativeOptions,
        step_ms: float = 0,
        load_s: float = 0,
        log: str | None = None,
        fails_on: str = "",
        nan_on: str = "",
        hangs_if: str | None = None,
    ) -> None:
        time.sleep(load_s)
        self.kind = "toy"
        self.quantization = "none"
        self.dtype_name = ""
        self.slots = config.max_running
        self.context = config.max_context or _CONTEXT
        self.kv_tokens = config.kv_memory_bytes or self.slots * self.context
        self.text = ToyText()
        self._step_s = step_ms / 1e3
        self._fails_on, self._nan_on = list(fails_on.encode()), list(nan_on.encode())
        self._hangs_if = None if hangs_if is None else Path(hangs_if)
        self._log = None if log is None else open(log, "a", buffering=1)  # noqa: SIM115 (open until the process ends)

    @classmethod
    def from_source(cls, source: str, config: NativeOptions) -> ToyRunner:
        """From `builtin:toy`, or with options: `builtin:toy?step_ms=5&load_s=2&log=/tmp/tokens`."""
        options = dict(parse_qsl(urlsplit(source).query))
        step_ms, load_s = (float(options.get(name, 0)) for name in ("step_ms", "load_s"))
        faults = (options.get("fails_on", ""), options.get("nan_on", ""), options.get("hangs_if"))
        return cls(config, step_ms, load_s, options.get("log"), *faults)

    def load_adapter(self, adapter: Adapter) -> tuple[str, object]:
        """The file `shift` in an adapter's folder has a number, which is added to every token of an answer."""
        try:
            text = (Path(adapter.source) / "shift").read_text()
            return blake2b(text.encode(), digest_size=16).hexdigest(), int(text)
        except (OSError, ValueError):
            raise NotFound(f"{adapter.source} has no file shift with a number.", param="lora_path") from None

    def apply(self, op: CacheOp) -> None:
        """The toy holds no keys and values."""

    def free_memory(self) -> None:
        """The toy allocates none."""

    def run(self, step: Step) -> list[Outcome]:
        if self._step_s:
            time.sleep(self._step_s)
        if self._hangs_if is not None:
            _hang(self._hangs_if)
        if any(_begins(advance.sequence, self._fails_on) for advance in step.advances):
            raise RuntimeError("the toy model fails on this prompt")
        for advance in step.advances:
            self._read_out(advance)
        return [self._outcome(advance) for advance in step.advances if advance.samples]

    def _read_out(self, advance: Advance) -> None:
        sequence, readout, rows = advance.sequence, advance.sequence.readout, advance.readout_rows
        if readout is None or not rows:
            return
        tokens = sequence.tokens[sequence.computed :]
        if sequence.embeds:
            readout.add_states([float(sum(tokens[row] % 4 == n for row in rows)) for n in range(4)], len(rows))
        else:
            readout.add_logprobs([self._certain(tokens[row + 1], rank=1) for row in rows])

    def _certain(self, token: int, rank: int | None = None) -> Logprobs:
        return Logprobs(TokenLogprob(token, chr(token), 0.0), (), rank)

    def _outcome(self, advance: Advance) -> Outcome:
        sequence, sampled = advance.sequence, []
        if _begins(sequence, self._nan_on):
            return failure(Cause.NOT_FINITE)
        shift = 0 if sequence.adapter is None else cast("int", sequence.adapter.weights)
        for ahead in range(1 + len(advance.drafts)):
            token = sequence.tokens[(sequence.generated + ahead) % sequence.prompt_len] + shift
            sampled.append(Sampled(token, None if sequence.params.logprobs is None else self._certain(token)))
            if self._log is not None:
                self._log.write(f"{time.monotonic():.6f} {sequence.stream.request.id}\n")
        return tuple(sampled)


def _begins(sequence: Sequence, text: list[int]) -> bool:
    return bool(text) and sequence.tokens[: len(text)] == text


def _hang(file: Path) -> None:
    """Hang for ever if the file exists; of several processes only one."""
    try:
        held = file.read_text().strip() == "lock"
        file.unlink()
    except FileNotFoundError:
        return
    if held:
        ctypes.PyDLL(None).sleep(ctypes.c_uint(1_000_000))  # a PyDLL does not release the interpreter's lock
    threading.Event().wait()
