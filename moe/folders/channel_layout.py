"""Experts laid out by channel: what the gate leaves out need not be read from the disk.

An expert is ``<prefix>.gate_proj.weight`` ``[F, D]`` and ``<prefix>.channels.weight`` ``[F, 2D]``:
each channel's row of up and its column of down side by side (the bundles of PowerInfer-2, arXiv
2406.06282). A layer also has ``channel_hashes``, int64 ``[E, 1 + G]``: xxh3 of the gate and of each
group of channels. A group is what one page holds, or one channel where that is larger.

E experts, D model width, F expert width, G groups of an expert.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
import xxhash
from torch import Tensor

from ...errors import ConfigError
from ..config.model import LayersConfig
from ..config.moe import MoEConfig
from .expert_layouts import ExpertViews, SeparateExperts, Shapes, plain
from .extents import Piece, Place
from .file_reader import PAGE_BYTES, buffer_of
from .shards import TensorPlan
from .tensor_files import TensorFiles

OPTION = "expert-layout"


def channels_in_group(d_model: int, dtype: torch.dtype) -> int:
    """Return how many channels are read and checked together."""
    return max(1, PAGE_BYTES // (2 * d_model * dtype.itemsize))


def num_groups(moe: MoEConfig, d_model: int, dtype: torch.dtype) -> int:
    """Return G."""
    return -(-moe.d_expert // channels_in_group(d_model, dtype))


class NativeExperts(SeparateExperts):
    """The experts of our own family: separate matrices, or laid out by channel."""

    def tensors(self, files: TensorFiles, moe: MoEConfig, d_model: int, layer: int) -> Shapes:
        """Yield name and shape of every tensor that the experts of ``layer`` need."""
        if not self.is_by_channel(files, layer):
            yield from super().tensors(files, moe, d_model, layer)
            return
        for expert in range(moe.num_experts):
            yield self.name(layer, expert, "gate"), (moe.d_expert, d_model)
            yield self.channels_name(layer, expert), (moe.d_expert, 2 * d_model)
        dtype = files.entry(self.channels_name(layer, 0)).dtype
        yield self.hashes_name(layer), (moe.num_experts, 1 + num_groups(moe, d_model, dtype))

    def pieces(
        self, files: TensorFiles, layer: int, expert: int, views: ExpertViews
    ) -> list[Piece]:
        """Return what an expert consists of and where each part goes."""
        if not self.is_by_channel(files, layer):
            return super().pieces(files, layer, expert, views)
        pieces = []
        if "gate" in views:
            gate_FD = plain(views, "gate")
            place = files.place(self.name(layer, expert, "gate"), tuple(gate_FD.shape))
            pieces.append(Piece((place,), gate_FD))
        if "up" in views or "down" in views:
            place = self.place_of_channels(files, layer, expert)
            pieces.append(Piece((place,), partial(put_channels, views)))
        return pieces

    def place_of_channels(self, files: TensorFiles, layer: int, expert: int) -> Place:
        """Return where the channels of an expert are."""
        name = self.channels_name(layer, expert)
        return files.place(name, files.entry(name).shape)

    def is_by_channel(self, files: TensorFiles, layer: int) -> bool:
        """Say whether a layer's experts are laid out by channel."""
        return self.channels_name(layer, 0) in files

    def channels_name(self, layer: int, expert: int) -> str:
        """Return the name of an expert's channels."""
        return self.name(layer, expert, "up").replace("up_proj", "channels")

    def hashes_name(self, layer: int) -> str:
        """Return the name of the hashes of a layer."""
        prefix, _, _ = self.name(layer, 0, "up").rpartition(".0.")
        return f"{prefix}.channel_hashes"


NATIVE_EXPERTS = NativeExperts()


def put_channels(views: ExpertViews, channels_F2D: Tensor) -> None:
    """Copy all channels of an expert into its ``up`` ``[F, D]`` and ``down`` ``[D, F]``."""
    up_FD, down_FD = channels_F2D.chunk(2, dim=1)
    if "up" in views:
        plain(views, "up").copy_(up_FD)
    if "down" in views:
        plain(views, "down").copy_(down_FD.mT)


def check_layout(config: LayersConfig, is_rounded: bool) -> None:
    """Raise :class:`ConfigError` where experts cannot be laid out by channel."""
    moe, problem = config.moe, None
    if moe is None:
        problem = "the model has no experts"
    elif is_rounded:
        problem = "only experts in fp32 or bf16 have channels to read one by one"
    elif "gate" not in moe.fc1_parts:
        problem = (
            f"experts with activation {moe.activation} have no gate, which would be read first"
        )
    elif moe.expert_bias:
        problem = "the experts have biases, which the layout has no place for"
    if problem is not None:
        raise ConfigError(f"{OPTION} is channels, but {problem}; leave it out.")


def bundle(plans: Iterable[TensorPlan], d_model: int) -> list[TensorPlan]:
    """Return ``plans`` of separate experts with up and down bundled by channel, and their hashes.

    The hashes of a layer are made when its experts were written, or earlier if they are asked for.
    """
    parts: dict[tuple[int, int], dict[str, TensorPlan]] = {}
    found: list[TensorPlan] = []
    for plan in plans:
        if plan.layer is None or plan.expert is None:
            found.append(plan)
        else:
            matrix = plan.name.split(".")[-2].removesuffix("_proj")
            parts.setdefault((plan.layer, plan.expert), {})[matrix] = plan
    experts = {key: _Bundle(of_one, d_model) for key, of_one in parts.items()}
    for (layer, expert), written in experts.items():
        found += written.plans(layer, expert)
    for layer in dict.fromkeys(layer for layer, _ in experts):
        of_layer = [written for (at, _), written in experts.items() if at == layer]
        shape = (len(of_layer), 1 + of_layer[0].num_groups)
        make = partial(_hashes_of, of_layer)
        found.append(TensorPlan(NATIVE_EXPERTS.hashes_name(layer), torch.int64, shape, make))
    return found


def _hashes_of(experts: Iterable["_Bundle"]) -> Iterator[Tensor]:
    yield torch.tensor([written.hashes() for written in experts], dtype=torch.int64)


class _Bundle:
    """One expert on its way into a folder."""

    def __init__(self, parts: dict[str, TensorPlan], d_model: int) -> None:
        self._gate, self._up, self._down = (parts[part] for part in ("gate", "up", "down"))
        self._group = channels_in_group(d_model, self._gate.dtype)
        self._hashes: dict[str, list[int]] = {}

    @property
    def num_groups(self) -> int:
        """G."""
        return -(-self._up.shape[0] // self._group)

    def plans(self, layer: int, expert: int) -> list[TensorPlan]:
        """Return the two tensors."""
        width, d_model = self._up.shape
        shape, dtype = (width, 2 * d_model), self._up.dtype
        name, where = NATIVE_EXPERTS.channels_name(layer, expert), (layer, expert)
        return [
            TensorPlan(self._gate.name, dtype, (width, d_model), self._read_gate, *where),
            TensorPlan(name, dtype, shape, self._read_channels, *where),
        ]

    def hashes(self) -> list[int]:
        """Return the hash of the gate and those of the groups, as int64 has them."""
        for part, read in (("gate", self._read_gate), ("channels", self._read_channels)):
            if part not in self._hashes:
                for _ in read():
                    pass
        return [*self._hashes["gate"], *self._hashes["channels"]]

    def _read_gate(self) -> Iterator[Tensor]:
        gate_FD = _whole(self._gate)
        self._hashes["gate"] = [hash_of(gate_FD)]
        yield gate_FD

    def _read_channels(self) -> Iterator[Tensor]:
        channels_F2D = torch.cat((_whole(self._up), _whole(self._down).mT), dim=1)
        self._hashes["channels"] = [hash_of(group) for group in channels_F2D.split(self._group)]
        yield channels_F2D


def _whole(plan: TensorPlan) -> Tensor:
    return torch.cat(list(plan.parts()))


def hash_of(tensor: Tensor) -> int:
    """Return xxh3 of a dense tensor's bytes, as a number that int64 holds."""
    digest = xxhash.xxh3_64_intdigest(buffer_of(tensor).view)
    return digest - (1 << 64) if digest >> 63 else digest
