"""The policies by name: a new one is a file next to this one and a line here."""

from collections.abc import Callable

from ....errors import ConfigError
from .lru import LeastRecentlyUsed
from .policy import Policy

POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": LeastRecentlyUsed,
}


def open_policy(policy: str | Policy) -> Policy:
    """Return a policy given by its name, or as an object; raises :class:`ConfigError`."""
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise ConfigError(
            f"expert_policy is {policy!r}; use one of {', '.join(POLICIES)}, or an object with the "
            "methods of moeyard.serving.experts.policies.policy.Policy."
        )
    return POLICIES[policy]()
