"""Routers that know a token's task (M3ViT; Liang et al. 2022): experts shared, choices not.

T tokens, N tasks, D model width, H width of a task's vector, E experts, K choices, R = N * E.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels.router import choose
from ...kernels.values.choice import ChoiceRule
from .linear import LearnedConfig, project
from .loss_terms import GlobalCounts, LayerLosses, training_sum
from .router import Router, RouterSizes
from .routing import RouterInput, Routing, count_tokens
from .row_facts import RowFact
from .row_numbers import checked
from .variation import squared_variation
from .whole_batch import from_fixed_point, share_of, to_fixed_point

NORM_EPSILON = 1e-6


class Task(LearnedConfig):
    """Scores depend on the task of a token too (M3ViT; Liang et al. 2022).

    Reads ``RouterInput.tasks_T``: ``layer(x, tasks=...)``, or ``Batch.tasks_T``. Scores are a
    softmax, and weights are not renormalized. The released code adds noise and the balance of
    counts to its loss; its runs have no noise, and then counts have no gradient, so both are left
    out here.
    """

    paper: ClassVar[str] = "Liang et al. 2022 (M3ViT)"

    kind: Literal["task"] = "task"
    num_tasks: int = Field(default=2, ge=1, le=65536)
    """Tasks; their numbers begin at 0."""
    form: Literal["gates", "vector"] = "gates"
    """gates: a linear router for each task. vector: one router, which reads the token and a learned
    vector of the task behind it (``norm(linear(gelu(linear(one-hot))))``)."""
    d_task: int = Field(default=64, ge=1, le=65536)
    """Width of a task's vector; only for ``form: vector``."""
    importance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of the squared coefficient of variation of the experts' importance: the summed
    weights of a task's tokens over the global batch, summed over tasks."""

    def build(self, sizes: RouterSizes) -> "TaskRouter":
        """Return the module."""
        return TaskRouter(self, sizes.d_model, sizes.num_experts)

    def architecture(self) -> dict[str, Any]:
        """Return all but the loss, and the width of a task's vector only where there is one."""
        values = super().architecture()
        del values["importance_loss"]
        if self.form == "gates":
            values["d_task"] = None
        return values

    def reads_of_rows(self) -> RowFact:
        """Return that each row needs its task."""
        return "tasks"


class TaskRouter(Router):
    """See :class:`Task`."""

    replays: ClassVar[bool] = True

    def __init__(self, config: Task, d_model: int, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.config: Task = config
        self.d_model = d_model
        self.rule = ChoiceRule(k=config.k, renormalize=False)
        self.task_vector: nn.Sequential | None = None
        shape: tuple[int, ...] = (config.num_tasks, num_experts, d_model)
        if config.form == "vector":
            shape = (num_experts, d_model + config.d_task)
            self.task_vector = nn.Sequential(
                nn.Linear(config.num_tasks, config.d_task),
                nn.GELU(),
                nn.Linear(config.d_task, config.d_task),
                nn.LayerNorm(config.d_task, eps=NORM_EPSILON),
            )
        self.weight = nn.Parameter(torch.empty(shape))
        """``[N, E, D]``, or ``[E, D + H]``."""
        nn.init.normal_(self.weight, std=shape[-1] ** -0.5)

    def route(self, router_input: RouterInput) -> Routing:
        """Choose the k best experts of each row for its task."""
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        if router_input.tasks_T is None:
            raise ConfigError(
                "router.kind is task, which reads each token's task; pass tasks to the layer."
            )
        last = self.config.num_tasks - 1
        tasks_T = checked(router_input.tasks_T, valid_T, "tasks", last).long()
        logits_TE = self.logits(x_TD, tasks_T)
        choices = choose(logits_TE, None, valid_T, self.rule, False, given_TK=router_input.given_TK)
        routing = Routing(
            experts_TK=choices.experts_TK,
            weights_TK=choices.weights_TK,
            counts_E=choices.counts_E,
            num_tokens=count_tokens(valid_T, choices.experts_TK),
        )
        if self.training:
            importance_NE = self._importance(routing, tasks_T)
            routing.extras["importance_NE"] = importance_NE
            routing.extra_counts["importance_NE"] = to_fixed_point(importance_NE)
        return routing

    def logits(self, x_TD: Tensor, tasks_T: Tensor) -> Tensor:
        """Return each row's score for every expert, ``[T, E]``."""
        if self.task_vector is None:
            all_logits_TR = project(x_TD, self.weight.flatten(0, 1))
            logits_TNE = all_logits_TR.unflatten(1, (-1, self.num_experts))
            index_T1E = tasks_T.view(-1, 1, 1).expand(-1, 1, self.num_experts)
            return logits_TNE.gather(1, index_T1E).squeeze(1)
        # The product of the pair is the sum of both parts' products.
        of_tokens_ED, of_tasks_EH = self.weight.split([self.d_model, self.config.d_task], dim=1)
        dtype, device = self.weight.dtype, self.weight.device
        one_hot_NN = torch.eye(self.config.num_tasks, dtype=dtype, device=device)
        with torch.autocast(x_TD.device.type, enabled=False):
            vectors_NH: Tensor = self.task_vector(one_hot_NN)
        return project(x_TD, of_tokens_ED) + project(vectors_NH, of_tasks_EH)[tasks_T]

    def _importance(self, routing: Routing, tasks_T: Tensor) -> Tensor:
        """Return ``[N, E]``: the summed weights of each expert's tokens, by task."""
        experts_TK, weights_TK = routing.experts_TK, routing.weights_TK
        weights_TK = torch.where(experts_TK >= 0, weights_TK, 0)
        ids_TK = experts_TK.clamp(min=0).long()
        gates_TE = weights_TK.new_zeros(len(tasks_T), self.num_experts)
        gates_TE = gates_TE.scatter(1, ids_TK, weights_TK)
        numbers_N = torch.arange(self.config.num_tasks, device=tasks_T.device)
        is_of_task_NT = (tasks_T == numbers_N.unsqueeze(1)).to(gates_TE)
        with torch.autocast(tasks_T.device.type, enabled=False):
            return is_of_task_NT @ gates_TE

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return this rank's share of the importance loss."""
        here_NE = training_sum(routing, "importance_NE")
        whole_NE = from_fixed_point(counts.extra["importance_NE"], here_NE.dtype)
        part = routing.num_tokens.to(here_NE) / counts.num_tokens.clamp(min=1)
        share = share_of(variation, here_NE, whole_NE, part)
        return LayerLosses((self.config.importance_loss * share,))


def variation(values_NE: Tensor) -> Tensor:
    """Return the sum over tasks of the squared coefficient of variation."""
    return torch.stack([squared_variation(values_E) for values_E in values_NE]).sum()
