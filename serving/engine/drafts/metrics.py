"""What an engine counts of drafts."""

from prometheus_client import CollectorRegistry, Counter


class DraftMetrics:
    """Drafted rows, what came of them, and what both are worth in measured seconds."""

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
