"""Reads gates, and groups of channels, of a folder whose experts are laid out by channel.

E experts, D model width, F expert width, G groups of an expert.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ModelFileError
from .channel_layout import NativeExperts, channels_in_group, hash_of
from .expert_hashes import DamagedExpertError, Key
from .expert_layouts import ExpertViews, plain
from .expert_read import ExpertRead
from .extents import DiskOrder, Piece, Place, disk_order
from .file_reader import buffer_of
from .folder import ModelFolder

SOURCE = "channel_hashes says"
REMEDY = "copy the folder again, or convert the model again"

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """Consecutive groups, from ``start`` to before ``end``."""

    start: int
    end: int


def runs_of(groups: Sequence[int], gap: int) -> list[Run]:
    """Return the runs that have ``groups``, which ascend; gaps of up to ``gap`` are read along."""
    runs: list[Run] = []
    for group in groups:
        if runs and group - runs[-1].end <= gap:
            runs[-1] = Run(runs[-1].start, group + 1)
        else:
            runs.append(Run(group, group + 1))
    return runs


class _GateHashes:
    """The hashes of gates, as :class:`ExpertHashes`."""

    source, remedy = SOURCE, REMEDY

    def __init__(self, hashes_of: dict[int, Tensor]) -> None:
        self._hashes_of = hashes_of

    def get(self, key: Key) -> int:
        layer, expert = key
        return int(self._hashes_of[layer][expert, 0]) % (1 << 64)

    def learn(self, key: Key, digest: int) -> None:
        """Do nothing: the folder has them all."""


class ChannelReads:
    """The parts of experts in a folder. Any thread may call its calls."""

    def __init__(self, folder: ModelFolder) -> None:
        """Raises :class:`ModelFileError` for hashes that cannot be read."""
        layout, config = folder.family.experts, folder.config
        assert isinstance(layout, NativeExperts) and config.moe is not None, "is_by_channel"
        self._folder, self._layout = folder, layout
        self._d_expert = config.moe.d_expert
        self._hashes_of: dict[int, Tensor] = {}
        for layer in config.moe_layers:
            name = layout.hashes_name(layer)
            hashes = torch.empty(folder.files.entry(name).shape, dtype=torch.int64)
            try:
                folder.files.read_into(name, hashes)
            except OSError as error:
                raise ModelFileError(f"{name} could not be read: {error}.") from None
            self._hashes_of[layer] = hashes
        self.num_groups = self._hashes_of[config.moe_layers[0]].shape[1] - 1
        place = self._place(config.moe_layers[0], 0)
        self.group = channels_in_group(config.d_model, place.entry.dtype)
        self.channel_bytes = place.entry.num_bytes // self._d_expert
        self.gate_bytes = place.entry.num_bytes // 2
        self._gate_hashes = _GateHashes(self._hashes_of)
        self._orders: dict[Key, DiskOrder] = {}

    def gate_steps(self, key: Key, views: ExpertViews) -> list[Callable[[], None]]:
        """Return calls that fill an expert's gate, to be made one after the other.

        They raise the errors of :meth:`ModelFolder.expert_reads`.
        """
        gate = {"gate": views["gate"]}
        pieces: list[Piece] = self._layout.pieces(self._folder.files, *key, gate)
        order = self._orders.get(key)
        if order is None:
            order = self._orders[key] = disk_order(pieces)
        direct = self._folder.is_direct
        return ExpertRead(key, pieces, order, self._gate_hashes, direct).steps()

    def num_bytes(self, run: Run) -> int:
        """Return the bytes of a run."""
        return len(self.channels(run)) * self.channel_bytes

    def channels(self, run: Run) -> range:
        """Return the channels of a run."""
        return range(run.start * self.group, min(run.end * self.group, self._d_expert))

    def read(self, key: Key, run: Run, views: ExpertViews) -> None:
        """Fill a run's rows of ``up`` and columns of ``down``, once their hashes are right.

        Raises ``OSError`` if bytes cannot be read, and :class:`DamagedExpertError` if reading them
        again gives no others.
        """
        place, channels = self._place(*key), self.channels(run)
        start = place.entry.start + channels.start * self.channel_bytes
        read_c2D = torch.empty((len(channels), place.entry.shape[1]), dtype=place.entry.dtype)
        reader = place.file.reader
        reader.read([buffer_of(read_c2D)], start, self._folder.is_direct)
        if self._damaged(key, run, read_c2D) is not None:
            log.warning("Channels of expert %d of layer %d are read again.", key[1], key[0])
            reader.forget(start, read_c2D.nbytes)
            reader.read([buffer_of(read_c2D)], start, self._folder.is_direct)
            damaged = self._damaged(key, run, read_c2D)
            if damaged is not None:
                raise DamagedExpertError(
                    f"channels {damaged.start} to {damaged[-1]} of expert {key[1]} of layer "
                    f"{key[0]} have other bytes in {place.file.path.name} than {SOURCE}; {REMEDY}"
                )
        up_cD, down_cD = read_c2D.chunk(2, dim=1)
        plain(views, "up")[channels.start : channels.stop].copy_(up_cD)
        plain(views, "down")[:, channels.start : channels.stop].copy_(down_cD.mT)

    def _damaged(self, key: Key, run: Run, read_c2D: Tensor) -> range | None:
        """Return the first channels with another hash."""
        expected = self._hashes_of[key[0]][key[1], 1 + run.start : 1 + run.end].tolist()
        groups = read_c2D.split(self.group)
        for number, (group_c2D, digest) in enumerate(zip(groups, expected, strict=True), run.start):
            if hash_of(group_c2D) != digest:
                return self.channels(Run(number, number + 1))
        return None

    def _place(self, layer: int, expert: int) -> Place:
        return self._layout.place_of_channels(self._folder.files, layer, expert)
