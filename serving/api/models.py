"""``GET /v1/models``: what a server has, by the names that clients use."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .adapters import ServedModels


class ModelRoutes:
    """The routes that list and describe the model and its adapters."""

    def __init__(self, models: ServedModels, max_model_len: int) -> None:
        """``max_model_len``: rows of the longest request."""
        self._models, self._max_model_len = models, max_model_len

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
        ]

    async def models(self, _: Request) -> Response:
        """List the model and its adapters."""
        found = [self._model_object(name) for name in self._models.names]
        return JSONResponse({"object": "list", "data": found})

    async def one_model(self, request: Request) -> Response:
        """Describe the model or an adapter."""
        name = request.path_params["name"]
        self._models.find(name)
        return JSONResponse(self._model_object(name))

    def _model_object(self, name: str) -> dict[str, object]:
        return self._models.describe(name, self._max_model_len)
