"""Which application answers under which route prefix: Ray's routers say, and the guard asks."""

from .places import Places, Ticket

MOST_PREFIXES = 64


class Applications:
    """The places of each application, as far as its router has been asked.

    The guard finds in the proxy's thread and routers tell in another one, so the table is replaced
    and never changed.
    """

    def __init__(self) -> None:
        self._known: dict[str, Places] = {}

    def find(self, prefix: str | None) -> Places | None:
        """Return the places of the application under this very prefix, if it is known.

        What only begins with a known prefix may be another application's.
        """
        return None if prefix is None else self._known.get(prefix)

    def nearest(self, path: str) -> Places | None:
        """Return the places of the application that most probably answers a path."""
        known = self._known
        fitting = (prefix for prefix in known if path.startswith(f"{prefix}/"))
        longest = max(fitting, key=len, default=None)
        return None if longest is None else known[longest]

    def learn(self, prefix: str, places: Places) -> None:
        """Hear from a router that a request with this prefix has come to it."""
        known = {other: its for other, its in self._known.items() if other != prefix}
        if len(known) >= MOST_PREFIXES:  # clients may invent prefixes; those in use are told again
            del known[next(iter(known))]
        self._known = {**known, prefix: places}


applications = Applications()
"""Those of this process: Ray makes the routers, and the guard finds what they know here."""


def ticket_header(ticket: Ticket | None, prefix: str | None) -> bytes:
    """Return what the router hears of a request: its ticket, 0 for none, and its route prefix."""
    number = 0 if ticket is None else ticket.number
    return (f"{number}" if prefix is None else f"{number} {prefix}").encode()
