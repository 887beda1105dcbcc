"""What every router is: a configuration, and the module that it builds.

T tokens, E experts.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Generator, Tensor, nn

from ...errors import ConfigError
from ...kernels.values.choice import check_ids
from .loss_terms import GlobalCounts, LayerLosses
from .routing import Lookahead, RouterInput, Routing
from .row_facts import RowFact, why_not_among
from .sizes import RouterSizes as RouterSizes


class RouterConfig(BaseModel):
    """Base of configurations: the fields of a ``router:`` section, and their meaning.

    A subclass adds its fields and defines :meth:`build`. Those of :mod:`moeyard` have a ``kind`` of
    one word; your own class has none and is named by its import path (own_code.py).
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    paper: ClassVar[str] = ""
    """Where the router comes from."""
    learns: ClassVar[bool] = True
    """Whether the router has weights that training changes."""
    needs_token_counts: ClassVar[bool] = False
    """Whether training must count the token ids of its data before the router is built."""
    varies: ClassVar[bool] = False
    """Whether tokens may visit more or fewer than k experts. ``k`` is then about their mean."""

    reads_gates: ClassVar[bool] = False
    """Whether scores follow from the experts' own gate weights (:meth:`Router.watch`)."""

    kind: str = ""
    """The router's name in configurations; by default ``module:Class``."""
    k: int = Field(default=2, ge=1)
    """Experts each token visits."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Put the fields' meanings into the class's docstring, so that help() shows them."""
        lines = [
            f"    {name}: {' '.join((field.description or '').split())} Default: {field.default!r}."
            for name, field in cls.model_fields.items()
            if name != "kind"
        ]
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Fields:", *lines])

    @model_validator(mode="before")
    @classmethod
    def _name(cls, values: Any) -> Any:
        has_name = bool(cls.model_fields["kind"].default)
        if has_name or not isinstance(values, dict) or "kind" in values:
            return values
        return values | {"kind": f"{cls.__module__}:{cls.__qualname__}"}

    def build(self, sizes: RouterSizes) -> "Router":
        """Return the module; raise :class:`ConfigError` if ``sizes`` lacks something."""
        raise ConfigError(
            f"router is {type(self).__name__}, which has no build(self, sizes); define it, and "
            "return a moeyard.Router."
        )

    def problem_with(self, num_experts: int) -> str | None:
        """Return in one sentence why the router cannot choose among ``num_experts``, or None."""
        if self.k > num_experts:
            return (
                f"router.k is {self.k}, but the layer has {num_experts} experts; "
                f"use a value from 1 to {num_experts}."
            )
        return None

    def problem_with_activation(self, activation: str) -> str | None:
        """Return in one sentence why experts with ``activation`` do not fit the router, or None."""
        return None

    def architecture(self) -> dict[str, Any]:
        """Return the fields that the meaning of weights depends on; by default all.

        A run may change the other fields. Equivalent configurations give equal results.
        """
        return self.model_dump(mode="json")

    def reads_at(self) -> Lookahead:
        """Return what the router reads, and so when it can run."""
        return Lookahead.FFN_INPUT

    def most_rows(self, num_tokens: int, num_experts: int) -> int | None:
        """Return how many rows of a sequence an expert takes at most in training, or None.

        ``num_tokens`` is the sequence's length. None = the router has no limit of its own.
        """
        return None

    def draws(self) -> bool:
        """Return whether training draws random numbers (draws.py)."""
        return False

    def pools_layers(self) -> bool:
        """Return whether a loss is taken over all MoE layers of the model together."""
        return False

    def reads_previous_ids(self) -> bool:
        """Return whether the router reads :attr:`RouterInput.previous_ids_T`."""
        return False

    def embeddings_folder(self) -> str | None:
        """Return the model folder whose token embeddings training reads for ``build``, or None."""
        return None

    def reads_of_rows(self) -> RowFact | None:
        """Return what the router reads of each row in addition to its vector, or None."""
        return None

    def why_not_among(self, has: Collection[RowFact]) -> str | None:
        """Return in one sentence why a model whose rows have no more than ``has`` cannot have the
        router, or None."""
        return why_not_among(self.kind, self.reads_of_rows(), has)

    def why_not_causal(self) -> str | None:
        """Return in one sentence why a token's choice depends on later tokens, or None.

        Models with such a router cannot continue a text.
        """
        return None

    def for_first_layer(self) -> Self:
        """Return the configuration of a model's first MoE layer, which has no MoE layer before."""
        return self

    def problem_with_tensor(self, name: str, tensor: Tensor, num_experts: int) -> str | None:
        """Return what is wrong with a router's tensor that was read from a folder, or None.

        ``name`` is its name in the module. The sentence continues after the name, and ends with a
        remedy.
        """
        return None


class Router(nn.Module):
    """Base of modules. ``route`` is called where ``lookahead`` says, by training and serving.

    A router belongs to the layer whose experts it selects, even if it reads elsewhere. Its
    parameters stay in fp32 under bf16 and are never sharded. Raises :class:`ConfigError` if
    ``config`` does not fit ``num_experts``.
    """

    config: RouterConfig
    replays: ClassVar[bool] = False
    """Whether ``route`` follows ``RouterInput.given_TK``. Weights, counts and the values for losses
    then follow from those experts and the router's own scores, with gradient."""

    def __init__(self, config: RouterConfig, num_experts: int) -> None:
        problem = config.problem_with(num_experts)
        if problem is not None:
            raise ConfigError(problem)
        super().__init__()
        self.config = config
        self.k = config.k
        self.num_experts = num_experts
        self.lookahead = config.reads_at()

    def watch(self, gate_statistics: Callable[[], Tensor | None]) -> None:
        """Take the layer's :meth:`MoELayer.gate_statistics`; by default ignore it.

        Keep the bound method itself: copies of a layer then have routers that watch the copy.
        """

    def experts_changed(self) -> None:
        """React to expert weights that were initialised, cast or placed; by default do nothing.

        Called on every rank, outside training steps.
        """

    def route(self, router_input: RouterInput) -> Routing:
        """Choose experts for every row."""
        raise NotImplementedError

    def route_to(self, router_input: RouterInput, experts_TK: Tensor) -> Routing:
        """Visit the given experts instead of choosing: a recorded choice is replayed.

        ``experts_TK`` are logical ids, -1 = none, of any width. Raises :class:`ConfigError` unless
        the router ``replays``, and for ids that do not exist.
        """
        reason = self.why_no_replay()
        if reason is not None:
            raise ConfigError(reason)
        try:
            check_ids(experts_TK, self.num_experts)
        except ValueError as error:
            raise ConfigError(f"the routes do not fit: {error}") from None
        return self.route(replace(router_input, given_TK=experts_TK))

    def why_no_replay(self) -> str | None:
        """Return in one sentence why recorded routes cannot be replayed, or None."""
        if self.replays:
            return None
        return (
            f"router.kind is {self.config.kind}, which cannot replay recorded routes; use "
            "another router."
        )

    def extra_repr(self) -> str:
        """Show the number of experts and what differs from the configuration's defaults."""
        changed = self.config.model_dump(exclude_defaults=True, exclude={"kind", "k"})
        options = "".join(f", {name}={value!r}" for name, value in changed.items())
        return f"k={self.k} of {self.num_experts} experts{options}"

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return what the router adds to the loss; by default nothing.

        ``routing`` is what :meth:`route` returned in training, ``counts`` its counts over the
        global batch. Shares of all ranks must add up to the loss of one process. Raises
        :class:`ConfigError` for a routing of evaluation mode.
        """
        return LayerLosses()

    def initialize(self, name: str, generator: Generator) -> Tensor | None:
        """Return the first values of parameter ``name``; None = those of its shape.

        Matrices are normal with std ``fan_in**-0.5``, vectors one, and names that end in ``bias``
        zero (models/initialize.py). ``generator`` is on the CPU and the same on all ranks.
        """
        return None

    def dropped(self, counts: GlobalCounts) -> int:
        """Return the choices of a step that reached no expert."""
        if "dropped" in counts.extra:
            return int(counts.extra["dropped"])
        if self.config.varies:
            return 0
        return int(counts.num_tokens) * self.k - int(counts.counts_E.sum())

    def after_step(self, counts: GlobalCounts, layers: Sequence[GlobalCounts]) -> None:
        """React to a finished step of training: move a balancing bias, go on with a schedule.

        Called once per step on every rank, with the counts of the global batch; ``layers`` are
        those of all MoE layers in order. Does nothing by default.
        """
