"""A plan as a JSON file: placements of all MoE layers, and which model and ranks they are for."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...errors import ConfigError, DataError
from ...files import read_small_file, replace_text
from ...moe.config.model import LayersConfig
from ...moe.routes.identity import identity_of
from .placement import Placement, Topology

LARGEST_FILE = 1 << 28
Rank = Annotated[int, Field(ge=0)]


class LayerPlan(BaseModel):
    """One MoE layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int = Field(ge=0)
    """Index in the decoder."""
    owner: tuple[Rank, ...]
    """By expert: the rank with its parameters and optimizer state."""
    holders: tuple[tuple[Rank, ...], ...]
    """By expert: the ranks that compute it."""


class PlanFile(BaseModel):
    """All that a plan's file says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["moeyard-placement"] = "moeyard-placement"
    version: Literal[1] = 1
    architecture: str
    """Hash of the model's architecture, as in a route file."""
    num_experts: int = Field(ge=1)
    ranks: int = Field(ge=1)
    ranks_per_node: int = Field(ge=1)
    kind: str
    """The method that made it."""
    layers: tuple[LayerPlan, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        placements = [self.placement_of(layer) for layer in self.layers]
        wrong = [p.num_experts for p in placements if p.num_experts != self.num_experts]
        if wrong:
            raise ValueError(f"a layer has {wrong[0]} experts, not {self.num_experts}")
        assert self.topology.num_ranks == self.ranks
        return self

    @property
    def topology(self) -> Topology:
        """Ranks and nodes that it is for."""
        return Topology(self.ranks, self.ranks_per_node)

    def placement_of(self, layer: LayerPlan) -> Placement:
        """Return the placement of one of ``layers``."""
        return Placement(self.ranks, layer.owner, layer.holders)

    def placements(self) -> dict[int, Placement]:
        """Return the placement of each MoE layer, by its index in the decoder."""
        return {layer.layer: self.placement_of(layer) for layer in self.layers}


def write_plan(path: Path, plan: PlanFile) -> None:
    """Write a plan, whole or not at all; raise :class:`DataError` where that fails."""
    try:
        replace_text(path, json.dumps(plan.model_dump(mode="json")) + "\n")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}; choose another.") from None


def read_plan(
    path: Path, config: LayersConfig | None = None, num_ranks: int | None = None
) -> PlanFile:
    """Return the plan in a file; check it against a model and a number of ranks if given.

    Raises :class:`DataError` for a file that is not a plan, and :class:`ConfigError` for a plan of
    another model or other ranks.
    """
    try:
        values: Any = json.loads(read_small_file(path, LARGEST_FILE))
        plan = PlanFile.model_validate(values)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give a plan.") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "plan"
        raise DataError(
            f"{path} is not a plan ({place}: {first['msg']}); make it with moeyard trace place."
        ) from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not a plan; make it with moeyard trace place.") from None
    if num_ranks is not None and plan.ranks != num_ranks:
        raise ConfigError(
            f"{path} is a plan for {plan.ranks} ranks, but there are {num_ranks}; make it again "
            f"with --ranks {num_ranks}."
        )
    if config is not None and (
        plan.architecture != identity_of(config).architecture
        or [layer.layer for layer in plan.layers] != config.moe_layers
    ):
        raise ConfigError(
            f"{path} is a plan for another model; make it again from routes of this one."
        )
    return plan
