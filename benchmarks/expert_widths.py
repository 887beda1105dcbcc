"""How many bytes do experts of mixed widths save within a tolerated perplexity?

    python benchmarks/expert_widths.py MODEL CALIBRATION TEXT... [--bytes 16384]

MODEL is a model folder that was really trained, in bf16; CALIBRATION is a text that the widths are
chosen on, and TEXT are held-out files: the first ``--bytes`` of each file count. Bytes are those of
all experts in memory. Sums are in fp32, so that only the rounding of experts makes a difference.
For each tolerance, ``moeyard convert --dtype mixed`` would write the experts whose figures stand in
its line. The other lines narrow a given number of experts: the least important, the most important,
and some drawn at random, which says what importance is worth.
"""

import argparse
import random
from pathlib import Path

import torch

from moeyard.moe.folders.expert_slots import expert_bytes
from moeyard.moe.folders.write_few_bits import choose_format
from moeyard.serving.evaluation.held_out_text import score_text
from moeyard.serving.loading import load
from moeyard.serving.widths.search import Key
from moeyard.serving.widths.tolerance import WidthSearch

from report import write_results

TOLERANCES = (0.01, 0.005, 0.002, 0.0003)
SHARES = (0.5,)


class HeldOut:
    """Perplexity of held-out texts, and bytes of experts."""

    def __init__(self, search: WidthSearch, model, text: str) -> None:
        self._search, self._model, self._text = search, model, text
        self._known: dict[frozenset[Key], tuple[float, float]] = {}
        """Perplexities on calibration and held-out text, by the experts in int4."""
        config, dtype = model.config, torch.bfloat16
        formats = (choose_format(config, bits) for bits in (8, 4))
        self._sizes = [expert_bytes(config, dtype, packed) for packed in formats]
        self.plain_bytes = len(search.order) * expert_bytes(config, dtype, None)

    def line(self, name: str, narrow: list[Key], tolerance: float | None = None) -> dict:
        """Return what the model is with these experts in int4 and the others in int8."""
        chosen = frozenset(narrow)
        if chosen not in self._known:
            calibration = self._search.score(narrow)
            self._known[chosen] = calibration, score_text(self._model, self._text).perplexity
        calibration, held_out = self._known[chosen]
        number = len(self._search.order)
        wide, small = self._sizes
        return {
            "name": name,
            "tolerance": tolerance,
            "int8": number - len(narrow),
            "int4": len(narrow),
            "bytes": (number - len(narrow)) * wide + len(narrow) * small,
            "calibration": calibration / self._search.exact - 1,
            "held_out": held_out,
        }


def measure(arguments: argparse.Namespace) -> dict:
    """Return a line for each way to round the experts."""
    calibration = _text([arguments.calibration], arguments.bytes)
    held_out = _text(arguments.texts, arguments.bytes)
    model = load(arguments.model, "fp32")
    exact = score_text(model, held_out).perplexity
    ids = model.tokenizer(calibration, add_special_tokens=False)["input_ids"]
    search = WidthSearch(model, calibration, torch.tensor(ids))
    bench, order = HeldOut(search, model, held_out), search.order
    lines = [
        {"name": "bf16", "tolerance": None, "int8": 0, "int4": 0, "bytes": bench.plain_bytes,
         "calibration": 0.0, "held_out": exact},
        bench.line("int8", []),
        bench.line("int4", order),
    ]  # fmt: skip
    for tolerance in TOLERANCES:
        step = search.within(tolerance)
        lines.append(bench.line("mixed", order[: step.num_narrow], tolerance))
    for share in SHARES:
        number = round(share * len(order))
        lines.append(bench.line("least important", order[:number]))
        lines.append(bench.line("most important", order[-number:]))
        lines.append(bench.line("random", random.Random(0).sample(order, number)))
    return {"model": arguments.model.name, "tokens": len(ids) - 1, "exact": exact, "lines": lines}


def _text(files: list[Path], num_bytes: int) -> str:
    return "".join(file.read_bytes()[:num_bytes].decode(errors="ignore") for file in files)


def _table(figures: dict) -> str:
    rows = [
        f"{'widths':<16} {'tolerance':>9} {'int8':>5} {'int4':>5} {'MB':>7} {'of bf16':>7} "
        f"{'calibration':>11} {'held out':>9} {'perplexity':>10}"
    ]
    whole = figures["lines"][0]["bytes"]
    for line in figures["lines"]:
        tolerance = "" if line["tolerance"] is None else f"{line['tolerance']:.2%}"
        loss = line["held_out"] / figures["exact"] - 1
        rows.append(
            f"{line['name']:<16} {tolerance:>9} {line['int8']:>5} {line['int4']:>5} "
            f"{line['bytes'] / 1e6:>7.2f} {line['bytes'] / whole:>7.1%} "
            f"{line['calibration']:>+11.3%} {loss:>+9.3%} {line['held_out']:>10.5f}"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("calibration", type=Path, metavar="CALIBRATION")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--bytes", type=int, default=16384)
    figures = measure(parser.parse_args())
    table = _table(figures)
    print(table, end="")
    write_results("expert_widths", figures)


if __name__ == "__main__":
    main()
