"""The ``parallel`` section of a run: how ranks share the work."""

from typing import Annotated, Literal

from pydantic import Field

from ..kernels.experts import Backend
from ..parallel.experts.open_path import PathKind
from .section import Section


class CopiesConfig(Section):
    """Copies of busy experts on more ranks, for a step (Hecate). Numbers do not change."""

    max_bytes: int = Field(default=1 << 30, ge=1)
    """Memory of a rank for copies and their gradients, over all layers."""
    experts: int | None = Field(default=None, ge=1)
    """Different experts of a layer that may be copied in a step (Hecate's t): those that travel
    while other work runs. Null = as many as memory holds."""
    rematerialize: bool = False
    """Keep the copies of two layers only, and send their weights again in backward: more copies of
    a layer fit."""
    when: Literal["faster", "always"] = "faster"
    """``faster`` measures links, experts and copies at the start, and copies an expert where a step
    is expected to get faster (Hecate's calibration). ``always`` copies where rows get more even.
    Copies change the order of sums, so two runs with ``faster`` may differ in rounding."""
    window: int = Field(default=5, ge=1)
    """Steps whose mean load says which experts will be busy."""
    reshard_every: int = Field(default=0, ge=0)
    """Steps after which experts move to ranks that suit the load, with their optimizer state; a
    rank keeps its number of experts over all layers. 0 = never."""
    plan: str | None = None
    """A file of ``moeyard trace place --out``, whose owners the experts have at the start. Its
    number of ranks must be ``parallel.ep``, and each rank must own equally many experts over all
    layers, as ``--kind hecate`` gives them. Copies follow the load of the run. Only rank 0 reads
    it. A resumed run has the owners of its checkpoint. Null = neighbouring experts share a rank."""


class DeepSpeedConfig(Section):
    """DeepSpeed's ZeRO for dense parameters. Experts, gradient clipping and the optimizer are those
    of every other run."""

    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What ranks split among them: nothing (0), the optimizer's state (1), gradients too (2),
    weights too (3). Null = the file's stage, or 2."""
    offload_optimizer: bool | None = None
    """Keep master weights and moments of dense parameters in host memory, and update them there.
    From stage 1. Null = as the file says, or false."""
    config: str | None = None
    """A DeepSpeed JSON file, such as for ``deepspeed --deepspeed_config``. Its buckets, thresholds,
    offloading and printing are used. What the run configures itself, such as batch sizes, clipping,
    optimizer and precision, must be equal there, ``auto`` or left out."""


class ParallelConfig(Section):
    """How ranks share the work."""

    ep: int = Field(default=1, ge=1)
    """Expert-parallel degree: ranks that split the experts among them."""
    expert_tp: int = Field(default=1, ge=1)
    """Neighbouring ranks that split the inner width of every expert among them (expert tensor
    parallelism), for experts too large for a rank. Each gets the rows of all, and their partial
    results are summed. Ranks are a multiple of ``ep * expert_tp``; dense parameters are on all
    ranks as before. Checkpoints do not depend on it."""
    pp: int = Field(default=1, ge=1)
    """Stages into which the layers are split (pipeline parallelism), as many in each. Micro-batches
    pass through them one after the other, so ``train.accumulation`` should be several times as
    large. Ranks are a multiple of ``pp``; those of a stage are neighbours, share its batch, and
    split its experts by ``ep``. Numbers and checkpoints do not depend on it."""
    pp_schedule: Literal["gpipe", "1f1b"] = "1f1b"
    """In which order stages run forward and backward. ``gpipe``: all forward passes, then all
    backward passes. ``1f1b``: in turns, as soon as they can; a stage keeps the activations of at
    most ``pp`` micro-batches. It needs at least ``pp`` of them."""
    path: PathKind | Literal["auto"] = "all_to_all"
    """How rows travel to their experts. ``all_to_all``: a copy to each rank that has an expert of
    the row. ``all_gather``: a copy to every rank. ``hierarchical``: a copy to each node that has
    one, between ranks of equal number, and from there to the ranks of the node. ``padded``: a copy
    to each expert, for routers whose capacity limits an expert's rows. As many rows as it allows
    travel, so ranks exchange no counts and a GPU's host waits for none; no choice is lost.
    ``auto`` takes the faster of all_to_all and hierarchical, with ``chunks: auto``."""
    chunks: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Messages into which a layer's rows are cut on their way to the experts (FSMoE). The experts
    compute one while the next arrives. 1 = none overlap. ``auto`` measures links and experts at the
    start, lets what should be fastest of 1, 2, 4 and 8, also for backward, take turns in about the
    first 30 steps, and keeps what is. Sums over chunks are rounded by the number of chunks, so two
    runs with ``auto`` may differ in rounding."""
    profile_every: int | None = Field(default=None, ge=1)
    """Steps after which ``auto`` measures again, about a second each time; null = at the start
    only."""
    backward_chunks: int | None = Field(default=None, ge=1)
    """The same for gradients in backward; null = ``chunks``."""
    ranks_per_node: int | None = Field(default=None, ge=1)
    """Neighbouring ranks with a fast link between them, for ``hierarchical``; null = those that
    torchrun started on a host."""
    copies: CopiesConfig | None = None
    """Copies of busy experts; null = experts are on their ranks only."""
    dense: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """How ranks hold dense parameters and their optimizer state: whole on every rank (ddp), split
    over all ranks and gathered layer by layer (fsdp), or as DeepSpeed's ZeRO does (deepspeed, which
    the extra ``moeyard[deepspeed]`` installs). Numbers and checkpoints are the same. One process
    has nothing to split, so it takes ddp for fsdp and refuses deepspeed."""
    deepspeed: DeepSpeedConfig | None = None
    """Options of ``dense: deepspeed``; null = all defaults."""
    gradient_slices: Literal["auto"] | None = None
    """When dense gradients are summed over hosts. Null: as soon as DDP has a bucket of them, next
    to the rows of MoE layers. ``auto``: in slices, in the parts of backward where the link between
    nodes waits (FSMoE), and the rest at its end. It measures for five steps, plans, tries the plan
    next to sending small buckets at once for ten more, and keeps what is faster. It needs
    ``dense: ddp`` and ranks on CPUs. Where all ranks are on one host, they sum in its memory, and
    this has no effect. Sums over slices are rounded by their sizes, so two runs may differ in
    rounding."""
    backend: Backend = "auto"
    """Expert kernels. ``auto`` is ``triton`` on a GPU and ``cpp`` on a CPU if these run and pass
    their self-check, otherwise ``torch``. ``reference`` is slow and takes fp64. Frozen experts
    always use torch's matrix products."""
    timeout_s: float = Field(default=300, gt=0)
    """A collective that waits longer ends the run."""

    def problem_with_path(self) -> str | None:
        """Return which option of paths has no effect, or None."""
        if self.profile_every is not None and self.chunks != "auto":
            return (
                f"parallel.profile_every is {self.profile_every}, but parallel.chunks is "
                f"{self.chunks}, so nothing is measured; use auto or leave profile_every out."
            )
        if self.path == "auto" and self.chunks != "auto":
            return (
                f"parallel.path is auto, but parallel.chunks is {self.chunks}, so nothing is "
                "measured; set parallel.chunks to auto or name a path."
            )
        if self.backward_chunks is not None and self.chunks == "auto":
            return (
                f"parallel.backward_chunks is {self.backward_chunks}, but parallel.chunks is auto, "
                "which chooses both; leave backward_chunks out or give chunks a number."
            )
        problem = self._problem_with_gradients()
        if problem is not None:
            return problem
        if self.path == "padded":
            for name in ("chunks", "backward_chunks", "copies"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    return (
                        f"parallel.{name} is {value}, but parallel.path is padded, which sends a "
                        f"layer's rows at once and to owners; leave parallel.{name} out or use "
                        "all_to_all."
                    )
        if self.expert_tp > 1:
            problem = self._problem_with_slices()
            if problem is not None:
                return problem
        if self.ep > 1:
            return None
        ways = ("chunks", "backward_chunks", "gradient_slices") if self.expert_tp == 1 else ()
        for name in ("path", *ways, "copies"):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                return (
                    f"parallel.{name} is {value}, but parallel.ep is 1, so no row travels to its "
                    f"experts; raise parallel.ep or leave parallel.{name} out."
                )
        return None

    def _problem_with_gradients(self) -> str | None:
        """Return which option does not go with ``gradient_slices``, or None."""
        if self.gradient_slices is None:
            return None
        given = f"parallel.gradient_slices is {self.gradient_slices}"
        if self.dense != "ddp":
            return (
                f"{given}, but parallel.dense is {self.dense}, which sums them at times of its "
                "own; set parallel.dense to ddp or leave gradient_slices out."
            )
        if self.path == "padded":
            return (
                f"{given}, but parallel.path is padded, which has no place for them; use "
                "all_to_all or leave gradient_slices out."
            )
        return None

    def _problem_with_slices(self) -> str | None:
        """Return which option does not go with ``expert_tp``, or None."""
        wrong = {
            "path": self.path == "padded",
            "chunks": self.chunks == "auto",
            "copies": self.copies is not None,
        }
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            return (
                f"parallel.{name} is {getattr(self, name)}, which does not know slices of experts, "
                f"but parallel.expert_tp is {self.expert_tp}; leave one of them out."
            )
        return None
