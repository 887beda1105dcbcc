"""OpenAI's completion request: read from bytes, checked, every problem a :class:`RequestError`."""

import difflib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from ..errors import RequestError

UNSUPPORTED: dict[str, Any] = {
    "logprobs": False,
    "echo": False,
    "suffix": "",
    "best_of": 1,
    "logit_bias": {},
}
"""OpenAI's parameters that this server does not have, each with the value that asks for nothing."""
IGNORED = {"user", "metadata", "store"}
MAX_STOP_LENGTH = 256


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False
    """Accepted and ignored: nothing here pads its events."""


class CompletionRequest(BaseModel):
    """Body of ``POST /v1/completions``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    prompt: Any
    """A string, a list of strings, a list of token ids or a list of such lists."""
    max_tokens: StrictInt = Field(default=16, ge=1)
    temperature: float = Field(strict=True, default=1.0, ge=0, le=2)
    top_p: float = Field(strict=True, default=1.0, gt=0, le=1)
    top_k: StrictInt = Field(default=0, ge=0)
    n: StrictInt = Field(default=1, ge=1, le=8)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] = Field(default_factory=list)
    seed: StrictInt | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    presence_penalty: float = Field(strict=True, default=0.0, ge=0, le=0)
    frequency_penalty: float = Field(strict=True, default=0.0, ge=0, le=0)

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one, as text or as ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def stop_strings(self) -> tuple[str, ...]:
        """Return the stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a request body."""
    values = _read_json(body)
    for key in list(values):
        if values[key] is None or key in IGNORED:
            del values[key]
        elif key in UNSUPPORTED:
            neutral = UNSUPPORTED[key]
            if type(values[key]) is not type(neutral) or values[key] != neutral:
                raise RequestError(f"{key} is not supported; leave it out.", param=key)
            del values[key]
    _check_prompt(values.get("prompt"))
    try:
        request = CompletionRequest.model_validate(values)
    except ValidationError as error:
        raise _as_request_error(error, values) from None
    _check_text(request)
    return request


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


def _check_prompt(prompt: Any) -> None:
    """Check the type by hand, stopping at the first element that is wrong.

    A union of list types would make pydantic describe every element of a long list, per type.
    """
    if prompt is None or isinstance(prompt, str):
        return  # a missing prompt is found below
    if isinstance(prompt, list) and not prompt:
        raise RequestError("prompt is an empty list; give at least one prompt.", param="prompt")
    rows = prompt if isinstance(prompt, list) else [prompt]
    if all(isinstance(row, str) for row in rows) or _are_ids(rows):
        return
    if all(isinstance(row, list) and _are_ids(row) for row in rows):
        return
    raise RequestError(
        "prompt must be a string, a list of strings, a list of token ids, or a list of such lists.",
        param="prompt",
    )


def _are_ids(row: list[Any]) -> bool:
    return all(type(token) is int for token in row)


def _check_text(request: CompletionRequest) -> None:
    stops = request.stop_strings()
    if len(stops) > 4 or not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise RequestError(
            f"stop takes up to 4 strings of 1 to {MAX_STOP_LENGTH} characters.", param="stop"
        )
    texts = [prompt for prompt in request.prompts() if isinstance(prompt, str)]
    for param, text in [*(("prompt", t) for t in texts), *(("stop", t) for t in stops)]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(
                f"{param} holds half of a surrogate pair; send valid Unicode.", param=param
            ) from None
    if len(request.prompts()) * request.n > 32:
        raise RequestError(
            f"{len(request.prompts())} prompts with n = {request.n} make more than 32 answers; "
            "send several requests.",
            param="n",
        )
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream = true.", param="stream_options")


def _as_request_error(error: ValidationError, values: dict[str, Any]) -> RequestError:
    problem = error.errors(include_input=False, include_url=False)[0]
    location = [part for part in problem["loc"] if isinstance(part, str)]
    if not location:
        return RequestError("a key of the body is not valid Unicode; send plain names.")
    param = ".".join(location)[:80].encode("unicode_escape").decode()
    if problem["type"] == "missing":
        return RequestError(f"{param} is missing; give it.", param=param)
    if problem["type"] == "extra_forbidden":
        known = CompletionRequest if len(location) == 1 else StreamOptions
        close = difflib.get_close_matches(location[-1], known.model_fields, n=1)
        hint = f"did you mean {close[0]}?" if close else "leave it out."
        return RequestError(f"{param} is not a known parameter; {hint}", param=param)
    if param.endswith("_penalty"):
        return RequestError(f"{param} is not supported; leave it out or send 0.", param=param)
    shown = repr(values.get(location[0]))[:80]
    reason = problem["msg"].removeprefix("Input ")
    return RequestError(f"{location[0]} is {shown}, but it {reason}.", param=param)
