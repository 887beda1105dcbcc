"""SmallThinker, which transformers does not have, against its formulas.

The technical report's section 2 with the details of llama.cpp's and PowerInfer's graphs: the router
reads the residual before its norm; sigmoid (or softmax) over the chosen logits, divided by their
sum; ReGLU; lists of rotated and of windowed layers.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import moeyard
from moeyard.moe.folders.convert import convert

D, LAYERS, HEADS, KV, H, E, K, F_EXPERT, V = 40, 4, 6, 2, 10, 5, 3, 24, 61
WINDOW, THETA, EPS = 5, 5000.0, 1e-6
VALUES = {
    "model_type": "smallthinker",
    "architectures": ["SmallThinkerForCausalLM"],
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": H,
    "max_position_embeddings": 128,
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "moe_num_primary_experts": E,
    "moe_num_active_primary_experts": K,
    "moe_ffn_hidden_size": F_EXPERT,
    "moe_enable_secondary_experts": False,
    "moe_layer_layout": [1] * LAYERS,
    "rope_layout": [0, 1, 1, 0],
    "sliding_window_layout": [0, 1, 1, 1],
    "sliding_window_size": WINDOW,
    "tie_word_embeddings": True,
    "dtype": "float32",
}


def write(folder, uses_softmax: bool) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)

    def matrix(*shape):
        return torch.randn(*shape, generator=g) * 1.5 * shape[-1] ** -0.5

    tensors = {"model.embed_tokens.weight": matrix(V, D) * 4, "model.norm.weight": matrix(D) + 1}
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        tensors |= {f"{p}{name}.weight": matrix(D) + 1 for name in ("input_layernorm",)}
        tensors[f"{p}post_attention_layernorm.weight"] = matrix(D) + 1
        for name, rows in (("q", HEADS * H), ("k", KV * H), ("v", KV * H)):
            tensors[f"{p}self_attn.{name}_proj.weight"] = matrix(rows, D)
        tensors[f"{p}self_attn.o_proj.weight"] = matrix(D, HEADS * H)
        tensors[f"{p}block_sparse_moe.primary_router.weight"] = matrix(E, D)
        for e in range(E):
            for name, shape in (("gate", (F_EXPERT, D)), ("up", (F_EXPERT, D))):
                tensors[f"{p}block_sparse_moe.experts.{e}.{name}.weight"] = matrix(*shape)
            tensors[f"{p}block_sparse_moe.experts.{e}.down.weight"] = matrix(D, F_EXPERT)
    folder.mkdir()
    values = VALUES | {"moe_primary_router_apply_softmax": uses_softmax}
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def norm(x, weight):
    return weight * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def rotated(x_LHh):
    angles = torch.arange(len(x_LHh)).unsqueeze(-1) * THETA ** (-torch.arange(0, H, 2) / H)
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    first, second = x_LHh[..., : H // 2], x_LHh[..., H // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(x, w, layer):
    q, k, v = (
        (x @ w[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (heads, H))
        for n, heads in (("q", HEADS), ("k", KV), ("v", KV))
    )
    if VALUES["rope_layout"][layer]:
        q, k = rotated(q), rotated(k)
    out = torch.zeros_like(q)
    for t in range(len(x)):
        first = max(0, t - WINDOW + 1) if VALUES["sliding_window_layout"][layer] else 0
        for head in range(HEADS):
            group = head * KV // HEADS
            scores = k[first : t + 1, group] @ q[t, head] * H**-0.5
            out[t, head] = scores.softmax(-1) @ v[first : t + 1, group]
    return out.flatten(-2) @ w["self_attn.o_proj.weight"].T


def forward(tensors, ids, uses_softmax):
    x = tensors["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        w = {name.removeprefix(p): t for name, t in tensors.items() if name.startswith(p)}
        logits = x @ w["block_sparse_moe.primary_router.weight"].T  # the residual as it comes in
        h = x + attention(norm(x, w["input_layernorm.weight"]), w, layer)
        n = norm(h, w["post_attention_layernorm.weight"])
        x = h.clone()
        for t in range(len(ids)):
            best, chosen = logits[t].topk(K)
            weights = best.softmax(-1) if uses_softmax else best.sigmoid() / best.sigmoid().sum()
            for weight, e in zip(weights, chosen.tolist(), strict=True):
                gate, up, down = (
                    w[f"block_sparse_moe.experts.{e}.{part}.weight"]
                    for part in ("gate", "up", "down")
                )
                x[t] += weight * (down @ (F.relu(gate @ n[t]) * (up @ n[t])))
    return norm(x, tensors["model.norm.weight"]) @ tensors["model.embed_tokens.weight"].T


@pytest.mark.parametrize("uses_softmax", [False, True], ids=["sigmoid", "softmax"])
def test_logits_and_cached_steps_are_the_formulas(tmp_path, uses_softmax):
    tensors = write(tmp_path / "m", uses_softmax)
    ids = torch.randint(0, V, (23,), generator=torch.Generator().manual_seed(1))
    expected = forward(tensors, ids, uses_softmax)
    model = moeyard.load(tmp_path / "m")
    assert expected.abs().max() > 1
    assert (model(ids.unsqueeze(0))[0] - expected).abs().max() <= 1e-4
    greedy = model.generate(ids.unsqueeze(0), max_new_tokens=16, temperature=0)[0]
    best = forward(tensors, greedy, uses_softmax).argmax(-1)
    assert torch.equal(greedy[23:], best[22:-1])


def test_the_export_has_the_same_tensors_and_the_same_meaning(tmp_path):
    tensors = write(tmp_path / "m", uses_softmax=False)
    assert convert(tmp_path / "m", tmp_path / "again") == "smallthinker"
    written = load_file(tmp_path / "again/model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    first, second = moeyard.load(tmp_path / "m"), moeyard.load(tmp_path / "again")
    assert first.config == second.config
