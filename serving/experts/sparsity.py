"""Which channels of experts count as 0: a file of thresholds, or only what a gate makes 0.

A channel is kept where its score is above a threshold:

    teal    |x_i|                            of inputs of an expert, and of down (arXiv 2408.14690)
    wina    |x_i| * norm of weight column i  of the same                         (arXiv 2505.19427)
    cats    |act(gate_i)|                    of rows of up and columns of down   (arXiv 2404.08763)
    chess   |act(gate_i)| * mean |up_i|      of the same                         (arXiv 2409.01366)

``coreinfer`` has no threshold: a prompt decides which channels its answer uses
(moe/experts/core_channels.py, arXiv 2410.18311).

L MoE layers, E experts, D model width, F expert width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ...dtypes import short_name
from ...errors import ConfigError
from ...files import replaced
from ...kernels.values.channel_weights import ChannelLimits
from ...moe.folders.folder import ModelFolder
from ...moe.models.model import Model
from ...moe.routes.identity import identity_of

Score = Literal["teal", "wina", "cats", "chess", "coreinfer"]
SCORES: tuple[Score, ...] = ("teal", "wina", "cats", "chess")
"""Those with thresholds."""
KINDS: dict[Score, tuple[str, ...]] = {
    "teal": ("x", "act"),
    "wina": ("x", "act"),
    "cats": ("gate",),
    "chess": ("gate",),
    "coreinfer": (),
}
"""Which values of an expert a score is of: its input, act(gate), or act(gate) * up."""
EXACT = "exact"
"""In place of a file: leave out what a gate makes 0, which changes nothing."""
CORE = "coreinfer:"
"""In place of a file, before the target."""
FORMAT = "moeyard-expert-sparsity"
Key = tuple[int, str]
"""A layer and a kind of values."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The model that thresholds were measured on, in the type it was loaded as."""

    architecture: str
    weights: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Sparsity:
    """How the experts of a model skip channels."""

    score: Score | None = None
    """None = only what a gate makes 0."""
    target: float = 0.0
    """Share of channels that should count as 0."""
    owner: Owner | None = None
    thresholds: dict[Key, Tensor] = field(default_factory=dict)
    """fp32 ``[E]``."""
    norms: dict[Key, Tensor] = field(default_factory=dict)
    """fp32 ``[E, D]`` for ``x``, else ``[E, F]``; the scores of teal and cats have none."""
    path: Path | None = None

    @property
    def name(self) -> str:
        """The name of this lossy mode."""
        return f"expert-sparsity {self.score} {self.target:g}"

    @property
    def by_input(self) -> bool:
        """Whether inputs of the first product are left out."""
        return self.score is not None and "x" in KINDS[self.score]

    def limits(self, layer: int, d_model: int, d_expert: int) -> ChannelLimits | None:
        """Return the largest values of a layer that count as 0; None if only 0 does."""
        if self.score is None or not KINDS[self.score]:
            return None
        found = {}
        for kind in KINDS[self.score]:
            threshold_E1 = self.thresholds[layer, kind].unsqueeze(1)
            norm = self.norms.get((layer, kind))
            if norm is None:
                limits = threshold_E1.expand(-1, d_model if kind == "x" else d_expert)
            else:
                limits = threshold_E1 / norm
            found[f"{kind}_ED" if kind == "x" else f"{kind}_EF"] = limits.contiguous()
        return ChannelLimits(**found)

    def check_owner(self, owner: Owner) -> None:
        """Raise :class:`ConfigError` for another model than that of the file."""
        if self.owner is None or self.owner == owner:
            return
        for name in ("architecture", "dtype", "weights"):
            own, other = getattr(self.owner, name), getattr(owner, name)
            if own != other:
                raise ConfigError(
                    f"expert-sparsity is {str(self.path)!r}, which belongs to another model: its "
                    f"{name} is {own}, this one has {other}; measure one with moeyard sparsity."
                )


def save_sparsity(path: Path, sparsity: Sparsity) -> None:
    """Write a file, whole or not at all; raises ``OSError``."""
    owner = sparsity.owner
    assert owner is not None and sparsity.score is not None, "thresholds were measured"
    metadata = {
        "format": FORMAT,
        "version": "1",
        "score": sparsity.score,
        "target": f"{sparsity.target:g}",
        "architecture": owner.architecture,
        "weights": owner.weights,
        "dtype": owner.dtype,
    }
    tensors = {f"{layer}.{kind}.threshold": t for (layer, kind), t in sparsity.thresholds.items()}
    tensors |= {f"{layer}.{kind}.norm": norm for (layer, kind), norm in sparsity.norms.items()}
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replaced(path) as unfinished:  # save_file raises errors that are no OSError
        unfinished.write_bytes(to_bytes(whole, metadata))


def read_sparsity(name: str) -> Sparsity:
    """Return what ``--expert-sparsity`` names.

    That is ``exact``, ``coreinfer:TARGET``, or a file of ``moeyard sparsity``. Raises
    :class:`ConfigError` for other targets and files.
    """
    if name == EXACT:
        return Sparsity()
    if name.startswith(CORE):
        return Sparsity("coreinfer", _target_of(name))
    remedy = "give a file that moeyard sparsity wrote, exact, or coreinfer:0.4."
    try:
        with safe_open(name, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"expert-sparsity is {name!r}, which cannot be read ({error}); {remedy}"
        ) from None
    score = metadata.get("score")
    if metadata.get("format") != FORMAT or score not in SCORES:
        raise ConfigError(f"expert-sparsity is {name!r}, which has no thresholds; {remedy}")
    parts: dict[str, dict[Key, Tensor]] = {"threshold": {}, "norm": {}}
    try:
        for key, tensor in tensors.items():
            layer, kind, part = key.split(".")
            parts[part][int(layer), kind] = tensor.to(torch.float32)
        owner = Owner(metadata["architecture"], metadata["weights"], metadata["dtype"])
        target = float(metadata["target"])
    except (KeyError, ValueError):
        raise ConfigError(f"expert-sparsity is {name!r}, which is damaged; {remedy}") from None
    return Sparsity(score, target, owner, parts["threshold"], parts["norm"], Path(name))


def _target_of(name: str) -> float:
    """Return the share of channels that are left out."""
    text = name.removeprefix(CORE)
    try:
        target = float(text)
    except ValueError:
        target = math.nan
    if not 0 <= target < 1:
        raise ConfigError(
            f"expert-sparsity is {name!r}; give the share of channels that answers leave out, from "
            "0 to less than 1, such as coreinfer:0.4."
        )
    return target


def owner_of(decoder: Model) -> Owner:
    """Return what thresholds of a model belong to."""
    identity = identity_of(decoder.config, decoder)
    assert identity.weights is not None, "the decoder was given"
    dtype = short_name(next(decoder.parameters()).dtype)
    return Owner(identity.architecture, identity.weights, dtype)


def open_sparsity(folder: ModelFolder, name: str | None) -> Sparsity | None:
    """Return how the experts of a folder skip channels; None = not at all.

    Raises :class:`ConfigError` for a file that does not fit the folder. Whether it was measured on
    its weights is known when they are there: :meth:`Sparsity.check_owner`.
    """
    if name is None:
        return None
    config, moe = folder.config, folder.config.moe
    if moe is None or folder.packed is not None:
        reason = "has no experts" if moe is None else "has experts of 8 or 4 bits"
        raise ConfigError(
            f"expert-sparsity is {name!r}, but the model {reason}; use a folder with experts in "
            "fp32 or bf16, or leave it out."
        )
    found = read_sparsity(name)
    architecture = identity_of(config).architecture
    if found.owner is not None:
        found.check_owner(replace(found.owner, architecture=architecture))
    _check_parts(found, config.moe_layers, moe.num_experts, config.d_model, moe.d_expert)
    return found


def _check_parts(
    sparsity: Sparsity, layers: Sequence[int], num_experts: int, d_model: int, d_expert: int
) -> None:
    """Raise :class:`ConfigError` for a file whose arrays do not fit the model."""
    if sparsity.score is None or not KINDS[sparsity.score]:
        return
    widths = {"x": d_model, "gate": d_expert, "act": d_expert}
    keys = {(layer, kind) for layer in layers for kind in KINDS[sparsity.score]}
    normed = keys if sparsity.score in ("wina", "chess") else set()
    fits = set(sparsity.thresholds) == keys and set(sparsity.norms) == normed
    fits = fits and all(tuple(t.shape) == (num_experts,) for t in sparsity.thresholds.values())
    fits = fits and all(
        tuple(norm.shape) == (num_experts, widths[kind])
        for (_, kind), norm in sparsity.norms.items()
    )
    if not fits:
        raise ConfigError(
            f"expert-sparsity is {str(sparsity.path)!r}, whose arrays do not fit this model; "
            "measure it again with moeyard sparsity."
        )
