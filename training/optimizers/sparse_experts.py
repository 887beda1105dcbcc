"""N:M experts in training by SR-STE (Zhou et al. 2021, arXiv 2102.04010).

Forward and backward see ``mask * W``: the parameters of routed experts have zeros where a weight is
not among the N largest of its group. The masters keep all weights. The gradient of ``mask * W`` is
taken as that of W (straight through), so a weight without a part in forward still learns, and may
come back. Those weights also decay: their gradient gets ``decay * W``, once in each step.

The masks follow from the masters alone, so checkpoints need none.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from pydantic import Field, model_validator

from ...kernels.values.n_of_m import NOfM, masked
from ...moe.config.moe import MoEConfig
from ...parallel.mesh import Mesh
from ..section import Section
from .held import Held

MOST_M = 32


class SparseExpertsConfig(Section):
    """Routed experts that keep N of each M consecutive weights, along a matrix's inputs."""

    n: int = Field(default=2, ge=1)
    """Weights of a group that stay: the largest, of equal ones the first."""
    m: int = Field(default=4, ge=2, le=MOST_M)
    """Weights of a group. 2 of 4 is what ``moeyard convert --dtype 2:4`` packs."""
    decay: float = Field(default=2e-4, ge=0)
    """The gradient of a weight that does not stay gets this much of the weight, once in each step,
    after gradients were clipped. Adam divides it by its own scale, as it divides gradients."""
    start: int = Field(default=0, ge=0)
    """Steps with all weights before the first one with masks."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.n >= self.m:
            raise ValueError(
                f"n is {self.n} and m is {self.m}; n must be smaller, such as 2 of 4, or leave "
                "sparse_experts out."
            )
        return self

    @property
    def pattern(self) -> NOfM:
        """N and M."""
        return NOfM(self.n, self.m)

    def identity(self) -> dict[str, int]:
        """Return what decides which weights forward sees; a resumed run must have the same."""
        return {"n": self.n, "m": self.m, "start": self.start}


class Run(Protocol):
    """A run's configuration, as far as masks are concerned."""

    @property
    def train(self) -> Any:
        """The loop."""

    @property
    def model(self) -> Any:
        """The model."""

    @property
    def parallel(self) -> Any:
        """How ranks share the work."""


def problem_with_sparse_experts(run: Run) -> str | None:
    """Return why the experts of a run cannot be N:M as it says, or None."""
    sparse: SparseExpertsConfig | None = run.train.sparse_experts
    if sparse is None:
        return None
    moe: MoEConfig | None = run.model.moe
    if moe is None:
        return "train.sparse_experts is given, but the model has no experts; leave it out."
    if run.train.parameters != "all":
        return (
            f"train.sparse_experts is given, but train.parameters is {run.train.parameters}, and "
            "experts do not train; leave it out or train all."
        )
    inner, slices = moe.d_expert, run.parallel.expert_tp
    if run.model.d_model % sparse.m or inner % (sparse.m * slices):
        of_slices = "" if slices == 1 else f" (in each of {slices} slices of parallel.expert_tp)"
        return (
            f"train.sparse_experts.m is {sparse.m}, which must divide model.d_model = "
            f"{run.model.d_model} and model.moe.d_expert = {inner}{of_slices}; choose another m."
        )
    return None


class ExpertMasks:
    """The masks of the experts of one run, on one rank."""

    def __init__(self, config: SparseExpertsConfig, trained: Sequence[Held]) -> None:
        self._config = config
        self._held = [held for held in trained if held.experts is not None and held.is_hidden]
        self._device = trained[0].master.device
        self._are_shared_out = any(held.owned is not None for held in trained)
        for held in self._held:
            if held.shares_memory:
                held.master = held.master.clone()  # only the parameter gets zeros
            held.pattern = config.pattern
        self._flips: torch.Tensor | None = None

    def choose(self, done: int) -> None:
        """Choose the masks of the masters as they are, after ``done`` steps of the run."""
        self._flips = None
        if done >= self._config.start:
            for held in self._held:
                held.choose_mask()

    @torch.no_grad()
    def decay(self) -> None:
        """Add what lets weights without a part in forward decay to the clipped gradients."""
        for held in self._held:
            if held.mask is not None:
                held.gradient.add_(masked(held.master, ~held.mask), alpha=self._config.decay)

    def follow(self, done: int) -> None:
        """Choose masks again after the update of step ``done`` - 1, and count what changed."""
        before = [held.mask for held in self._held]
        self.choose(done)
        changed = [
            (held.mask ^ mask).sum()
            for held, mask in zip(self._held, before, strict=True)
            if held.mask is not None and mask is not None
        ]
        self._flips = torch.stack(changed).sum() if changed else None

    def record(self, mesh: Mesh) -> dict[str, int]:
        """Return what a record says: how many weights left or joined forward in the last step.

        All ranks call it.
        """
        flips = torch.zeros((), dtype=torch.int64, device=self._device)
        if self._flips is not None:
            flips += self._flips
        total = int(mesh.sum(flips))
        replicas = mesh.dp_size // (mesh.ep_size * mesh.expert_tp_size)
        return {"mask_flips": total if self._are_shared_out else total // replicas}


def stored_pattern(state: Mapping[str, Any]) -> NOfM | None:
    """Return N and M of a checkpoint's experts, from what :meth:`SparseExpertsConfig.identity`
    left in it; None where all weights are in forward."""
    sparse = state.get("sparse_experts")
    if sparse is None or state["step"] < sparse["start"]:
        return None
    return NOfM(sparse["n"], sparse["m"])
