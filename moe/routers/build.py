"""Which router module a configuration asks for."""

from collections.abc import Sequence

from ...errors import ConfigError
from .config import Hash, TopK, problem_with_choices
from .hash import HashRouter
from .router import Router
from .topk import TopKRouter


def build_router(
    config: TopK | Hash,
    d_model: int,
    num_experts: int,
    vocab_size: int | None = None,
    token_counts: Sequence[int] | None = None,
) -> Router:
    """Build the router that ``config`` describes."""
    problem = problem_with_choices(config, num_experts)
    if problem is not None:
        raise ConfigError(problem)
    if isinstance(config, TopK):
        return TopKRouter(config, d_model, num_experts)
    if vocab_size is None:
        raise ConfigError("router.kind is hash, which needs a vocabulary; pass vocab_size.")
    return HashRouter(config, num_experts, vocab_size, token_counts)
