"""COMET and DSelect-k against top-k and hash on two-digit recognition, as with Multi-MNIST.

    pip install scikit-learn
    python benchmarks/two_digits.py [--seeds 10] [--only NAME ...]

Each image overlays two of scikit-learn's 8 x 8 digits on a 10 x 10 canvas, one in the upper left
and one in the lower right; they overlap as much as Multi-MNIST's. Two tasks name them. A layer of
eight experts lies between the pixels' embedding and two heads, as in the multi-task models of COMET
(Ibrahim et al. 2023). The digits of test images are not in training images. Accuracy and macro
one-against-rest ROC AUC, mean of both tasks.

N images, C classes, D model width.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from two_digits_arms import ARMS

import moeyard

from report import write_results

SIDE, CLASSES, D, D_EXPERT, EXPERTS = 10, 10, 64, 64, 8
TRAIN, TEST, BATCH, EPOCHS, LR = 4000, 2000, 128, 30, 2e-3
VOCABULARY = 1024
"""Ids for hash routers: an image's number, modulo this."""


class Images(NamedTuple):
    """Overlaid digits."""

    pixels_NP: Tensor
    labels_N2: Tensor
    ids_N: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="initialisations")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--work", type=Path, default=Path("runs/two-digits"), help="for resuming")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    train, test = overlay(TRAIN, 0), overlay(TEST, 1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.only}
    grid = [(seed, name) for seed in range(arguments.seeds) for name in arguments.only]
    for number, (seed, name) in enumerate(grid, 1):
        path = arguments.work / f"{name.replace(' ', '-')}-{seed}.json"
        started = time.monotonic()
        if not path.exists():
            path.write_text(json.dumps(score(ARMS[name], train, test, seed)))
        found[name].append(json.loads(path.read_text()))
        seconds = time.monotonic() - started
        figures = f"{found[name][-1]} {seconds:.0f} s"
        print(f"{number}/{len(grid)} {name} seed {seed}: {figures}", flush=True)
    rows = {name: summary(values) for name, values in found.items()}
    print("| router | accuracy | ROC AUC | experts an image |\n|---|---|---|---|")
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["accuracy"][0]):
        cells = [f"{mean:.4f} ± {spread:.4f}" for mean, spread in row.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")
    question = "accuracy and AUC of routers on two overlaid digits, over initialisations"
    figures = {"question": question, "arms": ARMS, "rows": rows}
    print(f"written to {write_results('two_digits', figures)}")


def overlay(count: int, part: int) -> Images:
    """Return ``count`` images of two digits; ``part`` 0 and 1 share no digit's drawing."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    half = order[: 2 * len(order) // 3] if part == 0 else order[2 * len(order) // 3 :]
    draw = np.random.default_rng(part + 1)
    pairs_N2 = draw.choice(half, (count, 2))
    canvas = np.zeros((count, SIDE, SIDE), np.float32)
    canvas[:, :8, :8] = digits.images[pairs_N2[:, 0]]
    canvas[:, 2:, 2:] = np.maximum(canvas[:, 2:, 2:], digits.images[pairs_N2[:, 1]])
    return Images(
        torch.from_numpy(canvas.reshape(count, -1) / 16),
        torch.from_numpy(digits.target[pairs_N2]),
        torch.arange(count) % VOCABULARY,
    )


class TwoTasks(nn.Module):
    """Pixels, an MoE layer, two heads."""

    def __init__(self, router: moeyard.RouterConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE * SIDE, D)
        self.layer = moeyard.MoELayer(D, D_EXPERT, EXPERTS, router, vocab_size=VOCABULARY)
        self.heads = nn.ModuleList(nn.Linear(D, CLASSES) for _ in range(2))

    def forward(self, images: Images) -> tuple[list[Tensor], moeyard.Routing]:
        x_ND = F.relu(self.embed(images.pixels_NP))
        y_ND, routing = self.layer(x_ND, token_ids=images.ids_N)
        return [head(y_ND) for head in self.heads], routing


def score(section: dict, train: Images, test: Images, seed: int) -> dict[str, float]:
    """Train one model; return its figures on test images."""
    torch.manual_seed(seed)
    model = TwoTasks(moeyard.router(**section))
    with torch.no_grad():  # as a model that is trained from scratch begins
        for name, parameter in model.layer.gate.named_parameters():
            first = model.layer.gate.initialize(name, torch.Generator().manual_seed(seed))
            if first is not None:
                parameter.copy_(first)
    optimizer = torch.optim.Adam(model.parameters(), LR)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAIN).split(BATCH):
            batch = Images(*(values[rows] for values in train))
            scores, routing = model(batch)
            pairs = zip(scores, batch.labels_N2.T, strict=True)
            loss = sum((F.cross_entropy(s, labels) for s, labels in pairs), torch.zeros(()))
            loss = loss + moeyard.auxiliary_loss([model.layer], [routing])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            moeyard.after_step([model.layer], [[routing]])
    model.eval()
    with torch.no_grad():
        scores, routing = model(test)
    accuracies, areas = [], []
    for logits_NC, labels_N in zip(scores, test.labels_N2.T, strict=True):
        accuracies.append(float((logits_NC.argmax(1) == labels_N).double().mean()))
        areas.append(roc_auc_score(labels_N, logits_NC.softmax(1), multi_class="ovr"))
    return {
        "accuracy": statistics.mean(accuracies),
        "auc": float(statistics.mean(areas)),
        "experts": float(routing.counts_E.sum()) / TEST,
    }


def summary(values: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation of each figure."""
    spread = statistics.stdev if len(values) > 1 else lambda _: 0.0
    columns = {name: [value[name] for value in values] for name in values[0]}
    return {name: (statistics.mean(c), spread(c)) for name, c in columns.items()}


if __name__ == "__main__":
    main()
