"""Channels of experts that count as 0: sparsity, perplexity, bytes read and speed.

    python benchmarks/expert_sparsity.py curve --model MODEL --text TRAIN.txt --held-out HELD.txt
    python benchmarks/expert_sparsity.py relu
    python benchmarks/expert_sparsity.py kernel

``curve`` measures thresholds on TRAIN.txt and everything else on HELD.txt: shares of channels that
count as 0 on the dense model's rows, perplexity of the model that skips, bytes of expert weights
that a row reads, and the same in whole pages of 4 KiB of a file with each channel's row of up and
column of down side by side. ``relu`` checks that the exact mode gives the bits of a random model
with relu gates. ``kernel`` runs a layer of random experts. Speeds are medians of interleaved
runs.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from offloading_models import RandomWeights

import moeyard
from moeyard.kernels.values.activation import gated
from moeyard.kernels.values.channel_weights import (
    ChannelExpertWeights,
    ChannelLimits,
    gate_values,
)
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.waves import start_waves
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.families.table import FAMILIES
from moeyard.moe.folders.hf_config import to_hf
from moeyard.moe.folders.write_weights import plan_weights
from moeyard.moe.folders.writer import write_model_folder
from moeyard.moe.routers.topk import TopK
from moeyard.serving.evaluation.held_out_text import score_text
from moeyard.serving.evaluation.measure_sparsity import ScoreSizes, observing
from moeyard.serving.experts.sparsity import KINDS, SCORES, save_sparsity
from moeyard.training.data.tokenizer import ByteTokenizer

from report import write_results
from turns import interleaved, timed

TARGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
WAYS = [(score, "uniform") for score in SCORES] + [("teal", "greedy"), ("wina", "greedy")]
"""Scores, and how a target is shared between the products of a layer."""
TIMED = (("teal", "uniform"), ("cats", "uniform"))
WINDOW = 256
PAGE_BYTES = 4096
TOKENS = 32
D_MODEL, D_EXPERT, EXPERTS, CHOICES = 2048, 1024, 24, 8


class Shares:
    """Counts what counts as 0, for several files in one pass over a text."""

    def __init__(self, files):
        self.files = files
        self.below = {name: {} for name in files}
        self.all = {}
        self.pages = {name: [0, 0] for name in files}

    def see(self, layer, expert, experts, x_nD, h_nH):
        values = {
            "x": x_nD,
            "gate": gate_values(h_nH, experts.activation),
            "act": gated(h_nH, experts.activation),
        }
        for kind, found in values.items():
            self.all[kind] = self.all.get(kind, 0) + found.numel()
        for name, sparsity in self.files.items():
            limits = sparsity.limits(layer, x_nD.shape[1], h_nH.shape[1] // 2)
            for kind in KINDS[sparsity.score]:
                limit = {"x": limits.x_ED, "gate": limits.gate_EF, "act": limits.act_EF}[kind]
                below_nC = values[kind].float().abs() <= limit[expert]
                counts = self.below[name]
                counts[kind] = counts.get(kind, 0) + int(below_nC.sum())
                if kind == "gate":
                    self._count_pages(name, ~below_nC, x_nD)

    def _count_pages(self, name, live_nF, x_nD):
        """A file with each channel's up row and down column side by side, read by pages."""
        channel_bytes = 2 * x_nD.shape[1] * 2  # bf16
        together = max(1, PAGE_BYTES // channel_bytes)
        rest = live_nF.shape[1] // together * together
        self.pages[name][0] += int(live_nF[:, :rest].unflatten(1, (-1, together)).any(-1).sum())
        self.pages[name][1] += live_nF.shape[0] * rest // together

    def of(self, name):
        return {kind: count / self.all[kind] for kind, count in self.below[name].items()}


def share_read(shares):
    """Return the share of an expert's bytes that one row reads."""
    if "gate" in shares:
        return 1 / 3 + 2 / 3 * (1 - shares["gate"])
    return 2 / 3 * (1 - shares["x"]) + 1 / 3 * (1 - shares["act"])


def generate(model, tokens=TOKENS):
    prompt = torch.tensor([list(b"The history of the town begins")])
    return model.generate(prompt, tokens, temperature=0, ignore_eos=True)


def curve(arguments, text, held_out, out):
    """Measure every score and target on a trained model."""
    folder, targets = arguments.model, arguments.targets
    dense = moeyard.load(folder)
    sizes = {score: ScoreSizes(dense, text, score, WINDOW) for score in SCORES}
    files = {(*way, t): sizes[way[0]].at(t, way[1]) for way in WAYS for t in targets}
    shares = Shares(files)
    with observing(dense, shares):
        base = score_text(dense, held_out, WINDOW).perplexity
    rows, models = [], {"dense": dense}
    for (score, allocation, target), sparsity in files.items():
        path = out / f"{score}-{allocation}-{target:g}"
        save_sparsity(path, sparsity)
        model = moeyard.load(folder, expert_sparsity=path)
        perplexity = score_text(model, held_out, WINDOW).perplexity
        found = shares.of((score, allocation, target))
        row = {"score": score, "allocation": allocation, "target": target, "shares": found}
        row["perplexity"] = perplexity
        row["loss"] = perplexity / base - 1
        row["bytes_read"] = share_read(found)
        if "gate" in found:
            live, pages = shares.pages[score, allocation, target]
            row["pages_read"] = 1 / 3 + 2 / 3 * live / pages
        rows.append(row)
        if target in (0.4, 0.6) and (score, allocation) in TIMED:
            models[f"{score} {target:g}"] = model
    seconds = {}
    if arguments.rounds:
        runs = {name: timed(partial(generate, model)) for name, model in models.items()}
        seconds = interleaved(runs, arguments.rounds)
    return {
        "perplexity": base,
        "rows": rows,
        "tokens_per_s": {name: TOKENS / s for name, s in seconds.items()},
    }


def random_experts():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16) * 0.02

    return random(EXPERTS, 2 * D_EXPERT, D_MODEL), random(EXPERTS, D_MODEL, D_EXPERT)


def kernel_alone(num_rows, rounds):
    """Return milliseconds of one layer for ``num_rows`` rows, by layout and share left out."""
    fc1, fc2 = random_experts()
    stored = {
        False: (fc1, fc2.mT.contiguous()),
        True: (fc1.mT.contiguous(), fc2.mT.contiguous()),
    }
    x_TD = torch.randn(num_rows, D_MODEL, generator=torch.Generator().manual_seed(1)).bfloat16()
    h_NF = (x_TD[:1].float() @ fc1[0].float().mT).flatten()
    gate_F = torch.nn.functional.silu(h_NF[:D_EXPERT])
    act_F = gate_F * h_NF[D_EXPERT:]
    kinds = {"dense": ExpertWeights(fc1, fc2)}

    def limits(values, share, width):
        limit = float(values.float().abs().flatten().quantile(share))
        return torch.full((EXPERTS, width), limit)

    for share in (0.4, 0.7, 0.9):
        gate = ChannelLimits(gate_EF=limits(gate_F, share, D_EXPERT))
        both = ChannelLimits(
            x_ED=limits(x_TD[:1], share, D_MODEL), act_EF=limits(act_F, share, D_EXPERT)
        )
        kinds[f"cats {share}"] = ChannelExpertWeights(*stored[False], limits=gate)
        kinds[f"teal {share}"] = ChannelExpertWeights(*stored[True], by_input=True, limits=both)
    spread = float(h_NF.std())
    for share in (0.5, 0.7, 0.9):
        shift = -spread * float(torch.distributions.Normal(0, 1).icdf(torch.tensor(share)))
        bias_SH = torch.zeros(EXPERTS, 2 * D_EXPERT, dtype=torch.bfloat16)
        bias_SH[:, :D_EXPERT] = shift
        biases = {"fc1_bias_SH": bias_SH, "fc2_bias_SD": bias_SH[:, :D_MODEL] * 0}
        kinds[f"relu {share}, rows of up"] = ExpertWeights(fc1, fc2, activation="reglu", **biases)
        kinds[f"relu {share}, exact"] = ChannelExpertWeights(
            *stored[False], activation="reglu", **biases
        )
    kinds["by channel, nothing left out"] = ChannelExpertWeights(*stored[False])
    generator = torch.Generator().manual_seed(2)

    @torch.inference_mode()
    def run(experts):
        scores_TE = torch.rand(num_rows, EXPERTS, generator=generator)
        weights_TK, experts_TK = scores_TE.topk(CHOICES)
        waves = start_waves(x_TD, experts_TK.int(), weights_TK, EXPERTS)
        waves.add(experts)
        return waves.result()

    seconds = interleaved({name: timed(partial(run, e)) for name, e in kinds.items()}, rounds)
    return {name: 1000 * s for name, s in seconds.items()}


def write_model(folder, activation):
    """Write a random model; the weights do not depend on the activation."""
    moe = MoEConfig(num_experts=16, d_expert=512, router=TopK(k=4), activation=activation)
    sizes = {"d_model": 1024, "num_layers": 4, "num_heads": 8, "max_positions": 1024}
    config = ModelConfig(vocab_size=257, moe=moe, **sizes)
    ids = {"eos_token_id": ByteTokenizer.eos_id}
    values = to_hf(config, "bfloat16", ids)
    family, weights = FAMILIES[values["model_type"]], RandomWeights(config, torch.bfloat16)
    plans = plan_weights(config, family, weights, torch.bfloat16, torch.float32)
    write_model_folder(folder, values, plans, ByteTokenizer().save, ids)


def relu(out, held_out, rounds):
    """Return zeros, bits and speed of a model with relu gates, next to one that skips nothing."""
    for activation in ("swiglu", "reglu"):
        write_model(out / activation, activation)
    dense, plain = moeyard.load(out / "swiglu"), moeyard.load(out / "reglu")
    exact = moeyard.load(out / "reglu", expert_sparsity="exact")
    counter = _Zeros()
    with observing(plain, counter):
        score_text(plain, held_out, WINDOW)
    ids_BT = torch.tensor([list(held_out.encode()[:WINDOW])])
    same = torch.equal(plain(ids_BT), exact(ids_BT))
    same = same and torch.equal(generate(plain), generate(exact))
    models = {"silu, nothing to skip": dense, "relu, rows of up": plain, "relu, exact": exact}
    seconds = interleaved(
        {name: timed(partial(generate, model)) for name, model in models.items()}, rounds
    )
    return {
        "zeros": counter.zeros / counter.all,
        "same_bits": same,
        "tokens_per_s": {name: TOKENS / s for name, s in seconds.items()},
    }


class _Zeros:
    def __init__(self):
        self.zeros = self.all = 0

    def see(self, layer, expert, experts, x_nD, h_nH):
        gate_nF = h_nH.chunk(2, dim=-1)[0]
        self.zeros += int((gate_nF <= 0).sum())
        self.all += gate_nF.numel()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("curve", "relu", "kernel"))
    parser.add_argument("--model", type=Path, help="for curve")
    parser.add_argument("--text", type=Path, help="for curve")
    parser.add_argument("--held-out", type=Path, help="for curve")
    parser.add_argument("--characters", type=int, nargs=2, default=(60_000, 20_000))
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--rounds", type=int, default=7, help="0 = no speeds, for curve")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as out:
        found = PARTS[arguments.part](arguments, Path(out))
    write_results(f"expert_sparsity_{arguments.part}", found)


def run_curve(arguments, out):
    sizes = arguments.characters
    text = arguments.text.read_text(encoding="utf-8")[: sizes[0]]
    held_out = arguments.held_out.read_text(encoding="utf-8")[: sizes[1]]
    found = curve(arguments, text, held_out, out)
    print(f"thresholds from {sizes[0]} characters, perplexity on {sizes[1]}")
    print(f"dense perplexity {found['perplexity']:.4f}")
    print(f"{'score':14}{'target':>7}{'measured':>18}{'perplexity':>12}{'more':>9}{'bytes':>8}")
    for row in found["rows"]:
        measured = " ".join(f"{kind} {share:.3f}" for kind, share in row["shares"].items())
        name = row["score"] + (" greedy" if row["allocation"] == "greedy" else "")
        pages = f"  in pages {row['pages_read']:.0%}" if "pages_read" in row else ""
        print(
            f"{name:14}{row['target']:7.1f}{measured:>18}{row['perplexity']:12.4f}"
            f"{row['loss']:9.2%}{row['bytes_read']:8.0%}{pages}"
        )
    for name, speed in found["tokens_per_s"].items():
        print(f"{name:12}{speed:8.1f} tokens/s")
    return found


def run_relu(arguments, out):
    found = relu(out, "The exact mode changes nothing. " * 16, arguments.rounds)
    print(f"gates at 0: {found['zeros']:.1%}; same bits: {found['same_bits']}")
    for name, speed in found["tokens_per_s"].items():
        print(f"{name:24}{speed:8.1f} tokens/s")
    return found


def run_kernel(arguments, _):
    found = {}
    for rows in (1, 4):
        found[f"{rows} rows"] = times = kernel_alone(rows, arguments.rounds)
        print(f"one layer, d_model {D_MODEL}, d_expert {D_EXPERT}, k {CHOICES}, rows {rows}")
        for name, ms in times.items():
            print(f"  {name:32}{ms:8.2f} ms {ms / times['dense']:6.2f}")
    return found


PARTS = {"curve": run_curve, "relu": run_relu, "kernel": run_kernel}

if __name__ == "__main__":
    main()
