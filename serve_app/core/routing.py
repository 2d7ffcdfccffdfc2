"""What routes a request to a replica: digests of the beginning of its prompt, and what replicas report."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

from serve_app.core.requests import ChatPrompt, GenerationRequest, TextPrompt
from serve_app.core.scaling import NO_SPEED, ReplicaSpeed

# Bytes of a block: about 64 tokens of English text.
BLOCK_BYTES = 256
# A longer prompt is known by its first blocks.
MAX_BLOCKS = 256
_DIGEST_BYTES = 8
_BYTES_PER_TOKEN = BLOCK_BYTES / 64


@dataclass(frozen=True, slots=True)
class RoutingKey:
    """What decides where a request is computed.

    `digests` has one digest for each whole block of the prompt, of the prompt up to the end of that block. `tokens` is
    an estimate of the length of the prompt. `session` is the caller's name for a session, or "".
    """

    digests: array[int]
    tokens: float
    session: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a replica computes: the number of running sequences, and the prompt tokens of the requests that wait.

    `digests` are those of the prompts in its KV cache, as an array of unsigned 64-bit numbers; None if they have not
    changed since its last report. `speed` is what the replica has shown, for the autoscaler. `slots` is the number of
    sequences that it can run; 0 if it is not known.
    """

    running: int = 0
    waiting_tokens: int = 0
    digests: bytes | None = None
    speed: ReplicaSpeed = NO_SPEED
    slots: int = 0


def routing_key(request: GenerationRequest) -> RoutingKey:
    """The key of a request. Prompts with equal digests up to a block have equal beginnings.

    The digests are of the prompt as the caller sent it and not of its tokens, so that an ingress needs no tokenizer.
    They depend on what decides whether two requests may share a computed beginning: the LoRA adapter, the tenant and
    `cache_salt`. A request that reads its prompt has none, because it computes all of the prompt.
    """
    pieces = list(_pieces(request))
    size = sum(map(len, pieces))
    digests = array("Q")
    if request.params.prompt_logprobs is None and not request.embed:
        adapter = "" if request.adapter is None else request.adapter.digest
        salt = f"{request.weights_name}\0{adapter}\0{request.prefix_salt}"
        digest = blake2b(salt.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).digest()
        for block in islice(_blocks(pieces), MAX_BLOCKS):
            digest = blake2b(block, digest_size=_DIGEST_BYTES, key=digest).digest()
            digests.append(int.from_bytes(digest))
    return RoutingKey(digests, size / _BYTES_PER_TOKEN + len(request.resumed), request.session)


def prompt_tokens(request: GenerationRequest) -> float:
    """An estimate of the length of the prompt in tokens, without a tokenizer."""
    prompt = request.prompt
    if isinstance(prompt, TextPrompt):
        return len(prompt.text) / _BYTES_PER_TOKEN
    if isinstance(prompt, ChatPrompt):
        texts = [*prompt.tools, prompt.variables, *(message.content for message in prompt.messages)]
        return sum(map(len, texts)) / _BYTES_PER_TOKEN
    return float(len(prompt.token_ids))


def home_of_session(session: str, replicas: Sequence[str]) -> str | None:
    """The replica of a session by rendezvous hashing: another replica takes over only its own sessions.

    Thaler, Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM Transactions on Networking, 1998.
    """
    name = session.encode(errors="surrogatepass")
    return max(
        replicas, key=lambda replica: blake2b(name + replica.encode(), digest_size=_DIGEST_BYTES).digest(), default=None
    )


def _pieces(request: GenerationRequest) -> Iterator[bytes]:
    """The prompt in an order in which a longer conversation begins as a shorter one does."""
    prompt = request.prompt
    if isinstance(prompt, TextPrompt):
        yield prompt.text.encode(errors="surrogatepass")
    elif isinstance(prompt, ChatPrompt):
        yield "\0".join((*prompt.tools, prompt.variables, prompt.template)).encode(errors="surrogatepass")
        for message in prompt.messages:
            calls = "".join(f"\3{call.name}\2{call.arguments}" for call in message.tool_calls)
            yield f"\1{message.role}\2{message.content}{calls}".encode(errors="surrogatepass")
    else:
        yield array("I", prompt.token_ids).tobytes()


def _blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The whole blocks of the joined pieces."""
    rest = b""
    for piece in pieces:
        rest += piece
        whole = len(rest) // BLOCK_BYTES * BLOCK_BYTES
        for at in range(0, whole, BLOCK_BYTES):
            yield rest[at : at + BLOCK_BYTES]
        rest = rest[whole:]


class PrefixRecord:
    """The digests of the prompts that the KV cache of a replica holds, which has room for `capacity` tokens.

    An estimate: the cache frees what was not used for the longest time, and so does this record.
    """

    def __init__(self, capacity: int, most: int = 4096) -> None:
        self._capacity = capacity
        self._most = most
        self._tokens = 0.0
        self._blocks: OrderedDict[int, float] = OrderedDict()  # tokens of the block, by its digest; the oldest first
        self.version = 0

    def add(self, digests: Sequence[int], prompt_tokens: int) -> None:
        """Record a prompt. Its last block is noted as the oldest, since a cache frees the end of a prompt first."""
        if not digests:
            return
        tokens = prompt_tokens / len(digests)
        for digest in reversed(digests):
            known = self._blocks.pop(digest, None)
            self._tokens += tokens - (known or 0.0)
            self._blocks[digest] = tokens
            self.version += known is None
        while len(self._blocks) > self._most or (self._tokens > self._capacity and len(self._blocks) > 1):
            self._tokens -= self._blocks.popitem(last=False)[1]
            self.version += 1

    def digests(self) -> bytes:
        """All recorded digests, as an array of unsigned 64-bit numbers."""
        return array("Q", self._blocks).tobytes()
