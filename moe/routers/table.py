"""All routers. A new router is a file of this folder and a line here."""

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BaseModel, Discriminator, SerializeAsAny, WrapValidator
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

from ...configuration import validate_config
from .base import Base
from .comet import Comet
from .contribution import Contribution
from .cosine import Cosine
from .dense_to_sparse import DenseToSparse
from .dselect import DSelect
from .expert_choice import ExpertChoice
from .hash import Hash
from .kmeans import KMeans
from .local_search import LocalSearch
from .noisy import Noisy
from .null_experts import NullExperts
from .own_code import check_class, find_class
from .relu import ReLU
from .router import RouterConfig
from .sampling_space import SamplingSpace
from .sinkhorn import Sinkhorn
from .sparsity import Sparsity
from .stochastic import Stochastic
from .task import Task
from .timestep import Timestep
from .top_p import TopP
from .topk import TopK

ROUTERS: tuple[type[RouterConfig], ...] = (
    TopK,
    Hash,
    Task,
    Timestep,
    Stochastic,
    SamplingSpace,
    KMeans,
    NullExperts,
    Noisy,
    TopP,
    ReLU,
    Cosine,
    Comet,
    DSelect,
    DenseToSparse,
    ExpertChoice,
    Base,
    Sinkhorn,
    Sparsity,
    Contribution,
    LocalSearch,
)
"""The configurations of all routers; ``kind`` tells them apart."""


SOFT_MOE = ("soft_moe", "softmoe", "soft")
"""Names that people may write in search of a router for Soft MoE, which is a layer."""


def _or_own(value: Any, ours: ValidatorFunctionWrapHandler) -> Any:
    """Read a user's router if ``value`` is or names one, else one of ``ROUTERS``."""
    if isinstance(value, RouterConfig) and not isinstance(value, ROUTERS):
        check_class(type(value))
        return value
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind in SOFT_MOE:
        raise ValueError(
            f"kind is {kind!r}, but Soft MoE is a layer for encoders, whose outputs depend on "
            "later tokens, so a decoder cannot have it; use moeyard.SoftMoE in a model of your "
            "own, or choose another router."
        )
    if isinstance(kind, str) and ":" in kind:
        return find_class(kind).model_validate(value)
    return ours(value)


if TYPE_CHECKING:
    AnyRouter = RouterConfig
else:

    def _any_of(routers):
        """Return the type of a section with one of ``routers``, or with a user's."""
        return SerializeAsAny[
            Annotated[
                Union[routers],  # noqa: UP007 - made from a tuple
                Discriminator("kind"),
                WrapValidator(_or_own),
            ]
        ]

    searched = tuple(config for config in ROUTERS if config is not LocalSearch)
    LocalSearch.model_rebuild(_types_namespace={"SearchedRouter": _any_of(searched)})
    AnyRouter = _any_of(ROUTERS)
    """The type of a ``router:`` section."""


class _Section(BaseModel):
    router: AnyRouter


def router(kind: str, **fields: Any) -> RouterConfig:
    """Return the configuration of any router by its name: ``router("hash", k=2)``.

    ``moeyard routers`` lists names and fields. Raises :class:`ConfigError` for those that it does
    not have.
    """
    return validate_config(_Section, {"router": {"kind": kind, **fields}}).router
