"""Body of ``POST /v1/completions``."""

from typing import Any

from pydantic import Field, StrictBool, StrictInt

from ...errors import RequestError
from .protocol import MAX_LOGPROBS, GenerationOptions, check_unicode, read_values, validate

UNSUPPORTED: dict[str, Any] = {"suffix": "", "best_of": 1, "logit_bias": {}}
MAX_ANSWERS = 32


class CompletionRequest(GenerationOptions):
    """Text to continue."""

    prompt: Any
    """A string, a list of strings, a list of token ids or a list of such lists."""
    max_tokens: StrictInt = Field(default=16, ge=1)
    echo: StrictBool = False
    """Answer with the prompt in front."""
    logprobs: StrictInt | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Log-probabilities of each token and of so many likeliest ones."""

    @property
    def num_answers(self) -> int:
        """Choices that the answer will have."""
        return len(self.prompts()) * self.n

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one, as text or as ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a request body; every problem is a :class:`RequestError`."""
    values = read_values(body, UNSUPPORTED)
    _check_prompt(values.get("prompt"))
    request = validate(CompletionRequest, values)
    check_unicode("prompt", (p for p in request.prompts() if isinstance(p, str)))
    if request.num_answers > MAX_ANSWERS:
        raise RequestError(
            f"{len(request.prompts())} prompts with n = {request.n} make more than {MAX_ANSWERS} "
            "answers; send several requests.",
            param="n",
        )
    return request


def _check_prompt(prompt: Any) -> None:
    """Check the type by hand, stopping at the first element that is wrong.

    A union of list types would make pydantic describe every element of a long list, per type.
    """
    if prompt is None or isinstance(prompt, str):
        return  # a missing prompt is found by the model
    if isinstance(prompt, list) and not prompt:
        raise RequestError("prompt is an empty list; give at least one prompt.", param="prompt")
    if isinstance(prompt, list) and (
        all(isinstance(row, str) for row in prompt)
        or _are_ids(prompt)
        or all(isinstance(row, list) and _are_ids(row) for row in prompt)
    ):
        return
    raise RequestError(
        "prompt must be a string, a list of strings, a list of token ids, or a list of such lists.",
        param="prompt",
    )


def _are_ids(row: list[Any]) -> bool:
    return all(type(token) is int for token in row)
