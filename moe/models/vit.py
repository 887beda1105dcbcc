"""A vision transformer that does several tasks, each in a pass of its own (M3ViT's).

N passes (an image and a task), L rows of an image, P patches, C channels, H height, W width,
D model width, T = N*L rows, Y rows of a head.
"""

import torch
from torch import Tensor, nn

from ..attention.full import full_rows
from ..config.vision_tasks import AnyTask, ClassesTask, head_width
from ..config.vit import ViTConfig
from ..image_batch import ImageBatch
from ..linear import Linear
from .model import ModelOutput, WholeModel
from .options import WHOLE, ModelOptions
from .vit_layer import ViTLayer


class ViT(WholeModel):
    """Pixels in, hidden rows and routings out; ``answer`` turns a task's rows into its scores.

    An image goes through the layers once for each task that it is asked for: the routers choose
    experts for the task, and the experts serve all of them. So one task is computed without the
    others, and no task changes another's answer.
    """

    config: ViTConfig

    def __init__(self, config: ViTConfig, options: ModelOptions = WHOLE) -> None:
        super().__init__(config, options)
        self.embed_patches = Linear(config.patch_numbers, config.d_model, bias=True)
        self.embed_positions = nn.Embedding(config.num_rows, config.d_model)
        if config.class_token:
            self.embed_class = nn.Embedding(1, config.d_model)
        layers = (ViTLayer(config, index, options) for index in range(config.num_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(config.d_model, config.norm_eps)
        for task in config.tasks:
            width = head_width(task, config.patch_size**2)
            if width:  # else its labels are not known yet
                self.add_module(f"head_{task.name}", Linear(config.d_model, width, bias=True))

    def forward(self, batch: ImageBatch) -> ModelOutput:
        """Run the layers on N passes."""
        x_TD = self.embed(batch.pixels_NCHW)
        rows = full_rows(batch)
        output = self.run_layers(x_TD, lambda _: (batch, rows))
        return ModelOutput(self.norm(output.hidden_TD), output.routings)

    def embed(self, pixels_NCHW: Tensor) -> Tensor:
        """Return the embedded patches of images, each image's class token first, ``[T, D]``."""
        here = self.embed_patches.weight
        patches_NPX = to_patches(pixels_NCHW.to(here.dtype), self.config.patch_size)
        x_NLD = self.embed_patches(patches_NPX.flatten(0, 1)).unflatten(0, patches_NPX.shape[:2])
        if self.config.class_token:
            first_NLD = self.embed_class.weight.expand(len(x_NLD), 1, -1)
            x_NLD = torch.cat([first_NLD.to(x_NLD.dtype), x_NLD], dim=1)
        return (x_NLD + self.embed_positions.weight).flatten(0, 1)

    def answer(self, hidden_TD: Tensor, task: AnyTask) -> Tensor:
        """Return a task's scores or values for passes that are all of this task.

        ``[N, C]`` for labels of images, ``[N, C, H, W]`` for pixels.
        """
        hidden_NLD = hidden_TD.unflatten(0, (-1, self.config.num_rows))
        head = self.get_submodule(f"head_{task.name}")
        if isinstance(task, ClassesTask):
            read_ND = hidden_NLD[:, 0] if self.config.class_token else hidden_NLD.mean(dim=1)
            scores_NY: Tensor = head(read_ND)
            return scores_NY
        patches_NPD = hidden_NLD[:, 1:] if self.config.class_token else hidden_NLD
        patches_TY: Tensor = head(patches_NPD.flatten(0, 1))
        patches_NPY = patches_TY.unflatten(0, patches_NPD.shape[:2])
        return from_patches(patches_NPY, self.config.patch_size, self.config.grid)


def to_patches(pixels_NCHW: Tensor, size: int) -> Tensor:
    """Return the patches of images, from left to right and top to bottom, ``[N, P, C*size^2]``."""
    num_images, channels, height, width = pixels_NCHW.shape
    grid = (num_images, channels, height // size, size, width // size, size)
    patches = pixels_NCHW.reshape(grid).permute(0, 2, 4, 1, 3, 5)
    down, across = height // size, width // size
    return patches.reshape(num_images, down * across, channels * size * size)


def from_patches(patches_NPY: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """Undo :func:`to_patches`: return ``[N, C, H, W]``."""
    num_images, (down, across) = len(patches_NPY), grid
    channels = patches_NPY.shape[2] // (size * size)
    split = patches_NPY.reshape(num_images, down, across, channels, size, size)
    pixels = split.permute(0, 3, 1, 4, 2, 5)
    return pixels.reshape(num_images, channels, down * size, across * size)
