"""The policies by name: a new one is a file next to this one and a line here."""

from collections.abc import Callable

from ....errors import ConfigError
from .lru import LeastRecentlyUsed
from .policy import CacheFacts, Policy

POLICIES: dict[str, Callable[[CacheFacts], Policy]] = {
    "lru": LeastRecentlyUsed,
}


def check_policy(policy: str | Policy) -> None:
    """Raise :class:`ConfigError` for a name that is none."""
    if isinstance(policy, str) and policy not in POLICIES:
        raise ConfigError(
            f"expert_policy is {policy!r}; use one of {', '.join(POLICIES)}, or an object with the "
            "methods of moeyard.serving.experts.policies.policy.Policy."
        )


def open_policy(policy: str | Policy, facts: CacheFacts) -> Policy:
    """Return a policy given by its name, or as an object; raises :class:`ConfigError`."""
    check_policy(policy)
    return POLICIES[policy](facts) if isinstance(policy, str) else policy
