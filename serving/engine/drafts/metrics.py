"""What an engine counts of drafts."""

from prometheus_client import CollectorRegistry, Counter


class DraftMetrics:
    """A :class:`.DraftTally` of counters that a server shows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.drafted = Counter(
            "moeyard_draft_tokens", "Drafted tokens that ran as rows of a step", registry=registry
        )
        self.accepted = Counter(
            "moeyard_draft_tokens_accepted", "Those of them that were right", registry=registry
        )
        self.cost_s = Counter(
            "moeyard_draft_cost_seconds",
            "Drafted rows times the measured seconds of a further row",
            registry=registry,
        )
        self.saved_s = Counter(
            "moeyard_draft_saved_seconds",
            "Accepted tokens times the measured seconds of a token without drafts",
            registry=registry,
        )

    def add(self, drafted: int, accepted: int, cost_s: float, saved_s: float) -> None:
        """See :class:`.DraftTally`."""
        self.drafted.inc(drafted)
        self.accepted.inc(accepted)
        self.cost_s.inc(cost_s)
        self.saved_s.inc(saved_s)
