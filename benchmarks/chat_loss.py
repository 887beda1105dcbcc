"""The loss of a run on 200 conversations against transformers' and TRL's on the same tokens.

    python benchmarks/chat_loss.py [--trl PYTHON_WITH_TRL]

The first batch is the whole training file, so that nothing has to be matched but the file. The
model is a small Qwen3-MoE with random weights, bytes are the tokenizer, and the template is
configs/train/chat.jinja.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeyard.training.checkpoints.export import export
from moeyard.training.data.chat_windows import ChatWindows
from moeyard.training.data.tokenizer import ByteTokenizer

from report import environment

ROOT = Path(__file__).parent.parent
TEMPLATE = ROOT / "configs" / "train" / "chat.jinja"
LENGTH = 1024
STEPS = 10
KINDS = {"full": [], "LoRA": ["train.parameters=lora"], "routers": ["train.parameters=router"]}


def conversation(draw: random.Random, number: int) -> list[dict[str, str]]:
    """Return a conversation of one to three turns, some with a system message; none is a copy."""
    messages = []
    if draw.random() < 0.3:
        messages.append({"role": "system", "content": "Answer in one sentence."})
    for _ in range(draw.randint(1, 3)):
        size = draw.choice(["red", "green", "large", "quiet"])
        thing = draw.choice(["fox", "river", "engine", "garden", "café"])
        messages.append({"role": "user", "content": f"What is a {size} {thing}?"})
        answer = f"A {size} {thing} is a {thing} that is {size}, number {number}."
        messages.append({"role": "assistant", "content": answer})
    return messages


def write_files(folder: Path) -> tuple[Path, Path, Path]:
    """Write a model folder and two files of conversations: all 200, and those held out."""
    draw = random.Random(0)
    train, held_out = folder / "train.jsonl", folder / "held-out.jsonl"
    for path, count in ((train, 180), (held_out, 20)):
        lines = [
            json.dumps({"messages": conversation(draw, 1000 * count + i)}) for i in range(count)
        ]
        path.write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=LENGTH,
        eos_token_id=256,
        router_aux_loss_coef=0.0,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "model")
    ByteTokenizer().save(folder / "model")
    shutil.copy(TEMPLATE, folder / "model" / "chat_template.jinja")
    return folder / "model", train, held_out


def reference(model_dir: Path, path: Path) -> tuple[float, int]:
    """Return transformers' mean loss over the assistant's tokens, and how many there are."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for line in path.read_text().splitlines():
        given = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor(given["input_ids"])
        labels = torch.where(torch.tensor(given["assistant_masks"]).bool(), ids, -100)
        with torch.no_grad():
            scores = model(ids[None]).logits[0, :-1]
        total += float(F.cross_entropy(scores, labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    return total / count, count


def run(folder: Path, model_dir: Path, train: Path, held_out: Path, *more: str) -> list[dict]:
    """Train with ``moeyard train`` and return the records."""
    run_dir = folder / f"run-{len(list(folder.glob('run-*')))}"
    data = f"{{format: chat, source: {train}, eval_source: {held_out}, tokenizer: null}}"
    overrides = [f"run_dir={run_dir}", f"start_from={model_dir}", "model=null", f"data={data}"]
    loop = ["train.log_every=1", f"train.sequence_length={LENGTH}", "optimizer.lr=0.01"]
    loop += ["optimizer.warmup_steps=0", "train.eval_sequences=1000"]
    config = str(ROOT / "configs" / "train" / "tiny.yaml")
    command = [sys.executable, "-m", "moeyard.cli", "train", config, *overrides, *loop, *more]
    subprocess.run(command, check=True, capture_output=True)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl", help="a python with TRL")
    arguments = parser.parse_args()
    print(json.dumps(environment()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_dir, train, held_out = write_files(folder)
        run(folder, model_dir, train, held_out, "train.steps=1", "train.batch_sequences=1")
        path = folder / "run-0" / "data" / "chat-train.safetensors"
        num_windows = len(ChatWindows(path, LENGTH, 1, 0, "training"))
        wanted, targets = reference(model_dir, train)
        print(f"transformers {transformers.__version__}: loss {wanted:.7f} of {targets} tokens")
        if arguments.trl:
            command = [arguments.trl, str(Path(__file__).parent / "trl_loss.py")]
            done = subprocess.run(
                [*command, str(model_dir), str(train)], check=True, capture_output=True, text=True
            )
            theirs = json.loads(done.stdout.splitlines()[-1])
            difference = abs(theirs["loss"] / wanted - 1)
            print(
                f"TRL {theirs['trl']}: loss {theirs['loss']:.7f} of {theirs['targets']} tokens, "
                f"relative difference {difference:.1e}"
            )
        for kind, options in KINDS.items():
            batch = [f"train.steps={STEPS}", f"train.batch_sequences={num_windows}"]
            records = run(folder, model_dir, train, held_out, *options, *batch)
            run_dir = sorted(folder.glob("run-*"))[-1]
            export(run_dir, folder / f"{kind}-model")
            trained, _ = reference(folder / f"{kind}-model", held_out)
            first, last = records[0]["loss"], records[-1]["eval_loss"]
            print(
                f"moeyard, {kind}: loss of step 1 {first:.7f}, relative difference to transformers "
                f"{abs(first / wanted - 1):.1e}; held-out after {STEPS} steps {last:.7f}, of its "
                f"export in transformers {trained:.7f}, relative difference "
                f"{abs(last / trained - 1):.1e}"
            )


if __name__ == "__main__":
    main()
