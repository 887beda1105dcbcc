"""Which requests an engine can never serve, each in one sentence."""

from collections.abc import Set

from ...errors import ConfigError, RequestError
from .sequence import GenerationRequest


def check_request(
    request: GenerationRequest,
    max_model_len: int,
    vocabulary: int,
    eos_ids: Set[int],
    is_short_of_memory: bool,
) -> None:
    """Raise :class:`RequestError` for prompts that are empty, too long or hold unknown ids, and for
    ends that can never come.

    ``is_short_of_memory`` says that the memory for keys and values sets ``max_model_len``.
    """
    length = len(request.prompt_ids)
    if length == 0:
        raise RequestError("prompt is empty; give at least one token.", param="prompt")
    if length + request.max_tokens > max_model_len:
        raise RequestError(
            # litellm and others look for these words, to try a model with a longer context.
            f"This model's maximum context length is {max_model_len} tokens"
            f"{', which is what kv-memory holds' if is_short_of_memory else ''}, but the "
            f"prompt has {length} and max_tokens is {request.max_tokens}; shorten one of them.",
            param="prompt" if length >= max_model_len else "max_tokens",
            code="context_length_exceeded",
        )
    for token in request.prompt_ids:
        if not 0 <= token < vocabulary:
            raise RequestError(
                f"prompt holds token id {token}; ids of this model are in [0, {vocabulary}).",
                param="prompt",
            )

    for token in request.stop_token_ids:
        if not 0 <= token < vocabulary:
            raise RequestError(
                f"stop_token_ids holds {token}; ids of this model are in [0, {vocabulary}).",
                param="stop_token_ids",
            )
    if request.min_tokens > request.max_tokens:
        raise RequestError(
            f"min_tokens is {request.min_tokens}, but the answer ends after "
            f"{request.max_tokens} tokens; lower it.",
            param="min_tokens",
        )
    if request.min_tokens and len(request.stop_token_ids | eos_ids) >= vocabulary:
        raise RequestError(
            "min_tokens with every token in stop_token_ids leaves none to choose; list fewer.",
            param="stop_token_ids",
        )


def check_length(max_model_len: int | None, longest: int) -> None:
    """Refuse a limit beyond what the model takes."""
    if max_model_len is not None and max_model_len > longest:
        raise ConfigError(
            f"max-model-len is {max_model_len}, but the model takes {longest}; lower it."
        )
