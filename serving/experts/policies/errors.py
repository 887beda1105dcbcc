"""What is said of a policy that breaks its promises."""

from ....errors import ConfigError
from .policy import Key, Policy


def wrong_victim(policy: Policy, key: Key) -> ConfigError:
    """Return the error for a key that may not leave: compute may be using its slot."""
    return ConfigError(
        f"expert_policy {type(policy).__name__} chose {key}, which is not in memory or is "
        "protected; victim() must return an added key that is not protected, or None."
    )


def no_victim(policy: Policy) -> ConfigError:
    """Return the error for a policy that keeps every slot."""
    return ConfigError(
        f"expert_policy {type(policy).__name__} chose no expert to evict, although slots hold some "
        "that are not protected; victim() must return one of them."
    )
