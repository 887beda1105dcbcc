"""Small models of every family transformers has, with sizes that fit nothing by chance."""

from pathlib import Path

import torch
import transformers
from torch import nn

BASE = {
    "vocab_size": 97,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 96,
    "pad_token_id": 96,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}
DENSE = {"intermediate_size": 56}
SHARED = {"shared_expert_intermediate_size": 36}
LATENT = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "moe_intermediate_size": 24,
    "num_key_value_heads": 4,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DEEPSEEK_YARN = YARN | {"mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 16}
MIXTRAL = {"num_local_experts": 6, "intermediate_size": 24}
OLMOE = {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24}
GPT_OSS = MIXTRAL | {"head_dim": 12, "num_experts_per_tok": 3, "sliding_window": 6}
V2 = LATENT | DENSE | {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 2}
V3 = V2 | {"n_routed_experts": 8, "n_shared_experts": 1, "q_lora_rank": 20, "num_mtp_layers": 0}
GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}

CASES = {
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral_window_tied": (
        "Mixtral",
        MIXTRAL | {"sliding_window": 7, "tie_word_embeddings": True, "head_dim": 12},
    ),
    "qwen2_moe": ("Qwen2Moe", DENSE | EXPERTS | SHARED | {"decoder_sparse_step": 2}),
    "qwen2_moe_window": (
        "Qwen2Moe",
        DENSE
        | EXPERTS
        | SHARED
        | {"use_sliding_window": True, "sliding_window": 5, "norm_topk_prob": True},
    ),
    "qwen3_moe": ("Qwen3Moe", DENSE | EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3_moe_bias_window_tied": (
        "Qwen3Moe",
        DENSE
        | EXPERTS
        | {"attention_bias": True, "use_sliding_window": True, "sliding_window": 6}
        | {"tie_word_embeddings": True, "head_dim": 18},
    ),
    "olmoe": ("Olmoe", OLMOE),
    "olmoe_clip_bias": ("Olmoe", OLMOE | {"clip_qkv": 0.8, "attention_bias": True}),
    "deepseek_v2_lite": ("DeepseekV2", V2 | {"q_lora_rank": None, "first_k_dense_replace": 1}),
    "deepseek_v2_groups_yarn": (
        "DeepseekV2",
        V2
        | GROUPS
        | {"topk_method": "group_limited_greedy", "n_routed_experts": 8, "q_lora_rank": 20}
        | {"routed_scaling_factor": 3.0, "attention_bias": True, "rope_parameters": DEEPSEEK_YARN},
    ),
    "deepseek_v3": ("DeepseekV3", V3 | GROUPS | {"first_k_dense_replace": 1}),
    "deepseek_v3_yarn_tied": (
        "DeepseekV3",
        V3
        | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False}
        | {"first_k_dense_replace": 0, "rope_parameters": DEEPSEEK_YARN}
        | {"tie_word_embeddings": True},
    ),
    "gpt_oss": ("GptOss", GPT_OSS | {"rope_parameters": YARN | {"truncate": False}}),
    "gpt_oss_one_kind": (
        "GptOss",
        GPT_OSS
        | {"layer_types": ["full_attention"] * 3, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    ),
    "llama": ("Llama", DENSE | {"rope_parameters": LLAMA3}),
    "llama_bias_tied": (
        "Llama",
        DENSE
        | {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 14}
        | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 9000.0}},
    ),
    "qwen3": (
        "Qwen3",
        DENSE
        | {"head_dim": 10, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
}


def make(case: str, **options) -> nn.Module:
    """Return transformers' model of a case; norms, biases and sinks are random."""
    name, own = CASES[case]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**{**BASE, **own, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1 or parameter.shape[-1] == 1:
            nn.init.normal_(parameter, float(parameter.detach().mean()), 0.2)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    return model


def save(case: str, folder: Path, **options) -> nn.Module:
    """Save a case's model as transformers does, and return it."""
    model = make(case, **options)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def assert_same_model(
    found: nn.Module, expected: nn.Module, ids: torch.Tensor, moved: float = 0.0
) -> None:
    """Weights are the same bit for bit (or within ``moved``), and logits to the last digits.

    Logits differ because MKL and oneDNN change the order of summation with the alignment of a
    matrix (multiples of 4 to 32 bytes), and the heap and a mapped file differ in it.
    """
    weights, right = dict(found.named_parameters()), dict(expected.named_parameters())
    assert weights.keys() == right.keys()
    for name, weight in right.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=moved)
    logits = expected.eval()(ids).logits
    atol = float(logits.abs().max()) * (2e-5 if logits.dtype == torch.float32 else 2e-2)
    torch.testing.assert_close(found.eval()(ids).logits, logits, rtol=0, atol=atol)
