"""The only file that imports vLLM: makes its engine, its sampling parameters and our tokens, and maps its errors."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence as Seq
from contextlib import aclosing
from dataclasses import fields
from typing import Any

from vllm import AsyncEngineArgs, AsyncLLMEngine, SamplingParams as VllmParams
from vllm.exceptions import VLLMClientError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.exceptions import EngineDeadError

from serve_app.config import Model, VllmOptions
from serve_app.core.events import Logprobs, TokenLogprob
from serve_app.core.requests import GenerationRequest, Grammar, SamplingParams
from serve_app.engines.admission import Prepared
from serve_app.engines.ending import Ending, engine_ended_error
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.stream import Token
from serve_app.engines.text.json_schema import prepared_schema
from serve_app.engines.text.tokenizer import HFText
from serve_app.engines.vllm.lora import AdapterCopy
from serve_app.errors import InternalError, InvalidRequest, NotReady, ServeAppError

logger = logging.getLogger(__name__)

# Below every logit: an end token is chosen only where the grammar allows no other token.
_LAST_CHOICE = -100.0
_GPU_SHARE = 0.9
_JSON = "start: %json {}"

Output = Any  # vllm.RequestOutput, which has no types for mypy


def engine_args(model: Model, options: VllmOptions, folder: str) -> AsyncEngineArgs:
    """The arguments for the model in `folder`. Raises SourceError for an option that vLLM does not have."""
    known = {field.name for field in fields(AsyncEngineArgs)}
    unknown = sorted(set(options.options) - known)
    if unknown:
        raise SourceError(f"engine.options: vLLM has no argument {', '.join(unknown)}")
    share = min(1.0, model.resources.num_gpus or 1.0)
    more: dict[str, Any] = dict(options.options)
    if options.speculative is not None:
        chosen = options.speculative
        named = {} if chosen.model is None else {"model": chosen.model}
        more["speculative_config"] = {"method": chosen.method, "num_speculative_tokens": chosen.tokens, **named}
    if model.lora is not None:
        # On CPUs, vLLM 0.32 gives requests without an adapter the one in the last slot. One slot more stays empty.
        count = model.lora.max_loaded + 1
        more |= {"enable_lora": True, "max_loras": count, "max_cpu_loras": count, "max_lora_rank": model.lora.max_rank}
    return AsyncEngineArgs(
        model=folder,
        trust_remote_code=model.trust_remote_code,
        dtype=model.dtype,
        quantization=options.quantization,
        max_model_len=options.max_context,
        max_num_seqs=options.max_running,
        max_num_batched_tokens=options.max_step_tokens,
        enable_prefix_caching=options.prefix_cache,
        gpu_memory_utilization=options.gpu_memory_utilization or _GPU_SHARE * share,
        kv_cache_memory_bytes=options.kv_memory_bytes,
        tensor_parallel_size=options.tensor_parallel,
        pipeline_parallel_size=options.pipeline_parallel,
        distributed_executor_backend=executor(model, options),
        enforce_eager=options.enforce_eager,
        scheduling_policy="priority",
        generation_config="vllm",  # the defaults of a request are ours
        max_logprobs=-1,
        structured_outputs_config={"backend": "guidance"},
        **more,
    )


def executor(model: Model, options: VllmOptions) -> str | None:
    """How vLLM runs its workers: `mp` on one node, `ray` on several; None for one GPU, which needs no worker."""
    if options.gpus == 1:
        return None
    return "ray" if options.gpus > model.resources.num_gpus else "mp"


class Client:
    """The engine of vLLM. Create it on any thread; call the other methods on one event loop."""

    def __init__(self, args: AsyncEngineArgs) -> None:
        self._checked: set[int] = set()  # numbers of adapters that vLLM has loaded once
        # vLLM's defaults depend on it: on large GPUs, a server computes 8,192 or 16,384 tokens in a step, others 2,048.
        self._engine = AsyncLLMEngine.from_engine_args(args, usage_context=UsageContext.OPENAI_API_SERVER)

    @property
    def context(self) -> int:
        """The largest number of tokens of a prompt and its answer."""
        return int(self._engine.model_config.max_model_len)

    @property
    def vocabulary(self) -> int:
        return int(self._engine.model_config.get_vocab_size())

    @property
    def dtype(self) -> str:
        return str(self._engine.model_config.dtype).removeprefix("torch.")

    @property
    def quantization(self) -> str:
        return str(self._engine.model_config.quantization or "none")

    @property
    def kv_tokens(self) -> int:
        """The number of tokens that the KV cache can hold."""
        cache = self._engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks or 0) * int(cache.block_size or 0)

    @property
    def failed(self) -> bool:
        """Whether the engine's process has ended."""
        return bool(self._engine.errored)

    async def generate(
        self, one: Prepared, ending: Ending, ends: frozenset[int], id: str
    ) -> AsyncGenerator[Output, None]:
        """The outputs of a request, each with new tokens. Closing the generator ends the request in the engine.

        `ends` are the tokens with which the model ends an answer. `id` must be unique.
        """
        request = one.stream.request
        prompt = tokens_input([*one.prompt, *request.resumed], cache_salt=request.prefix_salt or None)
        params = sampling_params(request, one.plan.params, ending, ends)
        lora = None if one.stream.adapter is None else await self._lora_request(one.stream.adapter.weights)
        generated = self._engine.generate(prompt, params, id, lora_request=lora, priority=request.priority)
        async with aclosing(generated) as outputs:
            async for output in outputs:
                yield output

    async def remove_adapter(self, copy: AdapterCopy) -> None:
        """Free the slot of an adapter that no request uses."""
        await self._engine.remove_lora(copy.number)

    async def _lora_request(self, copy: object) -> LoRARequest:
        """The adapter as vLLM names it. Its prefix cache is by this name, which is different for other content.

        Raises InvalidRequest for an adapter that vLLM cannot load: in a step it would end the engine.
        """
        assert isinstance(copy, AdapterCopy)
        request = LoRARequest(lora_name=copy.digest, lora_int_id=copy.number, lora_path=str(copy.folder))
        if copy.number not in self._checked:
            try:
                await self._engine.add_lora(request)
            except EngineDeadError:
                raise
            except Exception as error:
                reason = " ".join(str(error).split())
                raise InvalidRequest(f"vLLM cannot load the adapter: {reason}", param="model") from error
            self._checked.add(copy.number)
        return request

    async def warm_up(self) -> None:
        """Compute a request of each kind, because vLLM compiles some operations at their first use, for up to 20 s."""
        filters: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "top_k": 10, "min_p": 0.1, "seed": 0}
        penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
        digits = StructuredOutputsParams(regex="[0-9]{1,4}")
        for options in ({"logprobs": 1, "prompt_logprobs": 1}, filters | penalties, {"structured_outputs": digits}):
            params = VllmParams(max_tokens=4, detokenize=False, output_kind=RequestOutputKind.DELTA, **options)
            async for _ in self._engine.generate(tokens_input([0, 1, 2, 3]), params, "warm-up"):
                pass

    def shutdown(self) -> None:
        """End the engine's processes."""
        self._engine.shutdown()


def sampling_params(
    request: GenerationRequest, params: SamplingParams, ending: Ending, ends: frozenset[int]
) -> VllmParams:
    """The parameters for vLLM, which returns tokens and no text.

    All tokens that end the answer are stop tokens of the request; vLLM's own end token of the model is switched off.
    The tokens of a resumed answer are part of vLLM's prompt. Its seed changes, because vLLM's generator starts anew.
    """
    done = len(request.resumed)
    biases = dict(params.logit_bias)
    if params.grammar is not None and params.ignore_eos:
        biases |= dict.fromkeys(ends, _LAST_CHOICE)
    return VllmParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=None if params.seed is None else params.seed + request.index + done,
        max_tokens=ending.max_tokens - done,
        min_tokens=max(0, min(params.min_tokens, ending.max_tokens) - done),
        stop_token_ids=sorted(ending.end_ids),
        ignore_eos=True,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        logit_bias=biases or None,
        structured_outputs=None if params.grammar is None else structured_outputs(params.grammar),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def resume_error(one: Prepared) -> NotReady | None:
    """Why vLLM cannot resume the answer: it applies grammars and these penalties only to tokens that it samples."""
    params = one.plan.params
    if not one.stream.request.resumed or not (params.grammar or params.presence_penalty or params.frequency_penalty):
        return None
    return NotReady(
        "The replica that served this request was lost, and vLLM cannot continue an answer with a grammar, a presence "
        "penalty or a frequency penalty. Send the request again.",
        retry_after_s=1,
    )


def structured_outputs(grammar: Grammar) -> StructuredOutputsParams:
    """The grammar as vLLM's guidance backend takes it. It was compiled before, so that it has no faults.

    A JSON schema is a Lark grammar, because vLLM changes the options of one that has its own parameter.
    """
    match grammar.kind:
        case "json_object":
            return StructuredOutputsParams(grammar=_JSON.format(prepared_schema('{"type": "object"}', True)))
        case "json_schema":
            return StructuredOutputsParams(grammar=_JSON.format(prepared_schema(grammar.text, grammar.strict)))
        case "regex":
            return StructuredOutputsParams(regex=grammar.text)
        case "choice":
            return StructuredOutputsParams(choice=json.loads(grammar.text))
        case "lark":
            return StructuredOutputsParams(grammar=grammar.text)


class TokenReader:
    """Turns the outputs of one request into tokens of its stream, of which there were `generated` so far."""

    def __init__(self, one: Prepared, ending: Ending, text: HFText, clock: Callable[[], float]) -> None:
        self._stream = one.stream
        self._prompt = one.prompt
        self._params = one.plan.params
        self._ending = ending
        self._text = text
        self._clock = clock
        self.generated = len(one.stream.request.resumed)
        self._prompt_logprobs: tuple[Logprobs, ...] | None = None

    def read(self, output: Output) -> list[Token]:
        """The tokens of an output, of which the last may end the answer. Raises InternalError if vLLM gave up."""
        stream, (answer,) = self._stream, output.outputs
        if stream.started is None:
            scheduled = output.metrics.scheduled_ts if output.metrics is not None else 0.0
            stream.started = scheduled or self._clock()
            stream.cached_tokens = output.num_cached_tokens or 0
        if output.prompt_logprobs:
            self._prompt_logprobs = self._of_prompt(output.prompt_logprobs)
        elapsed_s = self._clock() - stream.arrived
        tokens = []
        for number, token_id in enumerate(answer.token_ids):
            self.generated += 1
            reason, complete = self._ending.reason(token_id, self.generated)
            logprobs = None if not answer.logprobs else self._of_answer(token_id, answer.logprobs[number])
            prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
            tokens.append(Token(token_id, elapsed_s, reason, logprobs, complete, prompt_logprobs))
            if reason is not None:
                return tokens
        if output.finished:
            raise InternalError(f"vLLM ended the request early ({answer.finish_reason})")
        return tokens

    def _of_answer(self, token_id: int, found: Mapping[int, Any]) -> Logprobs:
        chosen = self._text.token_logprob(token_id, found[token_id].logprob)
        return Logprobs(chosen, self._top(found, self._params.logprobs or 0))

    def _of_prompt(self, positions: Seq[Mapping[int, Any] | None]) -> tuple[Logprobs, ...]:
        """The log probabilities of all tokens of the prompt but the first, which has no prediction."""
        found = []
        for token_id, of_token in zip(self._prompt[1:], positions[1:], strict=True):
            assert of_token is not None
            chosen = of_token[token_id]
            top = self._top(of_token, self._params.prompt_logprobs or 0)
            found.append(Logprobs(self._text.token_logprob(token_id, chosen.logprob), top, chosen.rank))
        return tuple(found)

    def _top(self, found: Mapping[int, Any], count: int) -> tuple[TokenLogprob, ...]:
        """The `count` most likely of the tokens; the chosen token, which vLLM adds, has a higher rank if it is none."""
        ranked = sorted((one.rank, token_id, one.logprob) for token_id, one in found.items() if one.rank <= count)
        return tuple(self._text.token_logprob(token_id, logprob) for _, token_id, logprob in ranked[:count])


def error_of(error: Exception, id: str) -> ServeAppError:
    """The error of a request for an exception of vLLM."""
    if isinstance(error, ServeAppError):
        return error
    if isinstance(error, EngineDeadError):
        return engine_ended_error()
    if isinstance(error, VLLMClientError):
        return InvalidRequest(f"vLLM refuses the request: {error}")
    logger.error("request %s failed in vLLM", id, exc_info=error)
    return InternalError("the model failed on this request")
