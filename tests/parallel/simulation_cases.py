"""Models, workloads and clusters for the tests of the simulator."""

from dataclasses import replace
from typing import Any

from moeyard.configuration import validate_config
from moeyard.moe.config.model import ModelConfig
from moeyard.parallel.simulation.cluster import Cluster
from moeyard.parallel.simulation.workload import Workload

MODEL = {
    "vocab_size": 1000,
    "d_model": 256,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 2,
    "max_positions": 512,
    "moe": {"num_experts": 16, "d_expert": 512, "router": {"kind": "topk", "k": 2}},
}
CLUSTER: dict[str, Any] = {
    "name": "test",
    "nodes": 512,
    "gpus_per_node": 8,
    "gpu": {
        "memory": "80GB",
        "memory_bandwidth": "1TB/s",
        "flops": {"fp32": "10TFLOP/s", "bf16": "100TFLOP/s"},
        "layer_latency": "20us",
        "step_latency": "1ms",
    },
    "inside_node": {"bandwidth": "200GB/s", "latency": "5us"},
    "between_nodes": {"bandwidth": "200Gbit/s", "latency": "10us"},
    "contention": 0.1,
    "price_per_gpu_hour": 2.0,
}


def model_of(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**MODEL, **changes})


def work_of(model: ModelConfig | None = None, **changes: Any) -> Workload:
    base = Workload(
        model=model or model_of(),
        sequence_length=512,
        batch_sequences=512,
        accumulation=1,
        precision="bf16",
        ep=8,
    )
    return replace(base, **changes)


def cluster_of(**changes: Any) -> Cluster:
    """Return the cluster with other values; those of sections are merged."""
    values = {**CLUSTER}
    for name, value in changes.items():
        is_section = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **value} if is_section else value
    return validate_config(Cluster, values)
