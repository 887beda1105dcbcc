"""Core channels of a prompt (expert-sparsity coreinfer): perplexity, bytes and speed of answers.

    python benchmarks/core_channels.py curve --model MODEL --text TRAIN.txt --held-out HELD.txt
    python benchmarks/core_channels.py choices --model MODEL --held-out HELD.txt
    python benchmarks/core_channels.py layer

``curve`` has cats and teal at the same targets next to it, with thresholds from TRAIN.txt. All are
scored on the second halves of windows; cats and teal leave out channels of the first halves, too.
Bytes are shares of an expert that one row reads. ``choices`` varies what the code fixes: the share
of channels that are a token's core, the fewest rows of an expert with a core, and the length of
prompts. ``layer`` runs a layer of random experts whose prompt has been read. Speeds are medians of
interleaved runs, of CPU time with one thread.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from expert_sparsity import D_EXPERT, D_MODEL, EXPERTS, Shares, random_experts, share_read

import moeyard
from moeyard.kernels.values.channel_weights import ChannelExpertWeights, ChannelLimits
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.row_channels import RowChannels
from moeyard.kernels.waves import start_waves
from moeyard.moe.experts import core_channels
from moeyard.moe.models.generation import GenerationLimits
from moeyard.moe.models.sampling import SamplingParams
from moeyard.serving.evaluation.held_out_text import score_text
from moeyard.serving.evaluation.measure_sparsity import ScoreSizes, observing
from moeyard.serving.experts.sparsity import save_sparsity

from report import write_results
from turns import interleaved

TARGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SCORES = ("cats", "teal")
WINDOW = 256
PROMPT, TOKENS = 128, 65
CHOICES = 8


def clock():
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def decode(model, prompt_T):
    """Return the seconds of an answer's tokens after the first, which comes with the prompt."""
    steps = model.steps([prompt_T], GenerationLimits(TOKENS, SamplingParams(temperature=0)))
    next(steps)
    started = clock()
    for _ in steps:
        pass
    return clock() - started


def score(model, text, length=WINDOW):
    return score_text(model, text, length, second_halves=True)


def curve(arguments, out):
    dense = moeyard.load(arguments.model)
    text, held_out = texts(arguments)
    sizes = {name: ScoreSizes(dense, text, name, WINDOW) for name in arguments.scores}
    files = {(name, t): sizes[name].at(t) for name in sizes for t in arguments.targets}
    shares = Shares(files)
    if files:
        with observing(dense, shares):
            score(dense, held_out)
    base = score(dense, held_out)
    models, rows = {"dense": dense}, []
    for target in arguments.targets:
        core = moeyard.load(arguments.model, expert_sparsity=f"coreinfer:{target}")
        row = {
            "score": "coreinfer",
            "target": target,
            "perplexity": score(core, held_out).perplexity,
        }
        rows.append(row | {"bytes_read": core.decoder.core.share_used})
        models[f"coreinfer {target:g}"] = core
        for name in sizes:
            path = out / f"{name}-{target:g}"
            save_sparsity(path, files[name, target])
            model = models[f"{name} {target:g}"] = moeyard.load(
                arguments.model, expert_sparsity=path
            )
            row = {"score": name, "target": target, "perplexity": score(model, held_out).perplexity}
            rows.append(row | {"bytes_read": share_read(shares.of((name, target)))})
    seconds = {}
    if arguments.rounds:
        prompt_T = torch.tensor(list(held_out.encode()[:PROMPT]))
        timed = ("dense", *(n for n in models if n.split()[-1] in ("0.4", "0.6", "0.8")))
        runs = {name: lambda m=models[name]: decode(m, prompt_T) for name in timed}
        seconds = interleaved(runs, arguments.rounds)
    speeds = {name: (TOKENS - 1) / s for name, s in seconds.items()}
    print(f"dense perplexity {base.perplexity:.4f} on {base.tokens} tokens of second halves")
    print(f"{'score':12}{'target':>7}{'perplexity':>12}{'more':>9}{'bytes':>8}")
    for row in rows:
        loss = row["loss"] = row["perplexity"] / base.perplexity - 1
        head = f"{row['score']:12}{row['target']:7.1f}{row['perplexity']:12.4f}"
        print(f"{head}{loss:9.2%}{row['bytes_read']:8.0%}")
    for name, speed in speeds.items():
        print(f"{name:16}{speed:8.1f} tokens/s {speed / speeds['dense']:6.2f}")
    return {"perplexity": base.perplexity, "rows": rows, "tokens_per_s": speeds}


def choices(arguments, _):
    """Vary one choice at a time."""
    held_out, found = texts(arguments)[1], []
    cases = [{"length": length} for length in (64, 128, 256, 512)]
    cases += [{"TOKEN_SHARE": share} for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]
    cases += [{"FEWEST_ROWS": rows} for rows in (1, 2, 4, 8, 16)]
    defaults = {name: getattr(core_channels, name) for name in ("TOKEN_SHARE", "FEWEST_ROWS")}
    for case in cases:
        length = case.get("length", WINDOW)
        for name, value in (defaults | case).items():
            if name in defaults:
                setattr(core_channels, name, value)
        for target in arguments.targets:
            model = moeyard.load(arguments.model, expert_sparsity=f"coreinfer:{target}")
            row = {
                **case,
                "target": target,
                "perplexity": score(model, held_out, length).perplexity,
            }
            row["bytes_read"] = model.decoder.core.share_used
            found.append(row)
            facts = " ".join(f"{name} {value}" for name, value in case.items())
            print(f"{facts:18} target {target} {row['perplexity']:8.4f} {row['bytes_read']:6.0%}")
    return {"rows": found}


def layer(arguments, _):
    """Return milliseconds of one layer by rows and ways."""
    fc1, fc2 = random_experts()
    plain, stored = ExpertWeights(fc1, fc2), (fc1, fc2.mT.contiguous())
    generator = torch.Generator().manual_seed(2)
    h_H = torch.randn(D_MODEL, generator=generator) @ fc1[0].float().mT
    gate_F = torch.nn.functional.silu(h_H[:D_EXPERT]).abs()
    cats = {}
    for share in (0.4, 0.6, 0.8):
        limits = torch.full((EXPERTS, D_EXPERT), float(gate_F.quantile(share)))
        kept = ChannelLimits(gate_EF=limits)
        cats[share] = ChannelExpertWeights(*stored, limits=kept)
    by_channel, found = ChannelExpertWeights(*stored), {}

    @torch.inference_mode()
    def run(experts, num_rows, used_EF=None):
        x_TD = torch.randn(num_rows, D_MODEL, generator=generator).bfloat16()
        scores_TE = torch.rand(num_rows, EXPERTS, generator=generator)
        weights_TK, experts_TK = scores_TE.topk(CHOICES)
        started = clock()
        channels = None
        if used_EF is not None:
            channels = RowChannels(used_EF.index_select(0, experts_TK.flatten()))
        waves = start_waves(x_TD, experts_TK.int(), weights_TK, EXPERTS, channels)
        waves.add(experts)
        waves.result()
        return clock() - started

    for num_rows in (1, 4):
        runs = {"dense": lambda n=num_rows: run(plain, n)}
        for share, experts in cats.items():
            used_EF = torch.rand(EXPERTS, D_EXPERT, generator=generator) >= share
            runs[f"cats {share}"] = lambda e=experts, n=num_rows: run(e, n)
            runs[f"coreinfer {share}"] = lambda u=used_EF, n=num_rows: run(by_channel, n, u)
        times = interleaved(runs, arguments.rounds)
        found[f"{num_rows} rows"] = {name: 1000 * s for name, s in times.items()}
        print(f"one layer, d_model {D_MODEL}, d_expert {D_EXPERT}, k {CHOICES}, rows {num_rows}")
        for name, s in times.items():
            print(f"  {name:16}{1000 * s:8.2f} ms {s / times['dense']:6.2f}")
    return found


def texts(arguments):
    """Return the text of thresholds, if there is one, and the held-out text."""
    own = "" if arguments.text is None else arguments.text.read_text(encoding="utf-8")
    held_out = arguments.held_out.read_text(encoding="utf-8")
    return own[: arguments.characters[0]], held_out[: arguments.characters[1]]


PARTS = {"curve": curve, "choices": choices, "layer": layer}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", type=Path, help="for curve and choices")
    parser.add_argument("--text", type=Path, help="for curve")
    parser.add_argument("--held-out", type=Path, help="for curve and choices")
    parser.add_argument("--characters", type=int, nargs=2, default=(60_000, 20_000))
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--scores", nargs="*", default=SCORES, help="next to coreinfer")
    parser.add_argument("--rounds", type=int, default=7, help="0 = no speeds, for curve")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as out:
        found = PARTS[arguments.part](arguments, Path(out))
    write_results(f"core_channels_{arguments.part}", found)


if __name__ == "__main__":
    main()
