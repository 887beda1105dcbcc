"""Random checkpoints for benchmarks/offloading.py, written piece by piece.

    python benchmarks/offloading_models.py FOLDER [NAME ...]

Weights are random, so routers choose about evenly and no expert is more popular than another: with
slots for a share s of the experts, a cache misses about 1 - s of the choices. Trained models are
kinder. The large models exist twice, as a folder and as a GGUF file of the same bits: that of 4 G
parameters takes 16 GB of disk.
"""

import argparse
import zlib
from pathlib import Path

import torch

from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.expert_layouts import part_shapes
from moeyard.moe.folders.families.table import FAMILIES
from moeyard.moe.folders.hf_config import to_hf
from moeyard.moe.folders.tensor_names import dense_tensors
from moeyard.moe.folders.write_weights import plan_weights
from moeyard.moe.folders.writer import write_model_folder
from moeyard.moe.routers.topk import TopK
from moeyard.training.data.tokenizer import ByteTokenizer


def _config(lookahead: str = "ffn_input", **sizes: int) -> ModelConfig:
    router = TopK(k=sizes.pop("k", 4), lookahead=lookahead)
    moe = MoEConfig(
        num_experts=sizes.pop("num_experts", 32), d_expert=sizes.pop("d_expert"), router=router
    )
    return ModelConfig(vocab_size=257, max_positions=4096, moe=moe, **sizes)


_TINY = {"d_model": 64, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "d_expert": 32}
_1B = {"d_model": 1024, "num_layers": 20, "num_heads": 16, "num_kv_heads": 4, "d_expert": 512}
_2B = {"d_model": 2048, "num_layers": 12, "num_heads": 32, "num_kv_heads": 4, "d_expert": 768}
_4B = _2B | {"num_layers": 24}
MODELS = {
    "tiny": _config(**_TINY, num_experts=8, k=2),
    "tiny-pregated": _config("previous_block", **_TINY, num_experts=8, k=2),
    "tiny-preattention": _config("attention_input", **_TINY, num_experts=8, k=2),
    "1b": _config(**_1B),
    "1b-pregated": _config("previous_block", **_1B),
    "1b-preattention": _config("attention_input", **_1B),
    "2b": _config(**_2B),
    "4b": _config(**_4B),
}
"""The first of a size is a Qwen3-MoE; the others have routers that choose early. An expert of
``2b`` and ``4b`` has the size of one of Qwen3-30B-A3B."""


class RandomWeights:
    """Normal numbers over the root of the row length; norms are 1. The same for the same names.

    Embeddings are large and what layers add is small, as GPT-2 begins. Otherwise all tokens look
    the same to the routers after a few layers.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        assert config.moe is not None
        self._shapes = part_shapes(config.moe, config.d_model)
        self._dense = dict(dense_tensors(config))
        self._dtype = dtype
        self._added = (2 * config.num_layers) ** -0.5
        """Scale of what is added to the residual stream."""

    def dense(self, parameter: str) -> torch.Tensor:
        """Return a tensor of the decoder outside the experts."""
        like = self._dense[parameter]
        if "norm" in parameter:
            return torch.ones(like.shape, dtype=like.dtype)
        if like.ndim < 2:
            return torch.zeros(like.shape, dtype=like.dtype)
        scale = 1.0
        if parameter == "embed_tokens.weight":
            scale = like.shape[-1] ** 0.5
        elif "o_proj" in parameter:
            scale = self._added
        return self._normal(parameter, tuple(like.shape), scale)

    def expert_part(self, layer: int, expert: int, part: str) -> torch.Tensor:
        """Return a part of an expert."""
        scale = self._added if part == "down" else 1.0
        return self._normal(f"{layer} {expert} {part}", self._shapes[part], scale)

    def _normal(self, name: str, shape: tuple[int, ...], scale: float) -> torch.Tensor:
        seed = zlib.crc32(name.encode())  # Python's hash differs from process to process
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.empty(shape, dtype=self._dtype)
        return tensor.normal_(std=scale * shape[-1] ** -0.5, generator=generator)


def write_random(folder: Path, name: str) -> None:
    """Write one of ``MODELS`` in bfloat16 into ``folder``, which must not exist."""
    config, dtype = MODELS[name], torch.bfloat16
    ids = {"eos_token_id": ByteTokenizer.eos_id}
    values = to_hf(config, "bfloat16", ids, has_separate_experts=True)
    family, weights = FAMILIES[values["model_type"]], RandomWeights(config, dtype)
    plans = plan_weights(config, family, weights, dtype, torch.float32)
    write_model_folder(folder, values, plans, ByteTokenizer().save, ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", choices=[*MODELS, []], default=[])
    arguments = parser.parse_args()
    for name in arguments.names or MODELS:
        if not (arguments.folder / name).exists():
            write_random(arguments.folder / name, name)
            print(f"written {name}", flush=True)


if __name__ == "__main__":
    main()
