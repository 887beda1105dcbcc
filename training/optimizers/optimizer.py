"""The optimizer of a run: fp32 master weights, and a rule for each parameter."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...parallel.dense.expert_shards import ExpertShards
from ...parallel.dense.local_part import flat_part, local_part
from .expert_exchange import ExpertExchange
from .held import Held, experts_of, hold_trained, keyed
from .rule import UpdateRule
from .sparse_experts import ExpertMasks, SparseExpertsConfig


class MasterOptimizer:
    """Reads ``parameter.main_grad`` and writes parameters of any precision.

    ``masters`` holds the fp32 copies of narrower parameters; others are their own masters. Matrices
    inside layers follow the rule ``hidden``, all others ``rest``. Frozen parameters do not change.
    With ``shards`` a rank updates the experts that it owns, and ranks exchange the new weights.
    With ``sparse_experts`` the parameters of experts have some weights of their masters, the others
    are zeros.
    """

    def __init__(
        self,
        model: nn.Module,
        masters: dict[str, Tensor],
        hidden: UpdateRule,
        rest: UpdateRule,
        shards: ExpertShards | None = None,
        sparse_experts: SparseExpertsConfig | None = None,
    ) -> None:
        self._model, self._shards = model, shards
        self._held = hold_trained(model, masters, shards)
        self._exchange = ExpertExchange(model, self._held)
        self.masks: ExpertMasks | None = None
        """Which weights of experts are in forward, if not all."""
        if sparse_experts is not None:
            self.masks = ExpertMasks(sparse_experts, self._held)
        matrices = [held for held in self._held if held.is_hidden]
        others = [held for held in self._held if not held.is_hidden]
        self._parts: list[tuple[UpdateRule, list[Held]]] = [(hidden, matrices), (rest, others)]
        for rule, parameters in self._parts:
            for held in parameters:
                held.state = rule.new_state(held)
                held.steps = torch.zeros((), dtype=torch.float32, device=held.master.device)
        self._done = 0
        """Steps of the run."""
        if self.masks is not None:
            self.masks.choose(0)
            self._write()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update all parameters from their main gradients."""
        if self.masks is not None:
            self.masks.decay()
        for rule, parameters in self._parts:
            rule.update(parameters, lr, self._done)
        self._done += 1
        self._exchange.run(self._done)
        if self.masks is not None:
            self.masks.follow(self._done)
        self._write()

    def state_of(self, parameter: nn.Parameter) -> tuple[Tensor, ...]:
        """Return a parameter's master weight and its state."""
        held = self._find(parameter)
        return held.master, *held.state.values()

    def replace_state(self, parameter: nn.Parameter, state: tuple[Tensor, ...]) -> None:
        """Give a parameter what :meth:`state_of` returns, of another number of slots."""
        self._find(parameter).replace(state)

    def set_steps(self, done: int) -> None:
        """Say how many steps the run has done."""
        self._done = done
        for rule, parameters in self._parts:
            for held in parameters:
                held.steps.fill_(rule.steps_seen(held, done))

    def restore_parameters(self) -> None:
        """Copy freshly loaded masters into the parameters, those of other ranks too, after
        :meth:`set_steps`; all ranks call it."""
        for held in self._held:
            part = flat_part(held.parameter)
            if part is not None:  # in a step, DeepSpeed does it
                part.refresh()
        if self.masks is not None:
            self.masks.choose(self._done)
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        """Copy masters into the parameters, those of experts on all ranks that hold them."""
        for held in self._held:
            held.write()
        if self._shards is not None:
            self._shards.share(h.parameter for h in self._held if h.owned is not None)

    def named_tensors(self, has_frozen: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield every master weight, state and buffer under topology-free keys.

        ``has_frozen`` includes frozen weights, so that a checkpoint is complete.
        """
        for held in self._held:
            yield from held.keyed()
        for name, parameter in self._model.named_parameters():
            if has_frozen and not parameter.requires_grad:
                owner = experts_of(self._model, name)
                yield from keyed("weight", name, parameter, local_part(parameter), owner)
        for name, buffer in self._model.named_buffers():
            yield f"buffer/{name}", buffer

    def _find(self, parameter: nn.Parameter) -> Held:
        return next(held for held in self._held if held.parameter is parameter)
