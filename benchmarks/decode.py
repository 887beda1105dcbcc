"""Greedy decoding against transformers and llama.cpp on the same random Qwen3-MoE weights.

    python benchmarks/decode.py [--models demo big] [--llama-bin FOLDER] [--threads 2]

demo: the shape of configs/train/demo.yaml (3.4 M parameters). big: 0.92 B parameters, 0.18 B
active (12 layers, width 768, 32 experts of 960, 4 chosen, vocabulary 32768). Batch 1 and batch 8 of
16-token prompts; ms per step of the whole batch, without the prompt. Ours and theirs take turns
in one process; ours is ``LanguageModel.generate``. llama.cpp is a build given as a folder with
llama-bench and llama-batched-bench (GGUF in the same type; the package gguf writes it); it runs
between the rounds. Peers run the fastest implementation that they offer on this machine.
"""

import argparse
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moeyard

from report import write_results

SHAPES = {
    "demo": {
        "vocab_size": 257, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 256, "intermediate_size": 128,
    },
    "big": {
        "vocab_size": 32768, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 960, "intermediate_size": 768,
    },
}  # fmt: skip
BATCHES = (1, 8)
PROMPT = 16
TYPES = {"demo": ("float32", "bfloat16"), "big": ("bfloat16",)}
NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
"""transformers' names of a layer's norms, and GGUF's."""
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")


def timed(generate: Callable[[int], object], new_tokens: int) -> float:
    """Return ms per decode step: the time of all steps less that of the prompt and one token."""
    started = time.perf_counter()
    generate(1)
    first = time.perf_counter()
    generate(new_tokens)
    return 1e3 * ((time.perf_counter() - first) - (first - started)) / (new_tokens - 1)


def ours(folder: Path, dtype: str, batch: int) -> Callable[[int], object]:
    model = moeyard.load(folder, dtype=dtype)
    model.eos_ids = frozenset()
    ids = prompts(batch)
    return lambda count: model.generate(ids, count, temperature=0)


def theirs(model: Qwen3MoeForCausalLM, batch: int) -> Callable[[int], object]:
    ids = prompts(batch)

    def generate(count: int) -> object:
        limits = {"max_new_tokens": count, "min_new_tokens": count}
        return model.generate(ids, do_sample=False, pad_token_id=0, **limits)

    return generate


def prompts(batch: int) -> torch.Tensor:
    return torch.randint(0, 257, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))


def fastest_implementation(model: Qwen3MoeForCausalLM, batch: int) -> str:
    """Return the fastest of transformers' expert implementations for this batch."""
    found = {}
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        generate = theirs(model, batch)
        generate(2)
        found[name] = timed(generate, 6)
    return min(found, key=lambda name: found[name])


def bytes_per_token(model: Qwen3MoeForCausalLM) -> int:
    """Return the bytes of weights that one token's step reads: no embedding, chosen experts."""
    config, total = model.config, 0
    for name, parameter in model.named_parameters():
        share = config.num_experts_per_tok / config.num_experts if "experts" in name else 1
        total += int(parameter.nbytes * share) if "embed_tokens" not in name else 0
    return total


def write_gguf(model: Qwen3MoeForCausalLM, path: Path, dtype: str) -> None:
    """Write the weights for llama.cpp, matrices in ``dtype``, norms and routers in fp32."""
    import gguf

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(1024)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, tensor: torch.Tensor, is_wide: bool = False) -> None:
        if is_wide or dtype == "float32":
            writer.add_tensor(name, tensor.float().numpy())
        else:
            bits = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)

    add("token_embd.weight", state["model.embed_tokens.weight"])
    add("output_norm.weight", state["model.norm.weight"], is_wide=True)
    add("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        source, target = f"model.layers.{layer}.", f"blk.{layer}."
        for theirs_, name in NORMS.items():
            add(f"{target}{name}.weight", state[f"{source}{theirs_}.weight"], is_wide=True)
        for letter in "qkv":
            add(f"{target}attn_{letter}.weight", state[f"{source}self_attn.{letter}_proj.weight"])
        add(f"{target}attn_output.weight", state[f"{source}self_attn.o_proj.weight"])
        add(f"{target}ffn_gate_inp.weight", state[f"{source}mlp.gate.weight"], is_wide=True)
        gate, up = state[f"{source}mlp.experts.gate_up_proj"].chunk(2, dim=1)
        add(f"{target}ffn_gate_exps.weight", gate)
        add(f"{target}ffn_up_exps.weight", up)
        add(f"{target}ffn_down_exps.weight", state[f"{source}mlp.experts.down_proj"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_ms(folder: Path, model: Path, batch: int, threads: int, new_tokens: int) -> float:
    """Return llama.cpp's ms per decode step of a batch."""
    command = [str(folder / "llama-batched-bench"), "-m", str(model), "-npp", str(PROMPT)]
    command += ["-ntg", str(new_tokens), "-npl", str(batch), "-c", "2048", "-t", str(threads)]
    rows: list[str] = []
    for _ in range(10):  # its logger sometimes loses the last line at exit
        output = subprocess.run(command, capture_output=True, text=True, check=True)
        rows = re.findall(r"\|\s*\d+ \|\s*\d+ \|.*", f"{output.stdout}\n{output.stderr}")
        if rows:
            break
    assert rows, f"llama-batched-bench printed no row: {output.stdout}{output.stderr}"
    cells = [cell.strip() for cell in rows[-1].strip("|").split("|")]
    speed = float(cells[7])  # S_TG t/s, all sequences together
    return 1e3 * batch / speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--llama-bin", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print(f"{'model':5} {'type':9} batch  {'':24} ms/step  speed-up of moeyard  weights GB/s")
    for name in arguments.models:
        for dtype in TYPES[name]:
            with tempfile.TemporaryDirectory() as folder:
                for batch in BATCHES:
                    for row in compare(name, dtype, batch, Path(folder), arguments):
                        rows.append(row)
                        line = f"{name:5} {dtype:9} {batch:5}  {row['who']:24} {row['ms']:7.2f}"
                        line += f"  {row['over_ours']:18.2f}x"
                        if row["weights_gb_s"] is not None:
                            line += f"  {row['weights_gb_s']:12.1f}"
                        print(line, flush=True)
    print("written to", write_results("decode", {"threads": arguments.threads, "rows": rows}))


def compare(
    name: str, dtype: str, batch: int, folder: Path, arguments: argparse.Namespace
) -> list[dict]:
    """Measure one shape, type and batch; peers' rows say how many times slower they are."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        max_position_embeddings=1024, norm_topk_prob=True, eos_token_id=None, **SHAPES[name]
    )
    peer = Qwen3MoeForCausalLM(config).to(getattr(torch, dtype)).eval()
    if not (folder / "config.json").exists():
        peer.save_pretrained(folder)
    choice = fastest_implementation(peer, batch)
    peer.set_experts_implementation(choice)
    runs = {"moeyard": ours(folder, dtype, batch), f"transformers {choice}": theirs(peer, batch)}
    gguf_file = folder / "model.gguf"
    if arguments.llama_bin is not None and not gguf_file.exists():
        write_gguf(peer, gguf_file, dtype)
    found: dict[str, list[float]] = {}
    for turn in range(arguments.rounds + 1):
        for who, run in runs.items():
            elapsed = timed(run, arguments.new_tokens)
            if turn:
                found.setdefault(who, []).append(elapsed)
        if arguments.llama_bin is not None and turn:
            elapsed = llama_ms(
                arguments.llama_bin, gguf_file, batch, arguments.threads, arguments.new_tokens
            )
            found.setdefault("llama.cpp", []).append(elapsed)
    mine, read = found["moeyard"], bytes_per_token(peer)
    return [
        {
            "model": name,
            "dtype": dtype,
            "batch": batch,
            "who": who,
            "ms": statistics.median(values),
            "over_ours": statistics.median(v / m for v, m in zip(values, mine, strict=True)),
            # Of one token: in a batch, tokens share experts.
            "weights_gb_s": read / statistics.median(values) / 1e6 if batch == 1 else None,
            "all_ms": values,
        }
        for who, values in found.items()
    ]


if __name__ == "__main__":
    main()
