"""The description of a cluster: a YAML file, typed here (docs/simulate.md)."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...configuration import read_values, validate_config
from ...errors import ConfigError
from .curve import Share, at
from .units import Bytes, Flops, Kind, Rate, Seconds, written

Precision = Literal["fp64", "fp32", "bf16"]
Fraction = Annotated[float, Field(gt=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Gpu(_Part):
    """One accelerator, or one process on a CPU."""

    memory: Annotated[Bytes, Field(gt=0)]
    """What its data sheet says."""
    reserved: Bytes = 0.0
    """Memory that no tensor gets: context, communicators, fragmentation."""
    memory_bandwidth: Annotated[Rate, Field(gt=0)]
    memory_achieved: Fraction = 0.8
    """Share of the bandwidth that work which only reads and writes reaches."""
    memory_achieved_update: Fraction | None = None
    """The same of the update of weights, which reads and writes long arrays; null =
    ``memory_achieved``."""
    flops: dict[Precision, Annotated[Flops, Field(gt=0)]] = Field(min_length=1)
    """Peak of dense matrix products, without sparsity."""
    achieved: Share = 0.5
    """Share of the peak that products reach: a number, or a measured curve ``{rows: share}``."""
    achieved_experts: Share | None = None
    """The same of the experts' products; null = ``achieved``. Rows are those of one expert."""
    achieved_attention: Share | None = None
    """The same of queries with keys and of weights with values; null = ``achieved``."""
    layer_latency: Seconds = 0.0
    """What a layer takes in each direction in addition to all that depends on its size: launches,
    Python."""
    step_latency: Seconds = 0.0
    """What a step takes in addition: data, logging."""

    def rate(self, precision: Precision, share: Share | None, rows: float) -> float:
        """Return the FLOP/s of products with ``rows``."""
        peak = self.flops.get(precision)
        if peak is None:
            raise ConfigError(
                f"gpu.flops has {', '.join(self.flops)}, but train.precision is {precision}; add "
                f"the peak of {precision} or change train.precision."
            )
        return peak * at(self.achieved if share is None else share, rows)


class Link(_Part):
    """Links of one level."""

    bandwidth: Annotated[Rate, Field(gt=0)]
    """Each way."""
    achieved: Fraction = 0.8
    """Share of the bandwidth that sums, gathers and scatters reach."""
    achieved_all_to_all: Fraction | None = None
    """The same of all-to-alls; null = ``achieved``."""
    host: Annotated[Rate, Field(gt=0)] | None = None
    """Bytes a second at which a processor packs, copies and adds up messages, however fast the link
    is; null = that takes no time. For collectives of CPUs."""
    latency: Seconds
    """What a message of no size takes, with the library's part."""
    message: Seconds = 0.0
    """What each further message of an all-to-all adds: they are issued one after the other."""


class Network(Link):
    """The links between nodes; ``bandwidth`` is that of one network card."""

    gpus_per_nic: int = Field(default=1, ge=1)
    """GPUs of a node that share a card."""
    leaf_nodes: int | None = Field(default=None, ge=1)
    """Nodes below one leaf switch; null = all nodes have full bandwidth to each other."""
    oversubscription: float = Field(default=1.0, ge=1)
    """Bandwidth of the nodes below a leaf over that of the leaf's links upwards."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.oversubscription > 1 and self.leaf_nodes is None:
            raise ValueError(
                f"oversubscription is {self.oversubscription:g}, but leaf_nodes is missing; give "
                "the nodes below a leaf switch."
            )
        return self


class Cluster(_Part):
    """A cluster of equal nodes."""

    name: str = Field(min_length=1)
    nodes: int = Field(ge=1)
    """Nodes that exist."""
    gpus_per_node: int = Field(ge=1)
    gpu: Gpu
    inside_node: Link | None = None
    """Links between the GPUs of a node."""
    between_nodes: Network | None = None
    """Links between nodes."""
    collectives: Literal["nccl", "gloo"] = "nccl"
    """Who carries messages. With gloo, links inside a node and between nodes take turns in an
    all-to-all, FSDP's gathers and sums wait for each other and for the computation, and a
    reduce-scatter moves as many bytes as an all-reduce."""
    contention: float = Field(default=0.0, ge=0, le=1)
    """How much longer links and computation take while both work: 0 = they do not disturb each
    other, 1 = overlap gains nothing."""
    price_per_gpu_hour: float | None = Field(default=None, ge=0)
    """In any currency; costs are in the same."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gpus_per_node > 1 and self.inside_node is None:
            raise ValueError(
                f"inside_node is missing, but gpus_per_node is {self.gpus_per_node}; give "
                "bandwidth and latency of the links inside a node."
            )
        if self.nodes > 1 and self.between_nodes is None:
            raise ValueError(
                f"between_nodes is missing, but nodes is {self.nodes}; give bandwidth and latency "
                "of the links between nodes."
            )
        return self

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node


def read_cluster(path: Path) -> Cluster:
    """Return the cluster in a YAML file; every problem is a :class:`ConfigError`."""
    try:
        return validate_config(Cluster, read_values(path))
    except ConfigError as error:
        # A cluster has no overrides on the command line.
        text = re.sub(r" or as \S+=VALUE", "", str(error))
        raise ConfigError(text if str(path) in text else f"{path}: {text}") from None


QUANTITIES: dict[str, Kind] = {
    "memory": "bytes",
    "reserved": "bytes",
    "memory_bandwidth": "rate",
    "bandwidth": "rate",
    "host": "rate",
    "latency": "seconds",
    "message": "seconds",
    "layer_latency": "seconds",
    "step_latency": "seconds",
}
"""Fields with a unit, by name; ``flops`` has one for each precision."""


def to_yaml(cluster: Cluster) -> str:
    """Return text that :func:`read_cluster` reads."""
    values = _with_units(cluster.model_dump(exclude_none=True))
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def _with_units(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name == "flops":
            found[name] = {kind: written(peak, "flops") for kind, peak in value.items()}
        elif name in QUANTITIES:
            found[name] = written(value, QUANTITIES[name])
        else:
            found[name] = _with_units(value) if _is_part(value) else value
    return found


def _is_part(value: Any) -> bool:
    """Whether a value is a section, and not a curve."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)
