"""The shape of a super-resolution model: the ``model`` section with ``kind: super_resolution``."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ..routers.router import RouterConfig
from ..routers.routing import Lookahead
from ..routers.row_facts import RowFact
from ..routers.sampling_space import SamplingSpace
from ..routers.timestep import Timestep
from .model import LayersConfig

LARGEST_IMAGE = 1 << 14
"""Pixels of a side. Absurd values, for example from a damaged file, are refused before any
allocation."""


class SuperResolutionConfig(LayersConfig):
    """A transformer that enlarges images by diffusion; all layers are dense without ``moe``.

    It names the noise in the difference between an image and its enlarged small copy (SR3, Saharia
    et al. 2021; SRDiff, Li et al. 2022), patch by patch, with layers that follow the timestep (DiT,
    Peebles and Xie 2023).
    """

    row_name: ClassVar[str] = "patch"
    row_names: ClassVar[str] = "patches"

    kind: Literal["super_resolution"] = "super_resolution"
    """The model enlarges images by diffusion."""
    channels: int = Field(default=3, ge=1, le=64)
    """Channels of an image: 1 for grey ones, 3 for colours."""
    image_size: int = Field(default=32, ge=1, le=LARGEST_IMAGE)
    """Sides of the large images in training, in pixels. Larger ones are computed in tiles."""
    scale: int = Field(default=4, ge=2, le=64)
    """How many times longer the sides get."""
    patch: int = Field(default=4, ge=1, le=LARGEST_IMAGE)
    """Sides of a patch, in pixels of the large image; each is one token."""
    timesteps: int = Field(default=1000, ge=2, le=1 << 20)
    """Timesteps of the diffusion process."""
    beta_start: float = Field(default=0.0015, gt=0, lt=1)
    """Variance of the noise that the first timestep adds."""
    beta_end: float = Field(default=0.0155, gt=0, lt=1)
    """Variance of the noise that the last timestep adds; those between are on a line."""
    residual_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the difference between images and enlarged small copies, on a scale of
    -1 to 1; training fills it in from the images. Noise is that much larger."""
    frequency_bands: int = Field(default=0, ge=0, le=1 << 10)
    """Bands of a filter that corrects the noise in each band of frequencies, as the timestep says;
    0 = none."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the variance in LayerNorm."""
    space_layers: tuple[int, ...] = ()
    """MoE layers with sampling-space experts (``space``); the others have ``moe.router``."""
    space: SamplingSpace = SamplingSpace()
    """The router of ``space_layers``."""

    @property
    def generates(self) -> bool:
        """Whether the model continues texts."""
        return False

    @property
    def reads_tokens(self) -> bool:
        """Whether rows are tokens of a vocabulary: they are patches."""
        return False

    @property
    def rows_have(self) -> frozenset[RowFact]:
        """What routers may read of a row: its time."""
        return frozenset({"timesteps"})

    @property
    def rows_per_image(self) -> int:
        """Tokens of an image of ``image_size``."""
        return (self.image_size // self.patch) ** 2

    @property
    def std(self) -> float:
        """``residual_std`` once it is known."""
        assert self.residual_std is not None, "residual_std is not filled in yet"
        return self.residual_std

    def router(self, layer: int) -> RouterConfig:
        """Return ``space`` for ``space_layers``, else ``moe.router``."""
        return self.space if layer in self.space_layers else super().router(layer)

    def architecture(self) -> dict[str, Any]:
        """See :meth:`LayersConfig.architecture`."""
        values = super().architecture()
        values["space_layers"] = sorted(set(self.space_layers))
        values["space"] = self.space.architecture() if self.space_layers else None
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        problem = self._problem_with_sizes() or self._problem_with_routers()
        if problem is not None:
            raise ValueError(problem)
        self.check_layers({"dense_layers": self.dense_layers, "space_layers": self.space_layers})
        return self

    def _problem_with_sizes(self) -> str | None:
        if self.d_model % self.num_heads or self.d_model % 4:
            return (
                f"d_model is {self.d_model}; use a multiple of num_heads = {self.num_heads} and of "
                "4, because positions have two sines and two cosines."
            )
        for name, side in (("patch", self.patch), ("scale", self.scale)):
            if self.image_size % side:
                return (
                    f"image_size is {self.image_size}, which {name} = {side} does not divide; use "
                    f"a multiple of {side}."
                )
        if self.beta_end < self.beta_start:
            return (
                f"beta_end is {self.beta_end}, less than beta_start = {self.beta_start}; noise "
                "grows with the timesteps, so swap them."
            )
        return None

    def _problem_with_routers(self) -> str | None:
        if self.moe is None:
            return "space_layers has layers, but moe is missing." if self.space_layers else None
        wrong = [layer for layer in self.space_layers if layer in self.dense_layers]
        if wrong:
            return (
                f"space_layers names layer {wrong[0]}, which dense_layers names too; take it out "
                "of one of them."
            )
        router = self.moe.router
        if isinstance(router, Timestep) and router.num_timesteps != self.timesteps:
            return (
                f"moe.router.num_timesteps is {router.num_timesteps:g}, but timesteps is "
                f"{self.timesteps}; give both the same number."
            )
        if router.reads_at() is Lookahead.PREVIOUS_BLOCK:
            return (
                "moe.router.lookahead is previous_block, which super-resolution models do not "
                "offer; use ffn_input."
            )
        if self.moe.block.kind != "residual":
            return (
                f"moe.block.kind is {self.moe.block.kind}, but layers of super-resolution models "
                "join by a gate; leave moe.block out."
            )
        return None
