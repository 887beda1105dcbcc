"""The shape of a vision transformer for several tasks: the ``model`` section with ``kind: vit``."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ..routers.routing import Lookahead
from ..routers.row_facts import RowFact
from ..routers.task import Task
from .model import LayersConfig
from .vision_tasks import AnyTask

LARGEST = 1 << 14
"""Pixels of a side."""


class ViTConfig(LayersConfig):
    """A vision transformer that does several tasks on an image, one at a time.

    The layers are DeiT's (Touvron et al. 2021). Experts in every other one, chosen by a router
    that knows the task, make it M3ViT (Liang et al. 2022).
    """

    row_name: ClassVar[str] = "patch"
    row_names: ClassVar[str] = "patches"

    kind: Literal["vit"] = "vit"
    """The model looks at images and does ``tasks`` on them."""
    dense_layers: tuple[int, ...] = ()
    """Layers with a dense MLP instead of experts. If it is left out, layers 0, 2, 4 and so on."""
    image_size: tuple[int, int]
    """Height and width of an image in pixels; all images have them."""
    patch_size: int = Field(ge=1, le=LARGEST)
    """Height and width of a patch, which is a row of the model; divides both sides."""
    channels: int = Field(default=3, ge=1, le=4096)
    """Numbers of a pixel: 3 for colours, 1 for grey."""
    class_token: bool = True
    """Put a learned row in front of the patches; heads of images read it. Without it they read the
    mean of the patches."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the variance in LayerNorm."""
    tasks: tuple[AnyTask, ...] = Field(min_length=1, max_length=1 << 16)
    """What the model says of an image, in the order of the tasks' numbers for routers."""

    @property
    def generates(self) -> bool:
        """Whether the model continues texts."""
        return False

    @property
    def reads_tokens(self) -> bool:
        """Whether rows are tokens of a vocabulary."""
        return False

    @property
    def rows_have(self) -> frozenset[RowFact]:
        """What a batch says of each row in addition, for routers that read it."""
        return frozenset(("tasks",))

    @property
    def grid(self) -> tuple[int, int]:
        """Patches from top to bottom, and from left to right."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_rows(self) -> int:
        """Rows of an image: its patches, and perhaps the class token."""
        down, across = self.grid
        return down * across + self.class_token

    @property
    def patch_numbers(self) -> int:
        """Numbers of a patch: its pixels, times their channels."""
        return self.patch_size**2 * self.channels

    def task_number(self, name: str) -> int:
        """Return the number of a task, which routers read."""
        return [task.name for task in self.tasks].index(name)

    @model_validator(mode="before")
    @classmethod
    def _experts_in_every_other_layer(cls, values: Any) -> Any:
        """Make the even layers dense, unless ``dense_layers`` is given or there is one layer."""
        if not isinstance(values, dict) or values.get("moe") is None or "dense_layers" in values:
            return values
        num_layers = values.get("num_layers")
        if type(num_layers) is not int or not 1 < num_layers <= 10_000:
            return values
        return values | {"dense_layers": tuple(range(0, num_layers, 2))}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model is {self.d_model}, which does not split into {self.num_heads} heads; use "
                "a multiple."
            )
        for side in self.image_size:
            if not 1 <= side <= LARGEST or side % self.patch_size:
                raise ValueError(
                    f"image_size is {list(self.image_size)}, which patches of {self.patch_size} "
                    f"do not fill; use multiples of patch_size, up to {LARGEST}."
                )
        self.check_layers({"dense_layers": self.dense_layers})
        names = [task.name for task in self.tasks]
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise ValueError(f"tasks has two of the name {double!r}; give each another name.")
        self._check_router()
        return self

    def _check_router(self) -> None:
        if self.moe is None:
            return
        router = self.moe.router
        if isinstance(router, Task) and router.num_tasks != len(self.tasks):
            raise ValueError(
                f"moe.router.num_tasks is {router.num_tasks}, but tasks has {len(self.tasks)}; set "
                f"it to {len(self.tasks)}."
            )
        if router.reads_at() is Lookahead.TOKEN:
            raise ValueError(
                f"moe.router.kind is {router.kind}, which reads token ids, and images have none; "
                "choose another router."
            )
        if router.reads_at() is Lookahead.PREVIOUS_BLOCK:
            raise ValueError(
                "moe.router.lookahead is previous_block, which vision models do not offer; use "
                "ffn_input."
            )

    def fresh_tensors(self, stored: LayersConfig) -> tuple[str, ...]:
        """Return the heads of the tasks that the ``stored`` model does not have alike."""
        has = []
        if isinstance(stored, ViTConfig) and stored.patch_size == self.patch_size:
            has = [alike(task) for task in stored.tasks]
        fresh = [task.name for task in self.tasks if alike(task) not in has]
        return tuple(f"head_{name}.{part}" for name in fresh for part in ("weight", "bias"))

    def architecture(self) -> dict[str, Any]:
        """See :meth:`LayersConfig.architecture`."""
        values = super().architecture()
        values["tasks"] = [alike(task) for task in self.tasks]
        return values


def alike(task: AnyTask) -> dict[str, Any]:
    """Return what a task's head depends on: all but the weight in training."""
    values = task.model_dump(mode="json")
    del values["loss_weight"]
    return values
