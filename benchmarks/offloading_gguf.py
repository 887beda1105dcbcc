"""Write the GGUF twin of a Qwen3-MoE folder in bfloat16, for llama.cpp. Needs ``pip install gguf``.

    python benchmarks/offloading_gguf.py MODEL_DIR FILE

Every matrix has the folder's bits. Norms and routers are in float32, as llama.cpp wants them, which
changes no value. There is no vocabulary: llama-bench makes up token ids.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
PARTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class FolderTensors:
    """The tensors of a folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._files = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def sources(values: dict) -> Iterator[tuple[str, list[str]]]:
    """Yield each tensor's GGUF name and what it is stacked from in the folder."""
    for ours, theirs in OUTSIDE.items():
        yield f"{theirs}.weight", [f"{ours}.weight"]
    for layer in range(values["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for ours, theirs in NAMES.items():
            yield f"blk.{layer}.{theirs}.weight", [f"{prefix}.{ours}.weight"]
        for ours, theirs in PARTS.items():
            experts = range(values["num_experts"])
            names = [f"{prefix}.mlp.experts.{expert}.{ours}.weight" for expert in experts]
            yield f"blk.{layer}.{theirs}.weight", names


def write_gguf(folder: Path, target: Path) -> None:
    """Write the twin of ``folder`` into the file ``target``; one expert is in memory at a time."""
    import gguf
    import numpy

    values = json.loads((folder / "config.json").read_text())
    assert values["model_type"] == "qwen3_moe", f"{folder} is not a Qwen3-MoE folder"
    tensors = FolderTensors(folder)
    writer = gguf.GGUFWriter(target, "qwen3moe")
    _add_sizes(writer, values)
    for name, names in sources(values):
        first, count = tensors[names[0]], len(names)
        shape = (count, *first.shape) if count > 1 else tuple(first.shape)
        dtype = _stored_as(name, first)
        kind = gguf.GGMLQuantizationType[{torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]]
        num_bytes = count * first.numel() * dtype.itemsize
        writer.add_tensor_info(name, shape, numpy.dtype("float32"), num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, names in sources(values):
        parts = (tensors[part] for part in names)
        _write(writer, parts, _stored_as(name, tensors[names[0]]))
    writer.close()


def _add_sizes(writer, values: dict) -> None:
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_key_length(values["head_dim"])
    writer.add_value_length(values["head_dim"])
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    writer.add_rope_freq_base(values["rope_parameters"]["rope_theta"])
    writer.add_expert_count(values["num_experts"])
    writer.add_expert_used_count(values["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(values["moe_intermediate_size"])
    writer.add_vocab_size(values["vocab_size"])
    writer.add_tokenizer_model("none")


def _stored_as(name: str, tensor: Tensor) -> torch.dtype:
    is_small = tensor.ndim == 1 or "ffn_gate_inp" in name
    return torch.float32 if is_small else tensor.dtype


def _write(writer, parts: Iterator[Tensor], dtype: torch.dtype) -> None:
    """Write one tensor's parts, then fill up to the alignment."""
    out, num_bytes = writer.fout[0], 0
    writer.write_padding(out, out.tell())
    for part in parts:
        flat = part.to(dtype).contiguous().reshape(-1).view(torch.uint8)
        out.write(memoryview(flat.numpy()))
        num_bytes += flat.nbytes
    writer.write_padding(out, num_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    write_gguf(arguments.folder, arguments.target)
    print(f"written {arguments.target.name}")


if __name__ == "__main__":
    main()
