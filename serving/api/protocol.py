"""The common part of OpenAI's requests: reading, checks, and errors as sentences."""

import difflib
import json
import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from ...errors import RequestError
from ...moe.models.sampling import SamplingParams
from ..engine.sequence import GenerationRequest

IGNORED = {
    "metadata",
    "parallel_tool_calls",  # says how tools are called; without tools, nothing
    "prediction",  # only makes an answer come sooner
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
"""OpenAI's parameters that do not change the answer."""
MAX_STOP_IDS = 256
MAX_STOP_LENGTH = 256
MAX_SALT_LENGTH = 256
MAX_LOGPROBS = 20
"""OpenAI's own limit on the alternatives per token."""


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False
    """With ``include_usage``: every event carries the tokens of its choice so far, as in vLLM."""
    include_obfuscation: StrictBool = False
    """Accepted and ignored: nothing here pads its events."""


class GenerationOptions(BaseModel):
    """The keys that all endpoints share.

    Sampling parameters default to those of the model's folder.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    temperature: float = Field(strict=True, default=1.0, ge=0, le=2)
    top_p: float = Field(strict=True, default=1.0, gt=0, le=1)
    top_k: StrictInt = Field(default=0, ge=0)
    n: StrictInt = Field(default=1, ge=1, le=8)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[StrictInt] = Field(default_factory=list, max_length=MAX_STOP_IDS)
    """Ids that end the answer, next to the model's own, as in vLLM."""
    ignore_eos: StrictBool = False
    """Go on after the model's end-of-text tokens, as in vLLM."""
    min_tokens: StrictInt = Field(default=0, ge=0)
    """Tokens before which no end-of-text token, ``stop`` or ``stop_token_ids`` ends the answer."""
    seed: StrictInt | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    priority: StrictInt = Field(default=0, ge=-(1 << 31), lt=1 << 31)
    """Requests with lower ones come first, as in vLLM."""
    cache_salt: str = Field(strict=True, default="", min_length=1, max_length=MAX_SALT_LENGTH)
    """Only requests with equal salts take over what another one has read, as in vLLM."""
    presence_penalty: float = Field(strict=True, default=0.0, ge=0, le=0)
    frequency_penalty: float = Field(strict=True, default=0.0, ge=0, le=0)

    @property
    def includes_usage(self) -> bool:
        """True when a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def has_continuous_usage(self) -> bool:
        """True when every event of a stream has the number of tokens."""
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    def stop_strings(self) -> tuple[str, ...]:
        """Return the stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


Options = TypeVar("Options", bound=GenerationOptions)


def read_values(body: bytes, unsupported: dict[str, Any]) -> dict[str, Any]:
    """Read a JSON object and drop the keys that ask for nothing.

    ``unsupported`` are OpenAI's parameters that this server lacks, each with its neutral value;
    any other value is refused.
    """
    values = _read_json(body)
    for key in list(values):
        if values[key] is None or key in IGNORED:
            del values[key]
        elif key in unsupported:
            neutral = unsupported[key]
            if type(values[key]) is not type(neutral) or values[key] != neutral:
                raise RequestError(f"{key} is not supported; leave it out.", param=key)
            del values[key]
    return values


def validate(kind: type[Options], values: dict[str, Any]) -> Options:
    """Check ``values`` and return the request."""
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        raise _as_request_error(kind, error, values) from None
    stops = request.stop_strings()
    if len(stops) > 4 or not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise RequestError(
            f"stop takes up to 4 strings of 1 to {MAX_STOP_LENGTH} characters.", param="stop"
        )
    check_unicode("stop", stops)
    check_unicode("cache_salt", [request.cache_salt])
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream = true.", param="stream_options")
    return request


def sampling_of(body: GenerationOptions, usual: SamplingParams) -> SamplingParams:
    """Return a request's sampling parameters; missing ones are taken from ``usual``."""
    given = body.model_dump(include={"temperature", "top_p", "top_k"}, exclude_unset=True)
    return replace(usual, **given)


def choices_of(request: GenerationRequest, body: GenerationOptions) -> list[GenerationRequest]:
    """Return ``body.n`` requests like ``request``, which differ in id and seed.

    They are a group, so that their prompt is read once.
    """
    seeds = [None if body.seed is None else (body.seed + i) % (1 << 63) for i in range(body.n)]
    request = replace(request, group=uuid.uuid4().hex if body.n > 1 else "")
    return [replace(request, request_id=uuid.uuid4().hex, seed=seed) for seed in seeds]


def check_unicode(param: str, texts: Iterable[str]) -> None:
    """Refuse text that is not valid Unicode."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(
                f"{param} holds half of a surrogate pair; send valid Unicode.", param=param
            ) from None


def read_text(param: str, value: Any) -> str:
    """Return ``value`` if it is a string of valid Unicode."""
    if not isinstance(value, str):
        raise RequestError(f"{param} is {shown(value)}; use a string.", param=param)
    check_unicode(param, [value])
    return value


def check_keys(where: str, given: dict[str, Any], known: set[str]) -> None:
    """Refuse keys of an object that are neither known nor null."""
    for key, value in given.items():
        if key not in known and value is not None:
            param = f"{where}.{key[:40].encode('unicode_escape').decode()}"
            raise RequestError(f"{param} is not supported; leave it out.", param=param)


def shown(value: Any) -> str:
    """Return a value of the body as a sentence can have it."""
    return repr(value)[:80]


def _read_json(body: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        raise RequestError(f"the body holds {constant}, which is not JSON; send a finite number.")

    try:
        values = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"the body is not JSON ({reason}); send a JSON object.") from None
    if not isinstance(values, dict):
        raise RequestError(f"the body is a {type(values).__name__}; send a JSON object.")
    return values


def _as_request_error(
    kind: type[GenerationOptions], error: ValidationError, values: dict[str, Any]
) -> RequestError:
    problem = error.errors(include_input=False, include_url=False)[0]
    location = [part for part in problem["loc"] if isinstance(part, str)]
    if not location:
        return RequestError("a key of the body is not valid Unicode; send plain names.")
    param = ".".join(location)[:80].encode("unicode_escape").decode()
    if problem["type"] == "missing":
        return RequestError(f"{param} is missing; give it.", param=param)
    if problem["type"] == "extra_forbidden":
        known = kind if len(location) == 1 else StreamOptions
        close = difflib.get_close_matches(location[-1], known.model_fields, n=1)
        hint = f"did you mean {close[0]}?" if close else "leave it out."
        return RequestError(f"{param} is not a known parameter; {hint}", param=param)
    if param.endswith("_penalty"):
        return RequestError(f"{param} is not supported; leave it out or send 0.", param=param)
    given = shown(values.get(location[0]))
    reason = problem["msg"].removeprefix("Input ")
    return RequestError(f"{location[0]} is {given}, but it {reason}.", param=param)
