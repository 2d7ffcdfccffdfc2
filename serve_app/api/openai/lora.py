"""The endpoints that load and unload LoRA adapters at run time, as in vLLM."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from serve_app.api.context import RequestContext
from serve_app.api.experiments import identity_of
from serve_app.api.schema import Body
from serve_app.config import Model, valid_name
from serve_app.core.adapters import MAX_CHANGES, ListedAdapter
from serve_app.core.queries import LoadAdapter
from serve_app.core.requests import Adapter
from serve_app.errors import InvalidRequest, NotFound


class LoadAdapterBody(Body):
    lora_name: str
    """The name by which requests pick the adapter."""
    lora_path: str
    """A folder below one of the folders of the model's `lora.allow`, or a hub id of that list."""
    load_inplace: bool = False
    """Whether a loaded adapter of this name is replaced."""
    base_model_name: str | None = None
    """The model that the adapter belongs to; needed if several models take adapters at run time."""


class UnloadAdapterBody(Body):
    lora_name: str
    """The name of a loaded adapter."""


class LoraRoutes:
    """Without `lora.allow` in any model the paths do not exist."""

    def __init__(self, context: RequestContext) -> None:
        self._context = context
        self._models = {one.name: one for one in context.config.models if one.lora is not None and one.lora.allow}
        self._changing = asyncio.Lock()

    async def load(self, http: Request, document: object) -> Response:
        """One replica reads the files; the others load what has the same digest when they need it."""
        self._check_enabled()
        body = LoadAdapterBody.parse(document)
        async with self._changing:
            model = self._model(http, body)
            source, _, revision = body.lora_path.partition("@")
            is_folder = body.lora_path.startswith(("/", "~", "."))
            adapter = (
                Adapter(body.lora_name, body.lora_path)
                if is_folder
                else Adapter(body.lora_name, source, revision or _revision(model, source))
            )
            digest = await self._context.query(http, model.name, LoadAdapter(adapter))
            self._context.adapters.load(model.name, Adapter(adapter.name, adapter.source, adapter.revision, digest))
            await self._context.publish()
            details = {"model": model.name, "source": body.lora_path, "digest": digest}
            await self._context.audit(identity_of(http), "adapters.load", adapter.name, details)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, http: Request, document: object) -> Response:
        self._check_enabled()
        name = UnloadAdapterBody.parse(document).lora_name
        async with self._changing:
            listed = self._context.adapters.find(name)
            if listed is None:
                raise NotFound(f"The lora adapter '{name[:128]}' cannot be found.", param="lora_name")
            self._check_changeable(listed)
            self._context.adapters.unload(name)
            await self._context.publish()
            await self._context.audit(identity_of(http), "adapters.unload", name, {"model": listed.model})
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    def _check_enabled(self) -> None:
        if not self._models:
            raise NotFound("No model takes adapters at run time. Set lora.allow in its configuration to enable it.")

    def _check_changeable(self, listed: ListedAdapter) -> None:
        """Raises InvalidRequest for an adapter of a model that takes no changes at run time."""
        if listed.model not in self._models:
            name, model = listed.adapter.name, listed.model
            raise InvalidRequest(f"The model {model} of the lora adapter '{name}' has no lora.allow.", "lora_name")

    def _model(self, http: Request, body: LoadAdapterBody) -> Model:
        """The base model of the adapter. Raises InvalidRequest for an adapter that cannot be listed."""
        name, adapters = body.lora_name, self._context.adapters
        if not name or not body.lora_path:
            raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.", param="lora_name")
        if not valid_name(name):
            raise InvalidRequest(
                "A name has letters, digits and . _ : / -, and begins with a letter or digit.", "lora_name"
            )
        if any(model.name == name for model in self._context.config.models):
            raise InvalidRequest(f"The lora adapter '{name}' conflicts with a served base model.", param="lora_name")
        listed = adapters.find(name)
        if listed is not None and not body.load_inplace:
            raise InvalidRequest(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True.",
                param="load_inplace",
            )
        if listed is not None:
            self._check_changeable(listed)
        if listed is None and adapters.full:
            raise InvalidRequest(f"{MAX_CHANGES} adapters are loaded at run time. Unload others first.", "lora_name")
        chosen = body.base_model_name or (listed.model if listed else None)
        if chosen is None and len(self._models) == 1:
            (chosen,) = self._models
        if chosen not in self._models:
            raise InvalidRequest(
                f"Name the model of the adapter. Models that take adapters: {', '.join(self._models)}.",
                param="base_model_name",
            )
        http.state.model = chosen
        return self._models[chosen]


def _revision(model: Model, source: str) -> str | None:
    """The revision at which `lora.allow` has a hub id; None if it is not in the list."""
    assert model.lora is not None
    return next((one.partition("@")[2] for one in model.lora.allow if one.partition("@")[0] == source), None)
