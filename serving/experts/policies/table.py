"""The policies by name: a new one is a file next to this one and a line here."""

from collections.abc import Callable, Iterable
from pathlib import Path

from ....errors import ConfigError, DataError
from ....moe.routes.reader import RouteFile
from ..recorded import RecordedForward, read_forwards
from .activations import ActivationTracing
from .decayed_lfu import DecayedFrequency
from .edgemoe import FrequencyOverDistance
from .future_use import FutureUse
from .hot_set import HotSet
from .lfu import LeastFrequentlyUsed
from .lru import LeastRecentlyUsed
from .policy import CacheFacts, Policy
from .working_set import WorkingSet

POLICIES: dict[str, Callable[[CacheFacts], Policy]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "decayed_lfu": DecayedFrequency,
    "edgemoe": FrequencyOverDistance,
    "activations": ActivationTracing,
    "working_set": WorkingSet,
}
LEARNING: dict[str, Callable[[CacheFacts, Iterable[RecordedForward]], Policy]] = {
    "hot_set": HotSet,
    "future_use": FutureUse,
}
"""Those that learn from recorded routes; asked for as ``NAME:FILE``."""
BOUND = "belady"
"""Knows the future, so only a replay has it."""


def check_policy(policy: str | Policy) -> None:
    """Raise an error for what is no policy: :class:`ConfigError`, or :class:`DataError` for a file.

    Whether a route file fits the model is known when the policy is opened.
    """
    if not isinstance(policy, str):
        return
    name, separator, path = policy.partition(":")
    if name == BOUND:
        raise ConfigError(
            f"expert_policy is {policy!r}, which must know the future; use it in moeyard trace "
            f"replay, and one of {_names()} to serve."
        )
    if name not in POLICIES and name not in LEARNING:
        raise ConfigError(
            f"expert_policy is {policy!r}; use one of {_names()}, or an object with the methods of "
            "moeyard.serving.experts.policies.policy.Policy."
        )
    if name in POLICIES and separator:
        raise ConfigError(f"expert_policy is {policy!r}, but {name} reads no file; write {name}.")
    if name in LEARNING:
        if not path:
            raise ConfigError(
                f"expert_policy is {policy!r}; write {name}:FILE with a route file of this model."
            )
        RouteFile(Path(path))


def open_policy(policy: str | Policy, facts: CacheFacts) -> Policy:
    """Return a policy given by its name, or as an object.

    Raises :class:`ConfigError` for names, and :class:`DataError` for a route file that cannot be
    read to its end or is that of another model.
    """
    check_policy(policy)
    if not isinstance(policy, str):
        return policy
    name, _, path = policy.partition(":")
    if name in POLICIES:
        return POLICIES[name](facts)
    file = RouteFile(Path(path))
    file.check_sizes(facts.moe_layers, facts.num_experts, facts.architecture)
    forwards = read_forwards([file])
    if file.damage is not None:
        raise DataError(f"expert_policy is {policy!r}, but {file.damage} Record it again.")
    return LEARNING[name](facts, forwards)


def _names() -> str:
    return ", ".join((*POLICIES, *(f"{name}:FILE" for name in LEARNING)))
