"""The models a request may name, and vLLM's routes that load and unload adapters.

``POST /v1/load_lora_adapter`` with ``lora_name`` and ``lora_path``, and
``POST /v1/unload_lora_adapter`` with ``lora_name``. A server offers them only if its arguments
allow it, because they read folders that a client names.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ...errors import ConfigError, ModelFileError, RequestError
from ...moe.adapters.adapter import Adapter
from ...moe.adapters.table import AdapterTable
from .protocol import check_keys, read_text, read_values
from .request_body import read_body


class ServedModels:
    """The model of a server and its adapters, by the names that clients use."""

    def __init__(self, model_name: str, adapters: AdapterTable) -> None:
        self.model_name = model_name
        self.adapters = adapters
        self.live: Callable[[], dict[str, int] | None] | None = None
        """Says which version the weights have, if they follow a run."""

    @property
    def names(self) -> list[str]:
        """The model's name, then the adapters'."""
        return [self.model_name, *self.adapters.names]

    def find(self, name: str) -> Adapter | None:
        """Return the adapter of a name, or None for the model itself.

        Raises :class:`RequestError` (404) for a name that this server does not have.
        """
        if name == self.model_name:
            return None
        try:
            return self.adapters.get(name)
        except ConfigError:
            known = ", ".join(map(repr, self.names))
            raise RequestError(
                f"model {name!r} does not exist; this server has {known}.",
                param="model",
                code="model_not_found",
                status=404,
            ) from None

    def describe(self, name: str, max_model_len: int) -> dict[str, object]:
        """Return OpenAI's model object; an adapter's ``parent`` is the model, as in vLLM."""
        found: dict[str, object] = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "moeyard",
            "max_model_len": max_model_len,
        }
        if self.live is not None:
            found["weights"] = self.live()
        return found if name == self.model_name else found | {"parent": self.model_name}


class AdapterUpdates:
    """The routes that change the adapters."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
        ]

    async def load(self, request: Request) -> Response:
        """Load an adapter from a folder of the server's machine."""
        name, path = await _read(request, "lora_name", "lora_path")
        if name == self._models.model_name:
            raise RequestError(
                f"lora_name is {name!r}, which is the model; use another name.", param="lora_name"
            )
        try:
            await asyncio.to_thread(self._models.adapters.load, name, Path(path))
        except ConfigError as error:
            raise RequestError(str(error), param="lora_name") from None
        except ModelFileError as error:
            raise RequestError(str(error), param="lora_path") from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Forget an adapter; requests that run finish with it."""
        (name,) = await _read(request, "lora_name")
        if name not in self._models.adapters.names:
            raise RequestError(
                f"lora_name is {name!r}, which is not loaded; see /v1/models.",
                param="lora_name",
                code="model_not_found",
                status=404,
            )
        self._models.adapters.unload(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def _read(request: Request, *keys: str) -> list[str]:
    values = read_values(await read_body(request.receive), {})
    check_keys("body", values, set(keys))
    return [read_text(key, values.get(key)) for key in keys]
