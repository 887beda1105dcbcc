"""Several tasks on images, each with its own targets: the sum of their losses.

P passes (an image and a task), N passes of one task.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels.values.memory import to_device
from ...moe.config.model import LayersConfig
from ...moe.config.vision_tasks import AnyTask, ClassesTask
from ...moe.config.vit import ViTConfig
from ...moe.image_batch import image_batch
from ...moe.models.vit import ViT
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..data.image_store import ImageRows
from ..data.images import ImageData, build_image_data
from ..stop import StopRequest
from .objective import HeldOut, MicroBatchLoss
from .sized import SizedObjective
from .task_measures import measure_of, task_loss


@dataclass(slots=True)
class TasksBatch(MicroBatchLoss):
    """The result of one micro-batch, with what the model said outside of training."""

    losses: tuple[Tensor, ...]
    """By task: the summed losses of its passes, unweighted."""
    told: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """By task: answers and targets; empty in training."""


class TasksLoss(nn.Module):
    """The weighted sum of tasks' losses.

    ``numbers`` has, for each task that gives an image a label, the head's rows of the data's
    labels.
    """

    def __init__(self, vit: ViT, numbers: dict[str, list[int]]) -> None:
        super().__init__()
        self.vit = vit
        self._numbers = {name: torch.tensor(rows) for name, rows in numbers.items()}

    def forward(self, rows: ImageRows) -> TasksBatch:
        """Score the passes of ``rows``. Every head runs, if only on no rows: ranks stay alike."""
        config, here = self.vit.config, self.vit.device
        batch = image_batch(rows.pixels_PCHW, rows.tasks_P, config.num_rows, rows.draw_keys)
        output = self.vit(batch.to(here))
        hidden_PLD = output.hidden_TD.unflatten(0, (-1, config.num_rows))
        losses, told = [], []
        for task, places_N, target in zip(config.tasks, rows.places, rows.targets, strict=True):
            hidden_NLD = hidden_PLD.index_select(0, to_device(places_N, here))
            answer = self.vit.answer(hidden_NLD.flatten(0, 1), task)
            target = to_device(self._of_head(task, target), here)
            losses.append(task_loss(task, answer, target).sum())
            if not self.training:
                told.append((answer, target))
        weighted = [
            loss * (task.loss_weight * scale)
            for task, loss, scale in zip(config.tasks, losses, rows.scales, strict=True)
        ]
        total = torch.stack(weighted).sum()
        detached = tuple(loss.detach() for loss in losses)
        return TasksBatch(total, len(rows.tasks_P), output.routings, detached, told)

    def _of_head(self, task: AnyTask, target: Tensor) -> Tensor:
        """Return labels of images as rows of the head."""
        return self._numbers[task.name][target] if isinstance(task, ClassesTask) else target


class TasksObjective(SizedObjective[ViT]):
    """Each image has a target for some of the model's tasks, or for all."""

    model_kinds = ("vit",)
    data: ImageData

    @classmethod
    def open_data(
        cls, config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
    ) -> ImageData:
        """Read the images and hold a part out."""
        return build_image_data(config, folder, mesh, stop)

    def complete_model(self, model: LayersConfig) -> LayersConfig:
        """Give tasks the labels of the data, unless their own include them.

        Raises :class:`ConfigError` where a task's ``labels`` lack one.
        """
        assert isinstance(model, ViTConfig), "check() compares the kinds"
        return model.model_copy(update={"tasks": tuple(map(self._with_labels, model.tasks))})

    def _with_labels(self, task: AnyTask) -> AnyTask:
        if not isinstance(task, ClassesTask):
            return task
        labels = self.data.train.labels[task.name]
        missing = [label for label in labels if label not in task.labels]
        if not missing:
            return task
        if task.labels:
            raise ConfigError(
                f"the task {task.name!r} of model.tasks has no label {missing[0]!r}, which is one "
                "of the data; add it, or leave its labels out."
            )
        return task.model_copy(update={"labels": tuple(labels)})

    def module(self, decoder: ViT) -> nn.Module:
        """Return :class:`TasksLoss`."""
        self._tasks = decoder.config.tasks
        numbers = {
            task.name: [task.labels.index(label) for label in self.data.train.labels[task.name]]
            for task in self._tasks
            if isinstance(task, ClassesTask)
        }
        return TasksLoss(decoder, numbers)

    def batch(self, step: int, rows: range, device: torch.device) -> ImageRows:
        """Return some images of the global batch, on the host: the module moves them."""
        return self.data.train.of_step(step, rows)

    @property
    def window_length(self) -> int:
        """Return the rows of an image that has a target for every task."""
        model = self.config.model
        assert isinstance(model, ViTConfig), "check() compares the kinds"
        return model.num_rows * len(model.tasks)

    def divisor(self, step: int) -> int:
        """Return the images of the global batch; the scales of the tasks make sums means."""
        return self.config.train.batch_sequences

    def evaluate(self, module: nn.Module, mesh: Mesh) -> HeldOut:
        """Score ``eval_sequences`` held-out images, split over the ranks.

        ``eval_loss`` is the weighted sum of the mean losses of the tasks that have a target there.
        """
        held_out = self.data.held_out
        measures = [measure_of(task) for task in self._tasks]
        sums_T2 = torch.zeros(len(measures), 2, dtype=torch.float64)  # loss, passes

        def part_of(images: Sequence[int]) -> MicroBatchLoss:
            part: TasksBatch = module(held_out.rows(images))
            for measure, told, loss, sums_2 in zip(
                measures, part.told, part.losses, sums_T2, strict=True
            ):
                sums_2 += torch.tensor([float(loss), len(told[0])], dtype=torch.float64)
                measure.add(*told)
            return part

        self.score(part_of, module, len(held_out), mesh)
        losses_T = dict(zip(self._tasks, mesh.sum(sums_T2).tolist(), strict=True))
        found: dict[str, float] = {}
        for (task, (loss, passes)), measure in zip(losses_T.items(), measures, strict=True):
            sums = mesh.sum(measure.sums)
            if not passes:  # by chance none of the chosen images has a target
                continue
            found["eval_loss"] = found.get("eval_loss", 0.0) + task.loss_weight * loss / passes
            found[f"eval_loss_{task.name}"] = loss / passes
            found[measure.name] = measure.value(sums)
        return HeldOut(found, int(sum(passes for _, passes in losses_T.values())))
