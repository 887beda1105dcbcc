"""Which requests may take over each other's keys and values."""

from .sequence import GenerationRequest


def salt_of(request: GenerationRequest) -> bytes:
    """Return the salt of a request's blocks: its adapter, and what its client sent as a salt.

    An adapter changes keys and values. A client's salt keeps others from learning, by the time that
    an answer takes, what it has asked before.
    """
    adapter = "" if request.adapter is None else str(request.adapter.number)
    return f"{adapter}/{request.cache_salt}".encode()
