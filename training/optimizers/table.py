"""The kinds of optimizer that ``optimizer.kind`` names."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from ...parallel.dense.expert_shards import ExpertShards
from ...parallel.mesh import Mesh
from .adamw import AdamW, AdamWConfig
from .frugal import Frugal, FrugalConfig
from .muon import Muon, MuonConfig
from .optimizer import MasterOptimizer
from .rule import UpdateRule
from .sparse_experts import SparseExpertsConfig


def _with_kind(values: Any) -> Any:
    """Fill in the kind of a section that names none, as sections of older releases do."""
    if isinstance(values, dict) and "kind" not in values:
        return {"kind": "adamw", **values}
    return values


AnyOptimizer = AdamWConfig | MuonConfig | FrugalConfig
OptimizerSection = Annotated[AnyOptimizer, Field(discriminator="kind"), BeforeValidator(_with_kind)]


def open_optimizer(
    config: AnyOptimizer,
    model: nn.Module,
    masters: dict[str, Tensor],
    mesh: Mesh,
    seed: int,
    shards: ExpertShards | None = None,
    sparse_experts: SparseExpertsConfig | None = None,
) -> MasterOptimizer:
    """Return the optimizer of a run; ``masters`` are fp32 copies of narrower parameters.

    All ranks call it alike. ``shards`` says which experts' state is here; None = that of all.
    ``sparse_experts`` says which weights of experts are in forward; None = all.
    """
    hidden, rest = _for_hidden(config, mesh, seed), AdamW(config)
    return MasterOptimizer(model, masters, hidden, rest, shards, sparse_experts)


def _for_hidden(config: AnyOptimizer, mesh: Mesh, seed: int) -> UpdateRule:
    """Return the rule for matrices inside layers, a line for each kind."""
    match config:
        case AdamWConfig():
            return AdamW(config)
        case MuonConfig():
            return Muon(config, mesh)
        case FrugalConfig():
            return Frugal(config, seed)
