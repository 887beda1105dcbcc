"""What a request holds in the proxy until its response has ended."""

from .applications import ticket_header
from .places import HEADER, REFUSED, Places, Ticket


class Held:
    """A request's places, and the refusals that it tells a replica of."""

    def __init__(
        self,
        places: Places | None = None,
        ticket: Ticket | None = None,
        prefix: str | None = None,
        may_tell: bool = True,
    ) -> None:
        """``may_tell``: whether a replica reads all headers of such a request."""
        self._places, self._ticket = places, ticket
        self._num_told = places.take_refused() if places is not None and may_tell else 0
        self.headers = [(HEADER, ticket_header(ticket, prefix))]
        if self._num_told:
            self.headers.append((REFUSED, b"%d" % self._num_told))

    def has_arrived(self) -> None:
        """Take note that a replica knows of the refusals, or that none can say so any more."""
        self._num_told = 0

    def has_ended(self) -> None:
        """Give the places back, before the client gets the last piece of its answer.

        If it asks again at once, it finds them free. Ray's application returns later.
        """
        if self._places is not None and self._ticket is not None:
            self._places.give_back(self._ticket)

    def close(self) -> None:
        """Give back what is still held, however the request has ended."""
        self.has_ended()
        if self._places is not None and self._num_told:
            self._places.tell_later(self._num_told)
            self._num_told = 0
