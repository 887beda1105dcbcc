"""Rotary position embedding (Su et al. 2021) and its scaling to longer sequences.

T tokens, H rotated elements of a head, h = H / 2 frequencies.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.attention import LinearRope, Llama3Rope, RopeScaling, YarnRope
from ..config.model import ModelConfig

PAGE = 256
"""Positions whose cosines and sines are computed together."""

Tables = tuple[Tensor, Tensor]
"""Cosines and sines, ``[T, 1, H]``."""


class Rope:
    """Cosines and sines by position, in the half-split layout of Hugging Face's models."""

    def __init__(
        self,
        width: int,
        theta: float,
        scaling: RopeScaling | None = None,
        rotated: int | None = None,
    ) -> None:
        """Prepare for heads of ``width``, of which ``rotated`` elements turn (None = all).

        The others have frequency 0. They are those at the end of each half.
        """
        self.frequencies_h, self._factor = frequencies(rotated or width, theta, scaling)
        if rotated is not None:
            self.frequencies_h = F.pad(self.frequencies_h, (0, (width - rotated) // 2))
        self._known: dict[torch.dtype, Tables] = {}
        self._on_gpus: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        """The frequencies there: copying them waits for the device."""

    @classmethod
    def of(cls, config: ModelConfig) -> "Rope":
        """Return the rotary embedding of a model's attention layers."""
        return cls(config.rope_width, config.rope_theta, config.rope_scaling)

    def tables(self, positions_T: Tensor, dtype: torch.dtype) -> Tables:
        """Return cosines and sines, ``[T, 1, H]``, computed at least in fp32."""
        if not positions_T.is_cpu or positions_T.is_meta or not len(positions_T):
            return self._compute(positions_T, dtype)
        # Looked up: torch would take longer to compute a few than the rest of a decode step takes.
        cos_P1H, sin_P1H = self._known.get(dtype, (positions_T[:0], positions_T[:0]))
        highest = int(positions_T.max())
        if highest >= len(cos_P1H):
            cos_P1H, sin_P1H = self._grow(highest, dtype)
        return cos_P1H.index_select(0, positions_T), sin_P1H.index_select(0, positions_T)

    @torch.inference_mode(False)  # because training may use the kept tensors later
    def _grow(self, highest: int, dtype: torch.dtype) -> Tables:
        # Page by page, so that a position's bits do not depend on earlier calls. All pages are
        # computed again, so that two threads may do this at the same time.
        starts = range(0, 2 * highest + 1, PAGE)
        places = (torch.arange(start, start + PAGE, device="cpu") for start in starts)
        cosines, sines = zip(*(self._compute(place, dtype) for place in places), strict=True)
        tables = torch.cat(cosines), torch.cat(sines)
        self._known[dtype] = tables
        return tables

    def _compute(self, positions_T: Tensor, dtype: torch.dtype) -> Tables:
        wide = torch.promote_types(dtype, torch.float32)
        frequencies_h = self._frequencies(positions_T.device, wide)
        angles_Th = positions_T.to(wide).unsqueeze(-1) * frequencies_h
        angles_T1H = torch.cat([angles_Th, angles_Th], dim=-1).unsqueeze(1)
        cos_T1H, sin_T1H = angles_T1H.cos() * self._factor, angles_T1H.sin() * self._factor
        return cos_T1H.to(dtype), sin_T1H.to(dtype)

    @torch.inference_mode(False)  # because training may use the kept tensors later
    def _frequencies(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the frequencies on a device, and keep them if that is a GPU."""
        if device.type in ("cpu", "meta") or torch.compiler.is_compiling():
            return self.frequencies_h.to(device, dtype)
        if (device, dtype) not in self._on_gpus:
            self._on_gpus[device, dtype] = self.frequencies_h.to(device, dtype)
        return self._on_gpus[device, dtype]


def rotate(x_TQH: Tensor, tables: Tables, interleaved: bool = False) -> Tensor:
    """Apply the rotary embedding to every head.

    ``interleaved`` takes neighbouring elements as pairs; the result is always half-split,
    which does not change dot products of two rotated heads.
    """
    cos_T1H, sin_T1H = tables
    if interleaved:
        first, second = x_TQH[..., ::2], x_TQH[..., 1::2]
        x_TQH = torch.cat([first, second], dim=-1)
    else:
        first, second = x_TQH.chunk(2, dim=-1)
    return x_TQH * cos_T1H + torch.cat([-second, first], dim=-1) * sin_T1H


def frequencies(width: int, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """Return radians per position, fp64 ``[h]``, and the factor on cosines and sines."""
    steps_h = torch.arange(0, width, 2, dtype=torch.float64, device="cpu")
    plain_h = theta ** (-steps_h / width)
    if scaling is None:
        return plain_h, 1.0
    if isinstance(scaling, LinearRope):
        return plain_h / scaling.factor, 1.0
    if isinstance(scaling, Llama3Rope):
        return _llama3(plain_h, scaling), 1.0
    return _yarn(plain_h, width, theta, scaling), _yarn_factor(scaling)


def softmax_scale(config: ModelConfig) -> float:
    """Return the factor on attention scores."""
    latent, scaling = config.attention.latent, config.rope_scaling
    if latent is None:
        return float(config.head_width**-0.5)
    scale = float((latent.nope_dim + latent.rope_dim) ** -0.5)
    if isinstance(scaling, YarnRope) and scaling.mscale_all_dim:
        scale *= _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def _llama3(plain_h: Tensor, scaling: Llama3Rope) -> Tensor:
    turns_h = scaling.original_max_positions * plain_h / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_h = ((turns_h - low) / (high - low)).clamp(0, 1)
    return plain_h * (kept_h + (1 - kept_h) / scaling.factor)


def _yarn(plain_h: Tensor, width: int, theta: float, scaling: YarnRope) -> Tensor:
    def dimension(turns: float) -> float:
        """Return the index of the frequency with ``turns`` turns over the original positions."""
        length = scaling.original_max_positions / (turns * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    places_h = torch.arange(len(plain_h), dtype=torch.float64, device="cpu")
    stretched_h = ((places_h - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain_h * ((1 - stretched_h) + stretched_h / scaling.factor)


def _yarn_factor(scaling: YarnRope) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        factor = scaling.factor
        return _mscale(factor, scaling.mscale) / _mscale(factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
