"""A trained parameter, and what a rank keeps to update it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...kernels.values.n_of_m import NOfM, keep_mask, masked
from ...moe.experts.resident import Experts
from ...moe.routers.router import Router
from ...parallel.dense.expert_shards import ExpertShards
from ...parallel.dense.local_part import as_part_of, local_part, whole_shape
from ...parallel.experts.sliced_tensor import SlicedTensor

HEADS = ("lm_head", "classifier")
"""Names of the layers behind the last one."""


@dataclass(slots=True)
class Held:
    """A parameter that trains, this rank's part of its master weight, and its state."""

    name: str
    parameter: nn.Parameter
    master: Tensor
    """fp32 (fp64 for fp64 runs). It shares the parameter's memory if that is as wide."""
    decays: bool
    is_hidden: bool
    """Whether it is a matrix inside a layer, or one for each expert (:func:`hidden_matrices`)."""
    experts: Experts | None
    """The experts that it belongs to, if any."""
    owned: slice | None = None
    """Which slots of experts have their master and state here; None = all."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """By kind, such as ``exp_avg``."""
    steps: Tensor = field(default_factory=lambda: torch.zeros(()))
    """fp32 scalar: the updates that the state has seen."""
    pattern: NOfM | None = None
    """Which weights the parameter has, of the master's; None = all. Then the parameter never shares
    memory with the master."""
    mask: Tensor | None = None
    """Those weights, bool like the master; None = all."""

    @property
    def shares_memory(self) -> bool:
        """Whether the master is the parameter's own memory."""
        return self.master.data_ptr() == self._part.data_ptr()

    @property
    def _part(self) -> Tensor:
        """What of the parameter the master is for."""
        part = local_part(self.parameter)
        return part if self.owned is None else part[self.owned]

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def gradient(self) -> Tensor:
        """The sum over micro-batches and ranks for the master."""
        gradient: Tensor = self.parameter.main_grad  # type: ignore[attr-defined]
        return gradient if self.owned is None else gradient[self.owned]

    def write(self) -> None:
        """Copy the master into the parameter, unless they share memory."""
        if self.mask is not None:
            self._part.copy_(masked(self.master, self.mask))
        elif not self.shares_memory:
            self._part.copy_(self.master)

    def choose_mask(self) -> None:
        """Choose the weights of the parameter anew, from the master as it is."""
        if self.pattern is not None:
            self.mask = keep_mask(self.master, self.pattern)

    def replace(self, tensors: tuple[Tensor, ...]) -> None:
        """Take another master and another state, of another number of slots."""
        assert self.owned is None, "these experts have changed places"
        parameter, master = self.parameter, self.master
        is_its_own = master.data_ptr() == parameter.data_ptr() and master.dtype == parameter.dtype
        master.data, *state = tensors
        self.state = dict(zip(self.state, state, strict=True))
        parameter.data = master.data if is_its_own else master.to(parameter.dtype, copy=True)
        if self.mask is not None:
            self.choose_mask()
            self.write()

    def keyed(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the master as ``weight/NAME`` and the state under topology-free keys."""
        for kind, tensor in {"weight": self.master, **self.state}.items():
            yield from keyed(kind, self.name, self.parameter, tensor, self.experts, self.owned)


def keyed(
    kind: str,
    name: str,
    parameter: Tensor,
    tensor: Tensor,
    experts: Experts | None,
    owned: slice | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``tensor``, which belongs to a parameter, as a checkpoint names it.

    Keys name the logical expert, ``weight/layers.0.mlp.experts.3.fc1``, whichever rank and slot
    holds it.
    """
    if experts is None:
        here = as_part_of(parameter, tensor)
        if here is not None:
            yield f"{kind}/{name}", here
        return
    owner, _, leaf = name.rpartition(".")
    expert_ids = experts.expert_ids if owned is None else experts.expert_ids[owned]
    for expert, part in zip(expert_ids, tensor, strict=True):
        for stored in _stored(experts, leaf, part):
            yield f"{kind}/{owner}.{expert}.{leaf}", stored


def _stored(experts: Experts, leaf: str, tensor: Tensor) -> Iterator[Tensor]:
    """Yield an expert's tensor for a checkpoint, a slice as a part of the whole one."""
    inner_slice = experts.inner_slice
    if inner_slice is None:
        yield tensor
    elif inner_slice.holds(leaf):
        shape = inner_slice.whole_shape(leaf, tensor)
        yield SlicedTensor(shape, inner_slice.pieces(leaf, tensor))


def experts_of(model: nn.Module, name: str) -> Experts | None:
    """Return the experts that a parameter belongs to, if any."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner if isinstance(owner, Experts) else None


def hold_trained(
    model: nn.Module, masters: dict[str, Tensor], shards: ExpertShards | None
) -> list[Held]:
    """Return what trains, without state; ``masters`` has fp32 copies of narrower parameters.

    Of experts, only what ``shards`` gives to this rank.
    """
    hidden = set(hidden_matrices(model))
    found = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = len(whole_shape(parameter)) > 1 and not name.startswith("embed_")
        experts, master, owned = experts_of(model, name), masters.get(name), None
        if shards is not None and experts is not None:
            owned = shards.owned(parameter)
            master = None if master is None else master[owned].clone()  # the rest is freed
        if master is None:
            master = local_part(parameter) if owned is None else parameter.data[owned]
        found.append(
            Held(
                name,
                parameter,
                master,
                decays=is_matrix and not name.endswith("bias"),  # experts' have two dimensions
                is_hidden=name in hidden,
                experts=experts,
                owned=owned,
            )
        )
    return found


def hidden_matrices(model: nn.Module) -> Iterator[str]:
    """Yield the names of matrices inside layers: of projections, MLPs and experts.

    Not embeddings, the head, norms, biases, routers, gates with one output and low-rank updates.
    Experts have one matrix for each slot.
    """
    in_routers = {p for m in model.modules() if isinstance(m, Router) for p in m.parameters()}
    for prefix, module in model.named_modules():
        if isinstance(module, Experts):
            yield from (f"{prefix}.fc1", f"{prefix}.fc2")
        if not isinstance(module, nn.Linear) or prefix.rpartition(".")[2] in HEADS:
            continue
        if module.out_features > 1 and module.weight not in in_routers:
            yield f"{prefix}.weight"
