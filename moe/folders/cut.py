"""Cut the MLPs of a dense folder into experts: each neuron goes to one expert, none is copied.

A gated MLP ``down(act(gate x) * up x)`` is a sum over its neurons. Neuron f is row f of gate and of
up and column f of down, so any split of the neurons gives experts whose outputs add up to the MLP's
(MoEfication, Zhang et al. 2022; D2DMoE, Szatkowski et al. 2024). Neurons with similar gate rows are
active together, so they share an expert.

D model width, F width of the MLP, E experts, f = F / E neurons of an expert.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import ConfigError
from ...kernels.values.activation import Activation
from ..config.model import ModelConfig
from ..config.moe import MOST_EXPERTS, MoEConfig
from ..routers.assignment import balanced_assignment
from ..routers.contribution import Contribution
from ..routers.kmeans_fit import fit_centroids, squared_distances
from .write_weights import WeightSource

MOST_ROUNDS = 4
"""Balanced assignments of a layer. The first begins from k-means, so later ones move few neurons;
for 3,072 neurons and 64 experts one takes about 3 s on one core, and time grows with the cube."""


def check_cut(name: str, dense: ModelConfig, num_experts: int) -> None:
    """Raise :class:`ConfigError` unless a dense model's MLPs can be cut into ``num_experts``."""
    if dense.moe is not None:
        raise ConfigError(
            f"{name} has {dense.moe.num_experts} experts already; give a dense folder."
        )
    assert dense.d_ff is not None, "the configuration was not validated"
    if not 2 <= num_experts <= min(dense.d_ff, MOST_EXPERTS) or dense.d_ff % num_experts:
        raise ConfigError(
            f"experts is {num_experts}, which does not cut the MLP's {dense.d_ff} neurons into "
            f"equal parts; use a divisor of {dense.d_ff} from 2 on."
        )


def cut_config(
    dense: ModelConfig, num_experts: int, activation: Activation, router: Contribution
) -> ModelConfig:
    """Return the configuration of a dense model all of whose MLPs are cut."""
    assert dense.d_ff is not None, "check_cut was not asked"
    moe = MoEConfig(
        num_experts=num_experts,
        d_expert=dense.d_ff // num_experts,
        activation=activation,
        router=router,
    )
    return dense.model_copy(update={"moe": moe})


def cluster_neurons(gate_FD: Tensor, num_experts: int, seed: int = 0) -> Tensor:
    """Return int64 ``[F]``: the neurons of expert 0, of expert 1, ..., those of an expert in order.

    Gate rows are scaled to length 1. k-means finds E clusters; then each round gives every cluster
    exactly F / E rows, with the smallest sum of squared distances (scipy), and takes their means.
    It ends when no row moves. Deterministic for a seed.
    """
    rows_FD = torch.nn.functional.normalize(gate_FD.detach().double(), dim=1)
    centroids_ED = fit_centroids(rows_FD, num_experts, seed)
    expert_F = torch.full((len(rows_FD),), -1, device=rows_FD.device)
    for _ in range(MOST_ROUNDS):
        before_F = expert_F
        expert_F = balanced_assignment(-squared_distances(rows_FD, centroids_ED))
        if torch.equal(before_F, expert_F):
            break
        order_F = expert_F.sort(stable=True).indices
        centroids_ED = rows_FD[order_F].unflatten(0, (num_experts, -1)).mean(dim=1)
    return expert_F.sort(stable=True).indices


class CutWeights:
    """The weights of a dense model, its MLPs as experts; a :class:`.WeightSource`.

    ``dense`` gives the dense model's tensors, the neurons of each MLP in the order of its experts.
    ``routers`` are the router's matrices ``hidden_HD`` and ``norm_EH`` of each layer.
    """

    def __init__(
        self, dense: WeightSource, num_experts: int, routers: Mapping[int, tuple[Tensor, Tensor]]
    ) -> None:
        self._dense, self._num_experts, self._routers = dense, num_experts, routers

    def dense(self, parameter: str) -> Tensor:
        """Return a tensor of the decoder outside the experts."""
        layer, part, matrix = parameter.partition(".mlp.gate.")
        if not part:
            return self._dense.dense(parameter)
        hidden_HD, norm_EH = self._routers[int(layer.removeprefix("layers."))]
        return hidden_HD if matrix == "hidden_HD" else norm_EH

    def expert_part(self, layer: int, expert: int, part: str) -> Tensor:
        """Return an expert's rows of gate or up ``[f, D]``, or columns of down ``[D, f]``."""
        whole = self._dense.dense(f"layers.{layer}.mlp.{part}_proj.weight")
        return whole.chunk(self._num_experts, dim=1 if part == "down" else 0)[expert]
