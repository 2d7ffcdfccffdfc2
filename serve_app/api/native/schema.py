"""The bodies of the native endpoints."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from serve_app.api.sampling import SamplingFields, Text, TokenCount
from serve_app.config import SamplingDefaults
from serve_app.core.requests import SamplingParams
from serve_app.errors import InvalidRequest


class NativeFields(SamplingFields):
    model: str | None = None
    """The name of the model. The default is the first model of the configuration."""
    max_tokens: TokenCount = 128
    """The maximum number of tokens of the answer."""
    do_sample: bool | None = None
    """false is the same as temperature 0. true requires a temperature above 0."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Report the log probability of each token, and of this number of the most likely tokens at its place."""

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        """Raises InvalidRequest if fields contradict each other."""
        params = self.sampling(defaults, self.max_tokens, self.logprobs, greedy=self.do_sample is False)
        if self.do_sample and params.temperature == 0:
            raise InvalidRequest(
                "Field 'do_sample' is true, which requires a temperature above 0. Raise 'temperature' or leave "
                "'do_sample' out.",
                param="do_sample",
            )
        return params


class GenerateBody(NativeFields):
    prompt: Text
    """The text that the model continues."""


class StreamBody(GenerateBody):
    include_text: bool = True
    """Whether every event has the whole text so far."""


def _either_prompts_or_requests(schema: dict[str, Any]) -> None:
    """The rules of BatchBody.items as a JSON schema."""
    nothing = {name: {"type": "null"} for name in schema["properties"]}
    several = {"type": "array", "minItems": 1}
    schema["oneOf"] = [
        {"required": ["prompts"], "properties": {"prompts": several, "requests": {"type": "null"}}},
        {"required": ["requests"], "properties": {**nothing, "requests": several}},
    ]


class BatchBody(NativeFields):
    """Prompts with common fields, or requests with fields of their own. Each item is validated when it is run."""

    model_config = ConfigDict(json_schema_extra=_either_prompts_or_requests)

    prompts: list[object] | None = None
    """Texts that the model continues; the other fields apply to each of them."""
    requests: list[object] | None = None
    """Bodies of /generate."""

    @property
    def items_field(self) -> str:
        return "requests" if self.prompts is None else "prompts"

    def items(self) -> list[object]:
        """One body of /generate for each item, not validated. Raises InvalidRequest."""
        common = self.model_dump(exclude={"prompts", "requests"}, exclude_unset=True)
        if self.prompts is not None and self.requests is None:
            return [{**common, "prompt": prompt} for prompt in self.prompts]
        if self.requests is None or self.prompts is not None:
            raise InvalidRequest("Send either 'prompts' or 'requests'.", param="prompts")
        if common:
            name = next(iter(common))
            raise InvalidRequest(
                f"Field '{name}' applies to 'prompts' only. Put it into each of the requests.", param=name
            )
        return self.requests
