"""Who still uses a node's copies. Knows no Ray and no clock."""

LEASE_S = 30.0
"""A replica that has not renewed for so long counts as gone; it renews every few seconds."""
LINGER_S = 10.0
"""Copies stay for so long without a replica: one that is replaced finds them again."""
LOOK_EVERY_S = 2.0


class Leases:
    """Leases of replicas, by name."""

    def __init__(self, now_s: float) -> None:
        self._ends_s: dict[str, float] = {}
        self._last_use_s = now_s + LEASE_S - LINGER_S
        """Until when copies count as used; the first replica gets the time of a lease to come."""

    def renew(self, replica: str, now_s: float) -> bool:
        """Extend a replica's lease; say whether it is a new one."""
        is_new = replica not in self._ends_s
        self._ends_s[replica] = now_s + LEASE_S
        return is_new

    def end(self, replica: str, now_s: float) -> None:
        """End a replica's lease."""
        if self._ends_s.pop(replica, None) is not None:
            self._last_use_s = max(self._last_use_s, now_s)

    def are_over(self, now_s: float) -> bool:
        """Say whether no one has held a lease for :data:`LINGER_S`."""
        for replica, end_s in list(self._ends_s.items()):
            if end_s <= now_s:
                self.end(replica, end_s)
        return not self._ends_s and now_s >= self._last_use_s + LINGER_S
