"""Which requests may take over each other's keys and values."""

from .sequence import GenerationRequest


class Salts:
    """The salts of an engine's requests. Only requests with equal ones share blocks."""

    def __init__(self, reuses_prefixes: bool) -> None:
        self._reuses_prefixes = reuses_prefixes
        self.weights_version = 0
        """Of the weights that compute keys and values now; 0 = those of the model folder."""

    def of(self, request: GenerationRequest) -> bytes | None:
        """Return the salt of a request's blocks; None if it shares them with no other.

        It tells the weights' version, the adapter, and what the client sent as a salt. Weights and
        adapters change keys and values. A client's salt keeps others from learning, by the time
        that an answer takes, what it has asked before.
        """
        if not self._reuses_prefixes:
            return None
        adapter = "" if request.adapter is None else str(request.adapter.number)
        return f"{self.weights_version}/{adapter}/{request.cache_salt}".encode()
