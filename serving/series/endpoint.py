"""``POST /v1/forecast``: series in, what comes after them out.

    {"series": [[1.0, 2.5, null, 4.0], ...], "horizon": 96, "quantiles": [0.1, 0.5, 0.9]}

N series, H points ahead, Q quantiles.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...errors import ConfigError, RequestError
from ...moe.models.forecaster import Forecaster, Question
from ...moe.models.series_values import Context, Forecast
from ..api.adapters import ServedModels
from ..api.protocol import check_keys, read_text, read_values, shown
from ..api.request_body import read_body
from ..engine.admission import Admission
from .thread import ForecastThread

MAX_SERIES = 256
"""Of a request. The body's bytes bound their points."""
MAX_HORIZON = 4096
MAX_QUANTILES = 99
MAX_NUMBERS = 1 << 18
"""Of an answer: series x horizon x (1 + quantiles)."""
KEYS = {"model", "series", "horizon", "quantiles", "context", "columns", "seed"}
EXAMPLE = '{"series": [[1, 2.5, null, 4]], "horizon": 8}'
OF_DECODERS = ("/v1/completions", "/v1/chat/completions")


class ForecastEndpoint:
    """``POST /v1/forecast``, and sentences where clients look for text."""

    def __init__(self, thread: ForecastThread, admission: Admission, models: ServedModels) -> None:
        self._thread = thread
        self._admission = admission
        self._models = models

    def routes(self) -> list[Route]:
        """Return the routes."""
        text = [Route(path, self.refuse_text, methods=["POST"]) for path in OF_DECODERS]
        return [
            Route("/v1/forecast", self.create, methods=["POST"]),
            Route("/v1/forecast", self.refuse_get, methods=["GET"]),
            *text,
        ]

    async def create(self, request: Request) -> Response:
        """Continue series."""
        body = await read_body(request.receive)
        with self._admission.places(1):
            values = read_values(body, {})
            name = self._models.model_name
            if "model" in values:
                name = read_text("model", values["model"])
                self._models.find(name)
            question, contexts = read_forecast(values, self._thread.forecaster)
            forecasts = await self._thread.forecast(contexts, question)
            answer = await asyncio.to_thread(_answer, name, question, contexts, forecasts)
        return JSONResponse(answer)

    async def refuse_get(self, request: Request) -> NoReturn:
        """Say what is sent instead."""
        raise RequestError(
            f"{request.method} {request.url.path} is not offered; POST JSON such as {EXAMPLE}.",
            status=405,
        )

    async def refuse_text(self, request: Request) -> NoReturn:
        """Say that the model does not write."""
        raise RequestError(
            f"POST {request.url.path} is not offered: {self._models.model_name!r} continues time "
            "series; use /v1/forecast.",
            code="model_not_found",
            status=404,
        )


def read_forecast(values: dict[str, Any], forecaster: Forecaster) -> tuple[Question, list[Context]]:
    """Return what a body asks and the contexts that are read; raises :class:`RequestError`."""
    check_keys("body", values, KEYS)
    series = _series(values)
    horizon = _whole(values, "horizon")
    if horizon is None:
        raise RequestError("horizon is missing; give the number of points ahead.", param="horizon")
    quantiles = _quantiles(values)
    _check_sizes(len(series), horizon, quantiles)
    param = "horizon"
    try:
        question = forecaster.question(
            horizon, quantiles, _whole(values, "context"), _whole(values, "seed") or 0
        )
        param = "series"
        contexts = forecaster.contexts_of(series, question, _columns(values, forecaster))
    except ConfigError as error:
        named = next((key for key in KEYS if str(error).startswith(key)), param)
        raise RequestError(str(error), param=named) from None
    return question, contexts


def _series(values: dict[str, Any]) -> list[list[Any]]:
    given = values.get("series")
    if not isinstance(given, list) or not given or not all(isinstance(o, list) for o in given):
        raise RequestError(
            f"series is {shown(given)}; give a list of lists of numbers, one for each series.",
            param="series",
        )
    return given


def _whole(values: dict[str, Any], key: str) -> int | None:
    number = values.get(key)
    if number is not None and type(number) is not int:
        raise RequestError(f"{key} is {shown(number)}; use a whole number.", param=key)
    return number


def _columns(values: dict[str, Any], forecaster: Forecaster) -> list[str] | None:
    given = values.get("columns")
    if given is None:
        return None
    if not isinstance(given, list) or not all(type(one) is str for one in given):
        raise RequestError(
            f"columns is {shown(given)}; give a list of names, one for each series.",
            param="columns",
        )
    known = forecaster.trained_on.scales
    unknown = [name for name in given if name not in known]
    if unknown:  # another name would be scaled in another way
        raise RequestError(
            f"columns has {shown(unknown[0])}, but the model was trained on "
            f"{', '.join(known) or 'no columns'}; correct it, or leave columns out.",
            param="columns",
        )
    return given


def _quantiles(values: dict[str, Any]) -> list[float] | None:
    given = values.get("quantiles")
    if given is None:
        return None
    if not isinstance(given, list) or not all(type(one) in (int, float) for one in given):
        raise RequestError(
            f"quantiles is {shown(given)}; give a list of numbers between 0 and 1.",
            param="quantiles",
        )
    return given


def _check_sizes(num_series: int, horizon: int, quantiles: Sequence[float] | None) -> None:
    """Refuse more than one request may ask for."""
    if horizon < 1:
        raise RequestError(
            f"horizon is {horizon}; use a number from 1 to {MAX_HORIZON}.", param="horizon"
        )
    asked = 3 if quantiles is None else len(quantiles)
    limits = (
        ("series", num_series, MAX_SERIES, "series"),
        ("horizon", horizon, MAX_HORIZON, "points ahead"),
        ("quantiles", asked, MAX_QUANTILES, "quantiles"),
        ("horizon", num_series * horizon * (1 + asked), MAX_NUMBERS, "numbers in the answer"),
    )
    for param, count, most, words in limits:
        if count > most:
            raise RequestError(
                f"the request asks for {count} {words}, but one may have {most}; send several "
                "requests, or ask for less.",
                param=param,
            )


def _answer(
    name: str, question: Question, contexts: list[Context], forecasts: list[Forecast]
) -> dict[str, Any]:
    """Return the body of the answer."""
    return {
        "object": "forecast",
        "model": name,
        "horizon": question.horizon,
        "data": [
            {
                "index": index,
                "mean": forecast.mean.tolist(),
                "quantiles": None
                if quantiles is None
                else {quantile: values.tolist() for quantile, values in quantiles.items()},
            }
            for index, forecast in enumerate(forecasts)
            for quantiles in [forecast.named_quantiles]
        ],
        "usage": {
            "context_points": sum(map(len, contexts)),
            "forecast_points": question.horizon * len(forecasts),
        },
    }
