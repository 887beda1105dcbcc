"""Losses and held-out measures of vision tasks. N passes, C classes or channels, H x W pixels."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from ...moe.config.vision_tasks import AnyTask, ClassesTask, PixelClassesTask
from ..data.image_targets import NO_CLASS

EACH = (1, 2)
"""Height and width of a map."""


def task_loss(task: AnyTask, answer: Tensor, target: Tensor) -> Tensor:
    """Return the loss of each pass, ``[N]``: of a label, or the mean over pixels with a target.

    Cross-entropy in nats for classes, squared error for values.
    """
    answer = answer.to(torch.promote_types(answer.dtype, torch.float32))
    if isinstance(task, ClassesTask):
        return F.cross_entropy(answer, target.long(), reduction="none")
    if isinstance(task, PixelClassesTask):
        classes_NHW = target.long()
        losses_NHW = F.cross_entropy(answer, classes_NHW, reduction="none", ignore_index=NO_CLASS)
        return losses_NHW.sum(dim=EACH) / (classes_NHW != NO_CLASS).sum(dim=EACH)
    errors_NHWC, is_there_NHWC = _errors(answer, target)
    return errors_NHWC.square().sum(dim=(1, 2, 3)) / is_there_NHWC.sum(dim=(1, 2, 3))


def _errors(values_NCHW: Tensor, target_NHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Return errors, 0 where there is no target, and where there is one."""
    is_there_NHWC = ~target_NHWC.isnan()
    wanted_NHWC = target_NHWC.nan_to_num().to(values_NCHW.dtype)
    errors_NHWC = values_NCHW.permute(0, 2, 3, 1) - wanted_NHWC
    return torch.where(is_there_NHWC, errors_NHWC, 0), is_there_NHWC


class Measure(ABC):
    """A held-out measure: sums over passes, and a value of the sums of all ranks."""

    name: str
    sums: Tensor
    """fp64."""

    @abstractmethod
    def add(self, answer: Tensor, target: Tensor) -> None:
        """Add the answers of some passes."""

    @abstractmethod
    def value(self, sums: Tensor) -> float:
        """Return the measure of summed ``sums``."""


class ClassCounts(Measure):
    """How often each class (row) was said to be each (column): accuracy, or mean IoU of pixels."""

    def __init__(self, task: AnyTask, num_classes: int) -> None:
        self._is_of_pixels = isinstance(task, PixelClassesTask)
        self.name = f"eval_{'miou' if self._is_of_pixels else 'accuracy'}_{task.name}"
        self._num_classes = num_classes
        self.sums = torch.zeros(num_classes, num_classes, dtype=torch.float64)

    def add(self, answer: Tensor, target: Tensor) -> None:
        """See :class:`Measure`."""
        said, wanted = answer.argmax(dim=1).flatten().cpu(), target.flatten().long().cpu()
        counts = wanted < self._num_classes  # pixels without a class do not
        pairs = wanted[counts] * self._num_classes + said[counts]
        found = torch.bincount(pairs, minlength=self._num_classes**2)
        self.sums += found.view_as(self.sums)

    def value(self, sums: Tensor) -> float:
        """Return the share of right labels, or the mean over classes that occur of the IoU."""
        if not self._is_of_pixels:
            return float(sums.trace() / sums.sum())
        right_C = sums.diagonal()
        either_C = sums.sum(dim=0) + sums.sum(dim=1) - right_C
        occurs_C = either_C > 0
        return float((right_C[occurs_C] / either_C[occurs_C]).mean())


class RootMeanSquare(Measure):
    """The root of the mean squared error of pixels' values."""

    def __init__(self, task: AnyTask) -> None:
        self.name = f"eval_rmse_{task.name}"
        self.sums = torch.zeros(2, dtype=torch.float64)

    def add(self, answer: Tensor, target: Tensor) -> None:
        """See :class:`Measure`."""
        errors, is_there = _errors(answer.double(), target)
        self.sums += torch.stack([errors.square().sum(), is_there.sum()]).cpu()

    def value(self, sums: Tensor) -> float:
        """Return the root over all pixels with a target."""
        return float((sums[0] / sums[1]).sqrt())


def measure_of(task: AnyTask) -> Measure:
    """Return a task's measure, without passes."""
    if isinstance(task, ClassesTask):
        return ClassCounts(task, len(task.labels))
    if isinstance(task, PixelClassesTask):
        return ClassCounts(task, task.classes)
    return RootMeanSquare(task)
