"""A dense decoder in memory, and a look at what its MLPs compute.

T tokens, D model width, F width of the MLP, E experts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.values.activation import Activation
from ...moe.config.model import decoder_config
from ...moe.folders.folder import ModelFolder
from ...moe.folders.read_weights import dense_reads, run_reads
from ...moe.gated_mlp import GatedMLP
from ...moe.linear import Linear
from ...moe.models.decoder import Decoder
from ...moe.without_memory import without_memory

See = Callable[[int, Tensor, Tensor], Tensor | None]
"""Gets a layer, its input ``x_TD`` and what goes into its down projection ``h_TF``; may return
another ``h_TF`` to go there."""


def open_dense(folder: ModelFolder) -> Decoder:
    """Read a dense folder's model in fp32."""
    with without_memory():
        decoder = Decoder(decoder_config(folder.config))
    run_reads(folder, dense_reads(folder, decoder, torch.float32))
    return decoder.eval()


def mlps(decoder: Decoder) -> dict[int, GatedMLP]:
    """Return the MLP of each layer."""
    found = {}
    for layer, module in enumerate(decoder.layers):
        mlp = module.mlp
        assert isinstance(mlp, GatedMLP), "the folder was checked to be dense"
        found[layer] = mlp
    return found


def gate_of(mlp: GatedMLP) -> Linear:
    """Return an MLP's gate projection, which every dense layer has."""
    assert mlp.gate_proj is not None, "dense layers have a gate"
    return mlp.gate_proj


def set_activation(decoder: Decoder, activation: Activation) -> None:
    """Put another activation into every MLP."""
    for mlp in mlps(decoder).values():
        mlp.activation = activation


@torch.no_grad()
def round_weights(decoder: Decoder, dtype: torch.dtype) -> None:
    """Round the weights to the type that they will be stored in."""
    for parameter in decoder.parameters():
        parameter.copy_(parameter.to(dtype))


@torch.no_grad()
def reorder(decoder: Decoder, orders: Mapping[int, Tensor]) -> None:
    """Put the neurons of each MLP into ``order_F``: the model stays the same function."""
    for layer, mlp in mlps(decoder).items():
        order_F = orders[layer]
        for projection, dim in ((gate_of(mlp), 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            projection.weight.copy_(projection.weight.index_select(dim, order_F))


@contextmanager
def watching(decoder: Decoder, see: See) -> Iterator[None]:
    """Call ``see`` in every MLP of a forward."""
    handles = []
    for layer, mlp in mlps(decoder).items():
        handles += _watch(layer, mlp, see)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(layer: int, mlp: GatedMLP, see: See) -> list[Any]:
    rows: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        rows.append(arguments[0])

    def look(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        other_TF = see(layer, rows.pop(), arguments[0])
        return None if other_TF is None else (other_TF, *arguments[1:])

    return [mlp.register_forward_pre_hook(keep), mlp.down_proj.register_forward_pre_hook(look)]


class DecoderTensors:
    """The tensors of a dense decoder in memory, as a source of weights for folders."""

    def __init__(self, decoder: Decoder) -> None:
        self._tensors = dict(decoder.state_dict())

    def dense(self, parameter: str) -> Tensor:
        """Return a tensor by its name."""
        return self._tensors[parameter]

    def expert_part(self, layer: int, expert: int, part: str) -> Tensor:
        """Never called: a dense model has no experts."""
        raise AssertionError("a dense model has no experts")
