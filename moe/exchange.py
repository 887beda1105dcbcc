"""Experts that exchange weights after each step, and their averages (SS-MoE, Luo et al. 2023).

S expert slots here.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .experts.path import LocalPath
from .experts.resident import Experts
from .experts.streamed import StreamedExperts
from .layer import MoELayer
from .routers.averaged import AveragedConfig


@torch.no_grad()
def exchange(layer: MoELayer, name: str, values_S: Tensor, done: int) -> None:
    """Let the experts of a layer take a part of each other's parameter ``name``, in place.

    ``values_S`` are those of the slots here, or their masters; ``done`` is the number of steps that
    the run has made. Expert e becomes ``(1 - w) W_e + w / (E - 1) sum of the others' W``, with
    ``w`` of :meth:`.AveragedConfig.exchange_after`. That keeps the mean, which ``layer.average``
    holds from now on. All ranks that share a layer's experts call it.
    """
    config, count = layer.gate.config, layer.num_experts
    assert isinstance(config, AveragedConfig) and layer.average is not None
    mean = mean_of_experts(layer, values_S)
    weight = config.exchange_after(done)
    if weight and count > 1:
        values_S.lerp_(mean.to(values_S.dtype), weight * count / (count - 1))
    layer.average.take(name, mean)


def exchange_experts(layers: Iterable[MoELayer], done: int) -> None:
    """Exchange the parameters of all layers that have an average, after step ``done`` of a loop of
    your own; those in memory alone."""
    for layer in layers:
        if layer.average is not None:
            for name in layer.average.names:
                exchange(layer, name, layer.experts.get_parameter(name).data, done)


@torch.no_grad()
def refill_averages(layers: Iterable[MoELayer]) -> None:
    """Let averages follow experts that were initialised, cast or placed.

    Does nothing while experts of other ranks cannot be reached, and where experts are not in memory
    as parameters.
    """
    for layer in layers:
        experts = layer.experts
        if layer.average is None or isinstance(experts, StreamedExperts):
            continue
        if not isinstance(experts, Experts):
            continue
        if isinstance(layer.path, LocalPath) and len(experts.expert_ids) < layer.num_experts:
            continue
        for name in layer.average.names:
            mean = mean_of_experts(layer, experts.get_parameter(name))
            layer.average.take(name, mean)


def mean_of_experts(layer: MoELayer, values_S: Tensor) -> Tensor:
    """Return the mean over all experts of a layer, at least in fp32.

    Summed in the order of the ranks, so all of them get the same bits.
    """
    wide = torch.promote_types(values_S.dtype, torch.float32)
    sums = layer.path.gather(values_S.detach().sum(dim=0, keepdim=True, dtype=wide))
    return sums.sum(dim=0) / layer.num_experts
