"""What a request wants of a replica: how many places, and of which application."""

import json

COMPLETIONS = "/v1/completions"
WITH_PLACES = (COMPLETIONS, "/v1/chat/completions", "/v1/forecast")
"""Paths whose requests take places; all others always go through."""
OTHERS = ("/v1/models", "/metrics", "/health")


def prefix_of(path: str) -> str | None:
    """Return what stands before the API's own path: the application's route prefix.

    None for a path that is not the API's.
    """
    own = next((own for own in (*WITH_PLACES, *OTHERS) if path.endswith(own)), None)
    return None if own is None else path.removesuffix(own)


def places_of(path: str, body: bytes) -> int:
    """Return the number of places that a request takes: one for each answer.

    What is no valid request counts as one: the replica will say what is wrong.
    """
    if not path.endswith(WITH_PLACES):
        return 0
    has_lists = path.endswith(COMPLETIONS) and b"[" in body  # perhaps of prompts
    if b'"n"' not in body and not has_lists:
        return 1  # nearly always, and without a look at a long prompt
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return 1
    if not isinstance(values, dict):
        return 1
    n, prompt = values.get("n"), values.get("prompt")
    num_answers = n if type(n) is int and n > 0 else 1
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        num_answers *= len(prompt)
    return num_answers
