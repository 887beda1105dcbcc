"""What links have carried, and the check that they carried what a benchmark timed."""

from collections.abc import Mapping
from dataclasses import dataclass

from moeyard.errors import MoeyardError


@dataclass(frozen=True)
class Traffic:
    """Bytes over links, by ``node0``, ``node1`` ... and, where isolated, ``rank0``, ``rank1`` ...

    Frames count with their headers, and so do acknowledgements and the start of the group.
    """

    sent: dict[str, int]
    received: dict[str, int]
    dropped: dict[str, int]
    """Frames lost to full queues at both ends of the link; TCP sent their bytes again."""

    def since(self, before: "Traffic") -> "Traffic":
        """Return what has been added since ``before``."""

        def added(now: dict[str, int], then: dict[str, int]) -> dict[str, int]:
            return {name: count - then[name] for name, count in now.items()}

        return Traffic(
            added(self.sent, before.sent),
            added(self.received, before.received),
            added(self.dropped, before.dropped),
        )

    def check_sent(self, expected: Mapping[str, int]) -> None:
        """Raise unless every named link has sent at least the expected bytes."""
        for name, least in expected.items():
            if self.sent[name] < least:
                raise MoeyardError(
                    f"{name} sent {self.sent[name]} bytes over its link and {least} were expected: "
                    "the measured exchange went another way, so its time says nothing."
                )
