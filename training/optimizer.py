"""AdamW on fp32 master weights."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..moe.experts.resident import Experts
from ..parallel.dense.local_part import as_part_of, flat_part, local_part, whole_shape
from ..parallel.experts.sliced_tensor import SlicedTensor
from .optimizer_config import OptimizerConfig


class MasterAdamW:
    """AdamW reading ``parameter.main_grad`` and writing parameters of any precision.

    ``masters`` holds the fp32 copies of narrower parameters; others are their own masters.
    Matrices decay; norms, biases and embeddings do not. Frozen parameters do not change.
    """

    def __init__(
        self, model: nn.Module, masters: dict[str, Tensor], config: OptimizerConfig
    ) -> None:
        self._model = model
        self._pairs: list[tuple[str, nn.Parameter, Tensor]] = []
        decayed: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            master = masters.get(name, local_part(parameter))
            self._pairs.append((name, parameter, master))
            is_matrix = len(whole_shape(parameter)) > 1 and "embed_tokens" not in name
            is_matrix = is_matrix and not name.endswith("bias")  # experts' have two dimensions
            (decayed if is_matrix else others).append(master)
        self._adam = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        for _, _, master in self._pairs:
            self._adam.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def step(self, lr: float) -> None:
        """Update all parameters from their main gradients."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        for _, parameter, master in self._pairs:
            master.grad = parameter.main_grad  # type: ignore[attr-defined]
        self._adam.step()
        for _, parameter, master in self._pairs:
            master.grad = None
            _write(parameter, master)

    def state_of(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
        """Return a parameter's master weight and its two moments."""
        master = next(master for _, p, master in self._pairs if p is parameter)
        state = self._adam.state[master]
        return master, state["exp_avg"], state["exp_avg_sq"]

    def replace_state(self, parameter: nn.Parameter, state: tuple[Tensor, Tensor, Tensor]) -> None:
        """Give a parameter another master weight and moments, of another number of slots."""
        master, _, _ = self.state_of(parameter)
        is_its_own = master.data_ptr() == parameter.data_ptr() and master.dtype == parameter.dtype
        adam = self._adam.state[master]
        master.data, adam["exp_avg"], adam["exp_avg_sq"] = state
        parameter.data = master.data if is_its_own else master.to(parameter.dtype)

    def set_steps(self, steps: int) -> None:
        """Tell Adam how many updates its moments have seen."""
        for state in self._adam.state.values():
            state["step"].fill_(steps)

    def restore_parameters(self) -> None:
        """Copy freshly loaded masters into the parameters; all ranks call this."""
        for _, parameter, master in self._pairs:
            part = flat_part(parameter)
            if part is None:
                _write(parameter, master)
            else:
                part.refresh()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every master weight, moment and buffer under topology-free keys.

        Keys name the logical expert, ``weight/layers.0.mlp.experts.3.fc1``, whichever rank and
        slot holds it. Frozen weights are included, so that a checkpoint is complete.
        """
        for name, parameter, master in self._pairs:
            state = self._adam.state[master]
            yield from self._keyed("weight", name, parameter, master)
            for kind in ("exp_avg", "exp_avg_sq"):
                yield from self._keyed(kind, name, parameter, state[kind])
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                yield from self._keyed("weight", name, parameter, local_part(parameter))
        for name, buffer in self._model.named_buffers():
            yield f"buffer/{name}", buffer

    def _keyed(
        self, kind: str, name: str, parameter: Tensor, tensor: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        owner_name, _, leaf = name.rpartition(".")
        owner = self._model.get_submodule(owner_name)
        if isinstance(owner, Experts):
            for slot, expert in enumerate(owner.expert_ids):
                for part in _stored(owner, leaf, tensor[slot]):
                    yield f"{kind}/{owner_name}.{expert}.{leaf}", part
            return
        here = as_part_of(parameter, tensor)
        if here is not None:
            yield f"{kind}/{name}", here


def _stored(owner: Experts, leaf: str, tensor: Tensor) -> Iterator[Tensor]:
    """Yield an expert's tensor for a checkpoint, a slice as a part of the whole one."""
    inner_slice = owner.inner_slice
    if inner_slice is None:
        yield tensor
    elif inner_slice.holds(leaf):
        shape = inner_slice.whole_shape(leaf, tensor)
        yield SlicedTensor(shape, inner_slice.pieces(leaf, tensor))


def _write(parameter: nn.Parameter, master: Tensor) -> None:
    part = local_part(parameter)
    if master.data_ptr() != part.data_ptr():
        part.copy_(master)
