"""FRUGAL: Adam for some columns in turn, the signs of gradients for the others.

S slots, R rows and C columns of a matrix, P columns with state, F expert width, D model width.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...moe.models.initialize import generator_of
from .adamw import AdamW
from .config import OptimizerConfig
from .held import Held


class FrugalConfig(OptimizerConfig):
    """FRUGAL (Zmushko et al. 2024, arXiv 2411.07837): AdamW with less state.

    In a matrix inside a layer, ``density`` of the columns follow AdamW and have its two moments.
    The others move by the sign of their gradient and have no state. Every ``refresh_steps`` other
    columns take their turn, with new moments. Embeddings, the head, norms, biases, routers and
    low-rank updates follow AdamW.
    """

    kind: Literal["frugal"] = "frugal"
    density: float = Field(default=0.25, gt=0, le=1)
    """Share of a matrix's columns with moments, one column or more; 1 is AdamW."""
    refresh_steps: int = Field(default=200, ge=1)
    """Steps after which other columns get moments."""
    sign_lr_ratio: float = Field(default=1.0, ge=0)
    """Learning rate of the columns without moments, as a share of ``lr``."""

    def identity(self) -> dict[str, Any]:
        """See :meth:`AdamWConfig.identity`."""
        names = {"kind", "density", "refresh_steps"}
        return self.model_dump(mode="json", include=names)


class Frugal:
    """See :class:`~moeyard.training.optimizers.rule.UpdateRule`.

    Each matrix has a fixed shuffled order of its columns, from the seed and its name. Refresh n
    takes the next P of them, around the end. So the columns of a step depend on seed and step
    alone, and in ``1 / density`` refreshes each has its turn.

    Columns are the input's numbers, or the output's for the experts' fc2: always D for experts.
    Ranks that hold rows of a matrix or slices of experts so have all columns.
    """

    def __init__(self, config: FrugalConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._adamw = AdamW(config)
        self._orders: dict[str, Tensor] = {}

    def new_state(self, held: Held) -> dict[str, Tensor]:
        """Return two moments of P columns."""
        shape = list(held.master.shape)
        shape[_dim(held)] = self._num_chosen(held)
        return {kind: held.master.new_zeros(shape) for kind in ("exp_avg", "exp_avg_sq")}

    def steps_seen(self, held: Held, done: int) -> int:
        """Return those since the last refresh."""
        return done if self._has_all(held) else done % self._config.refresh_steps

    def update(self, parameters: Sequence[Held], lr: float, done: int) -> None:
        """Update one matrix after the other: the columns with moments are copied out and in."""
        refresh, since = divmod(done, self._config.refresh_steps)
        for held in parameters:
            if self._has_all(held):
                self._adamw.update([held], lr, done)
                continue
            if since == 0:
                held.steps.zero_()
                for moment in held.state.values():
                    moment.zero_()
            self._update_one(held, lr, self.chosen(held, refresh))

    def chosen(self, held: Held, refresh: int) -> Tensor:
        """Return the columns ``[P]`` that have moments after refresh number ``refresh``."""
        num_columns, num_chosen = held.master.shape[_dim(held)], self._num_chosen(held)
        if held.name not in self._orders:
            generator = generator_of(f"{self._seed}/frugal/{held.name}")
            order = torch.randperm(num_columns, generator=generator)
            self._orders[held.name] = order.to(held.master.device)
        order = self._orders[held.name]
        places = torch.arange(num_chosen, device=order.device) + refresh * num_chosen
        return order[places % num_columns]

    def _update_one(self, held: Held, lr: float, chosen_P: Tensor) -> None:
        master, gradient, dim = held.master, held.gradient, _dim(held)
        decay = self._config.weight_decay
        with_moments = master.index_select(dim, chosen_P)
        gradients = gradient.index_select(dim, chosen_P)
        master.mul_(1 - lr * decay)
        master.add_(gradient.sign(), alpha=-lr * self._config.sign_lr_ratio)
        self._adamw.step([with_moments], [gradients], [held], lr, decay)
        master.index_copy_(dim, chosen_P, with_moments)

    def _has_all(self, held: Held) -> bool:
        return self._num_chosen(held) == held.master.shape[_dim(held)]

    def _num_chosen(self, held: Held) -> int:
        num_columns = held.master.shape[_dim(held)]
        return max(1, round(self._config.density * num_columns))


def _dim(held: Held) -> int:
    """Return the dimension of the columns."""
    return 1 if held.experts is not None and held.leaf == "fc2" else held.master.ndim - 1
