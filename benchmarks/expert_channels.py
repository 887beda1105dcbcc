"""Experts laid out by channel: bytes read and speed next to whole experts, on a paced disk.

    python benchmarks/expert_channels.py --model MODEL --held-out HELD.txt
    python benchmarks/expert_channels.py --made 0.85 --held-out HELD.txt

MODEL has relu gates, or ``--sparsity FILE`` is one of ``moeyard sparsity`` for it. ``--made``
writes a random model in bf16 with relu gates of which about this share is 0: all embeddings have a
common part, which gates are turned away from. The model is converted with ``--expert-layout
channels``.

Each arm continues the same prompts from HELD.txt, one token at a time, with a share of the experts
in memory and from a disk of ``--mb-s`` MB/s (paced_disk.py). The arms run in turns; speeds are
medians over the prompts. Every answer is compared with that of the model in memory, which skips the
same channels.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from offloading_models import RandomWeights
from paced_disk import PacedDisk

import moeyard
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.channel_layout import channels_in_group
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.families.native import NATIVE
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.hf_config import to_hf
from moeyard.moe.folders.write_weights import plan_weights
from moeyard.moe.folders.writer import write_model_folder
from moeyard.moe.routers.topk import TopK
from moeyard.serving.evaluation.held_out_text import score_text
from moeyard.serving.evaluation.measure_sparsity import observing
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.sparsity import EXACT, open_sparsity
from moeyard.serving.loading import open_model
from moeyard.training.data.tokenizer import ByteTokenizer

from report import write_results

PROMPT = 48
WINDOW = 256


class SparseWeights(RandomWeights):
    """Weights whose gates are 0 for about a share of channels."""

    def __init__(self, config, share):
        super().__init__(config, torch.bfloat16)
        # Entries of embeddings have size 1, the common part 1, so a norm leaves 0.7 of it.
        self.turn = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(share)))
        self.turn /= 0.5**0.5 * config.d_model

    def dense(self, parameter):
        weights = super().dense(parameter)
        return weights + 1 if parameter == "embed_tokens.weight" else weights

    def expert_part(self, layer, expert, part):
        weights = super().expert_part(layer, expert, part)
        return weights - self.turn if part == "gate" else weights


def write_made(folder, share):
    """Write a random model with relu gates."""
    moe = MoEConfig(num_experts=16, d_expert=128, router=TopK(k=4), activation="reglu")
    sizes = {"d_model": 1024, "num_layers": 4, "num_heads": 8, "max_positions": 1024}
    config = ModelConfig(vocab_size=257, moe=moe, **sizes)
    ids = {"eos_token_id": ByteTokenizer.eos_id}
    values = to_hf(config, "bfloat16", ids, why_ours="It is a benchmark's.")
    weights = SparseWeights(config, share)
    plans = plan_weights(config, NATIVE, weights, torch.bfloat16, torch.float32)
    write_model_folder(folder, values, plans, ByteTokenizer().save, ids)
    return folder


class Zeros:
    """Counts channels that a row does not need, and groups of the layout likewise."""

    def __init__(self, sparsity, group):
        self.sparsity, self.group = sparsity, group
        self.channels, self.groups, self.rows = 0.0, 0.0, 0

    def see(self, layer, expert, _experts, x_nD, h_nH):
        gate_nF = h_nH.chunk(2, dim=-1)[0].float()
        limits = self.sparsity.limits(layer, x_nD.shape[1], gate_nF.shape[1])
        act_nF = gate_nF.relu() if limits is None else torch.nn.functional.silu(gate_nF).abs()
        limit_F = 0 if limits is None else limits.gate_EF[expert]
        dead_nF = act_nF <= limit_F
        self.rows += len(dead_nF)
        self.channels += float(dead_nF.float().mean(1).sum())
        whole = dead_nF.shape[1] // self.group * self.group
        dead_nG = dead_nF[:, :whole].unflatten(1, (-1, self.group)).all(-1)
        self.groups += float(dead_nG.float().mean(1).sum())


def zeros(folder, sparsity_name, text):
    """Return the shares of channels and of groups that one row does not need."""
    files = ModelFolder(folder)
    group = channels_in_group(files.config.d_model, files.dtype)
    counter = Zeros(open_sparsity(files, sparsity_name), group)
    files.close()
    model = moeyard.load(folder)
    with observing(model, counter):
        score_text(model, text, WINDOW)
    return {
        "channels_of_group": group,
        "channels": counter.channels / counter.rows,
        "groups": counter.groups / counter.rows,
    }


class Arm:
    """One way to read experts."""

    def __init__(self, folder, share, sparsity):
        options = StoreOptions(sparsity=sparsity, reader="buffered")
        self.model, self.store = open_model(folder, expert_memory=f"{share}%", options=options)
        self.seconds, self.is_same, self.before = [], True, self.counts()

    def counts(self):
        layers = self.store.statistics.layers.values()
        names = ("hits", "misses", "filled", "bytes_read", "channel_bytes", "stall_s")
        return {name: sum(getattr(layer, name) for layer in layers) for name in names}

    def run(self, prompt_BT, tokens, expected_BT):
        started = time.perf_counter()
        found_BT = generate(self.model, prompt_BT, tokens)
        self.seconds.append(time.perf_counter() - started)
        self.is_same &= torch.equal(found_BT, expected_BT)

    def result(self, tokens):
        spent = {name: n - self.before[name] for name, n in self.counts().items()}
        all_tokens = tokens * len(self.seconds)
        return {
            "kib_a_token": spent["bytes_read"] / all_tokens / 1024,
            "channel_kib_a_token": spent["channel_bytes"] / all_tokens / 1024,
            "hits": spent["hits"] / (spent["hits"] + spent["misses"]),
            "filled_a_token": spent["filled"] / all_tokens,
            "stall_share": spent["stall_s"] / sum(self.seconds),
            "tokens_per_s": tokens / statistics.median(self.seconds),
            "same_answers": self.is_same,
        }


def generate(model, prompt_BT, tokens):
    return model.generate(prompt_BT, tokens, temperature=0, ignore_eos=True)


def measure(folders, share, arguments, prompts, expected):
    """Return the result of each arm with a share of the experts in memory."""
    ways = {
        "matrices": (folders["matrices"], None if arguments.sparsity == EXACT else "same"),
        "matrices, skipped in memory": (folders["matrices"], "same"),
        "channels": (folders["channels"], "same"),
    }
    if arguments.sparsity != EXACT:
        del ways["matrices"]  # its answers are others
    arms = {
        name: Arm(folder, share, arguments.sparsity if sparsity else None)
        for name, (folder, sparsity) in ways.items()
    }
    for prompt_BT, expected_BT in zip(prompts, expected, strict=True):
        for arm in arms.values():
            arm.run(prompt_BT, arguments.tokens, expected_BT)
    found = {name: arm.result(arguments.tokens) for name, arm in arms.items()}
    for arm in arms.values():
        arm.store.close()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path)
    source.add_argument("--made", type=float, metavar="SHARE")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--name", default="expert_channels", help="of the results")
    parser.add_argument("--sparsity", default=EXACT)
    parser.add_argument("--mb-s", type=float, nargs="+", default=(60, 500))
    parser.add_argument("--shares", type=int, nargs="+", default=(25, 50))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--characters", type=int, default=20_000, help="for the shares left out")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    text = arguments.held_out.read_text(encoding="utf-8")
    step = len(text) // arguments.prompts
    prompts = [
        torch.tensor([list(text[at * step :].encode()[:PROMPT])]) for at in range(arguments.prompts)
    ]
    with tempfile.TemporaryDirectory() as out:
        model = arguments.model or write_made(Path(out) / "made", arguments.made)
        folders = {"matrices": model, "channels": Path(out) / "channels"}
        convert(model, folders["channels"], by_channel=True)
        resident = moeyard.load(model, expert_sparsity=arguments.sparsity)
        found = {"left_out": zeros(model, arguments.sparsity, text[: arguments.characters])}
        expected = [generate(resident, prompt, arguments.tokens) for prompt in prompts]
        disk = PacedDisk()
        for rate in arguments.mb_s:
            disk.bytes_per_s = rate * 1e6
            for share in arguments.shares:
                case = f"{rate:g} MB/s, {share} % in memory"
                found[case] = measure(folders, share, arguments, prompts, expected)
        disk.bytes_per_s = None
    show(found)
    write_results(arguments.name, found)


def show(found):
    left = found["left_out"]
    print(
        f"one row does not need {left['channels']:.1%} of channels, {left['groups']:.1%} of groups"
    )
    print(f"(of {left['channels_of_group']} channels)")
    for case, arms in found.items():
        if case == "left_out":
            continue
        print(case)
        for name, row in arms.items():
            print(
                f"  {name:28}{row['kib_a_token']:9.1f} KiB/token ({row['channel_kib_a_token']:.1f} "
                f"of channels) hits {row['hits']:.1%} filled {row['filled_a_token']:.2f}/token "
                f"{row['tokens_per_s']:7.1f} tokens/s, waits {row['stall_share']:.0%}, "
                f"{'same answers' if row['same_answers'] else 'OTHER ANSWERS'}"
            )


if __name__ == "__main__":
    main()
