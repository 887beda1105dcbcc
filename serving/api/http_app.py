"""The HTTP application of a decoder: OpenAI's routes. Needs no Ray."""

from collections.abc import Awaitable, Callable, Sequence

from starlette.routing import Route
from starlette.types import ASGIApp

from ..engine.admission import Admission
from ..engine.thread import EngineThread
from ..engine.tokenizer import ServingTokenizer
from .adapters import AdapterUpdates, ServedModels
from .answers import Answers
from .chat import ChatEndpoint
from .completions import CompletionEndpoint
from .frame import Frame
from .models import ModelRoutes


class HttpApi:
    """The endpoints of one engine."""

    def __init__(
        self,
        thread: EngineThread,
        tokenizer: ServingTokenizer,
        admission: Admission,
        models: ServedModels,
        render_metrics: Callable[[], Awaitable[bytes]],
    ) -> None:
        self._thread = thread
        self._models = models
        self._frame = Frame(thread.problem, admission, render_metrics)
        self._answers = Answers(thread, admission, models)
        self._completions = CompletionEndpoint(self._answers, tokenizer)
        self._chat = ChatEndpoint(self._answers, tokenizer)

    def app(
        self, api_key: str | None, cors_origins: Sequence[str] = (), updates_adapters: bool = False
    ) -> ASGIApp:
        """Return the ASGI application; pages of ``cors_origins`` may call it from a browser.

        ``updates_adapters`` adds the routes that load and unload adapters.
        """
        routes = [
            *ModelRoutes(self._models, self._thread.engine.max_model_len).routes(),
            Route("/v1/completions", self._completions.create, methods=["POST"]),
            Route("/v1/chat/completions", self._chat.create, methods=["POST"]),
        ]
        if updates_adapters:
            routes += AdapterUpdates(self._models).routes()
        return self._frame.app(routes, api_key, cors_origins)
