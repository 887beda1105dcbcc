"""The weights of a served model, and how updates replace them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import ConfigError, ModelFileError
from ...moe.experts.resident import Experts
from ...moe.folders.expert_hashes import Key as ExpertKey
from ...moe.folders.expert_layouts import ExpertViews, part_shapes, plain
from ...moe.folders.folder import ModelFolder
from ...moe.folders.tensor_names import dense_tensors
from ...moe.models.decoder import Decoder
from ...moe.routes.identity import identity_of
from ...moe.updates.manifest import Key, Manifest, UpdateError
from ...moe.updates.read import OpenUpdate
from ..experts.offloaded import OffloadedExperts
from ..experts.store import ExpertStore
from ..experts.tiers.live import LiveTier


@dataclass(frozen=True, slots=True)
class NewWeights:
    """Verified values that can take the place of the old ones, without a read that may fail."""

    copies: Sequence[tuple[Tensor, Tensor]]
    """Memory of the model, and what goes there."""
    update_of: Mapping[ExpertKey, OpenUpdate] = field(default_factory=dict)
    """Where experts are read from that are not in memory as a whole."""

    @property
    def num_bytes(self) -> int:
        """Bytes that are copied."""
        return sum(new.nbytes for _, new in self.copies)


class LiveWeights:
    """Where each unit of a model is: in memory, or behind a store."""

    def __init__(
        self,
        folder: ModelFolder,
        decoder: Decoder,
        store: ExpertStore | None = None,
        tier: LiveTier | None = None,
    ) -> None:
        """``tier`` is that of the ``store``, if there is one."""
        config = folder.config
        self.family = folder.family
        self.architecture = identity_of(config).architecture
        self._store, self._tier = store, tier
        tensors = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
        self._dense = {name: tensors[name].data for name, _ in dense_tensors(config)}
        self._views: dict[ExpertKey, ExpertViews] = {}
        for layer, moe_layer in decoder.moe_layers():
            shapes = part_shapes(config.moe, config.d_model) if config.moe is not None else {}
            self._views |= _views_of(layer, moe_layer.experts, shapes)

    def check(self, manifest: Manifest) -> None:
        """Raise :class:`UpdateError` for an update of another model, or one that lacks units."""
        version, units = manifest.version, manifest.units.keys()
        if manifest.architecture != self.architecture:
            raise UpdateError(
                version,
                f"version {version} is of another model (architecture {manifest.architecture}, "
                f"this server has {self.architecture}); follow the folder of this model's run.",
            )
        known: set[Key] = {*self._views, *self._dense}
        if units - known:
            unknown = _words(min(units - known, key=str))
            raise UpdateError(
                version, f"version {version} has {unknown}, which the model lacks; it is not used."
            )
        wanted = known if manifest.what == "all" else set(self._views)
        if manifest.is_full and wanted - units:
            missing = _words(min(wanted - units, key=str))
            raise UpdateError(
                version,
                f"version {version} is a full snapshot without {missing}; the version before "
                "stays until the next whole one.",
            )

    def read(self, updates: Sequence[OpenUpdate]) -> NewWeights:
        """Read what versions bring together, oldest first, and compare it with its hashes.

        Needs memory for all units that change, apart from those of experts behind a store. Changes
        nothing. Raises :class:`UpdateError` for what is damaged.
        """
        newest: dict[Key, OpenUpdate] = {}
        for update in updates:
            self.check(update.manifest)
            newest |= dict.fromkeys(update.manifest.units, update)
        copies: list[tuple[Tensor, Tensor]] = []
        update_of: dict[ExpertKey, OpenUpdate] = {}
        for key, update in newest.items():
            if isinstance(key, str):
                copies.append((self._dense[key], self._read_dense(key, update)))
            elif self._store is not None:
                update.check_expert(key, self._views[key])
                update_of[key] = update
            else:
                copies += _read_expert(key, self._views[key], update)
        return NewWeights(copies, update_of)

    @torch.no_grad()
    def put(self, new: NewWeights) -> None:
        """Let ``new`` take the place of what is there; between two forwards."""
        for old, tensor in new.copies:
            old.copy_(tensor)
        if self._store is not None:
            tier = self._tier
            assert tier is not None, "a store whose experts change has such a tier"
            self._store.exchange(new.update_of, lambda: tier.take(new.update_of))

    def _read_dense(self, name: str, update: OpenUpdate) -> Tensor:
        """Return a tensor in the type of the model's."""
        old, new = self._dense[name], update.dense(name)
        if new.shape != old.shape:
            version = update.manifest.version
            raise UpdateError(
                version,
                f"version {version} has {name} of shape {list(new.shape)}, where the model has "
                f"{list(old.shape)}; follow the folder of this model's run.",
            )
        return new.to(old.dtype)


def close_unused(updates: Sequence[OpenUpdate], new: NewWeights | None) -> None:
    """Close the updates that nothing is read from later."""
    kept = set() if new is None else set(new.update_of.values())
    for update in set(updates) - kept:
        update.close()


def check_followable(folder: ModelFolder) -> None:
    """Raise :class:`ConfigError` for a model whose weights cannot be replaced while it is served.

    Experts must be one by one in updates, and in memory in the type that an update has.
    """
    with suppress(ModelFileError):  # several widths
        if folder.packed is None and folder.family.own_quantization is None:
            return
    raise ConfigError(
        f"follow is given, but the experts of {folder.path} are in few bits, and updates have them "
        "whole; serve an export of the run, or leave follow out."
    )


def _views_of(
    layer: int, experts: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> dict[ExpertKey, ExpertViews]:
    """Return the memory of a layer's experts; behind a store none, but for the shapes."""
    if isinstance(experts, OffloadedExperts):
        none = {part: torch.empty(shape, device="meta") for part, shape in shapes.items()}
        return {(layer, expert): none for expert in range(experts.num_experts)}
    assert isinstance(experts, Experts), "other kinds are refused"
    slots = zip(experts.expert_ids, experts.slot_views(), strict=True)
    return {(layer, expert): views for expert, views in slots}


def _read_expert(
    key: ExpertKey, views: ExpertViews, update: OpenUpdate
) -> list[tuple[Tensor, Tensor]]:
    parts = {part: plain(views, part) for part in views}
    new = {part: torch.empty(old.shape, dtype=old.dtype) for part, old in parts.items()}
    update.read_expert(key, new)
    return [(old, new[part]) for part, old in parts.items()]


def _words(key: Key) -> str:
    return key if isinstance(key, str) else f"expert {key[1]} of layer {key[0]}"
