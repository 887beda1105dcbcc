"""Against the peft library, where it is installed: its folders here, and ours there."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import moeyard
from moeyard.training.__main__ import main
from moeyard.training.checkpoints.export_adapter import export_adapter

from hf_families import save

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.slow
VOCABULARY = 260
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = r".*self_attn.*_proj(_with_mqa)?"
CASES = ("mixtral", "qwen3_moe", "deepseek_v3", "qwen2_moe", "deepseek_v2_lite", "olmoe", "gpt_oss")


def ids_of(rows=2, length=23):
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(0))


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def saved_by_peft(model, folder, **options):
    """Save an adapter of random numbers as peft does, and return peft's model."""
    config = peft.LoraConfig(r=4, lora_alpha=8, **options)
    tuned = peft.get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(folder)
    return tuned


def compare(what, found, expected, base):
    """Print and check the largest difference of logits."""
    difference, change = (found - expected).abs().max(), (expected - base).abs().max()
    print(f"{what}: largest difference {difference:.1e}, the adapter changes {change:.2f}")
    assert change > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


OPTIONS = {
    "attention": {"target_modules": ATTENTION},
    "experts": {"target_modules": [], "target_parameters": FUSED},
    "both": {
        "target_modules": ATTENTION,
        "target_parameters": FUSED,
        "rank_pattern": {"mlp.experts.down_proj": 3, "o_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.o_proj": 5},
    },
    "rslora": {"target_modules": ATTENTION, "target_parameters": FUSED[:1], "use_rslora": True},
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_pefts_adapter_has_its_logits_here(tmp_path, case, kind):
    base = save(case, tmp_path / "base")
    ids = ids_of()
    before = logits(base, ids)
    tuned = saved_by_peft(base, tmp_path / "adapter", **OPTIONS[kind])
    model = moeyard.load(tmp_path / "base", adapters={"a": tmp_path / "adapter"})
    compare(f"peft -> moeyard {case} {kind}", model(ids, adapter="a"), logits(tuned, ids), before)
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-4)
    offloaded = moeyard.load(
        tmp_path / "base", adapters={"a": tmp_path / "adapter"}, expert_memory="50%"
    )
    assert offloaded(ids, adapter="a").equal(model(ids, adapter="a"))
    # With a cache, single rows take other products; DeepSeek's latent ones most of all.
    greedy = model.generate(ids, 8, temperature=0, ignore_eos=True, adapter="a")
    first = ids.shape[1]
    assert logits(tuned, greedy)[:, first - 1 : -1].argmax(-1).equal(greedy[:, first:])


def test_pefts_adapter_of_dense_mlps_and_shared_experts_has_its_logits_here(tmp_path):
    for case in ("qwen3_moe", "qwen2_moe", "deepseek_v3"):
        root = tmp_path / case
        base = save(case, root / "base")
        before = logits(base, ids_of())
        modules = r".*mlp(\.shared_experts?)?\.(gate|up|down)_proj"
        tuned = saved_by_peft(base, root / "adapter", target_modules=modules)
        model = moeyard.load(root / "base", adapters={"a": root / "adapter"})
        found, expected = model(ids_of(), adapter="a"), logits(tuned, ids_of())
        compare(f"peft -> moeyard {case} dense and shared", found, expected, before)


@pytest.mark.parametrize("targets", ["[attention]", "[experts]", "[attention, experts]"])
@pytest.mark.parametrize("case", CASES[:3])
def test_our_adapter_has_its_logits_in_peft(config_file, tmp_path, case, targets):
    base = save(case, tmp_path / "base", vocab_size=VOCABULARY)
    before = logits(base, ids_of())
    given = ["optimizer.lr=0.05", "train.steps=4", "train.parameters=lora"]
    given += [f"lora={{rank: 3, alpha: 5, targets: {targets}}}"]
    run = [f"run_dir={tmp_path}/run", f"start_from={tmp_path}/base", "model=null"]
    if case == "deepseek_v3":
        run[-1] = "model={moe: {router: {bias_update_rate: 0.0}}}"
    assert main([str(config_file), *run, *given]) == 0
    export_adapter(tmp_path / "run", tmp_path / "adapter")
    ours = moeyard.load(tmp_path / "base", adapters={"a": tmp_path / "adapter"})
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(opened, tmp_path / "adapter")
    found, expected = ours(ids_of(), adapter="a"), logits(theirs, ids_of())
    compare(f"moeyard -> peft {case} {targets}", found, expected, before)
