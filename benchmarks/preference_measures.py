"""What preference.py measures of a model: plain text, its answers, and where its tokens go."""

import json
from functools import cache
from pathlib import Path

import torch

import moeyard
from moeyard.moe.batch import batch_of_rows
from moeyard.serving.evaluation.held_out_text import score_text

WINDOW = 96
ANSWER_BYTES = 12


def held_out(work: Path) -> list[dict[str, str]]:
    """Return the held-out pairs."""
    return [json.loads(line) for line in (work / "held-out.jsonl").read_text().splitlines()]


def chat_of(record: dict[str, str]) -> str:
    """Return what stands before an answer, as the template writes it."""
    return f"<|user|>\n{record['prompt']}\n<|assistant|>\n"


def share_moved(base: Path, tuned: Path, texts: list[str]) -> float:
    """Return the share of tokens and layers whose set of experts is another after tuning."""
    decoders = [moeyard.load(folder).decoder for folder in (base, tuned)]
    moved, total = 0, 0
    for text in texts:
        batch = batch_of_rows(torch.tensor([list(text.encode())]))
        with torch.no_grad():
            both = zip(*(decoder(batch).routings for decoder in decoders), strict=True)
        for before, after in both:
            sets = [one.experts_TK.sort(dim=1).values for one in (before, after)]
            moved += int((sets[0] != sets[1]).any(dim=1).sum())
            total += len(sets[0])
    return moved / total


@cache
def judge(folder: Path, work: Path, plain: str) -> dict[str, float]:
    """Return the loss on plain text, and the share of greedy answers in the case of the rule."""
    torch.set_num_threads(1)
    model = moeyard.load(folder)
    records = held_out(work)
    answers = model.generate([chat_of(one) for one in records], ANSWER_BYTES, temperature=0.0)
    right = [
        answer == (answer.upper() if record["chosen"].isupper() else answer.lower())
        and any(sign.isalpha() for sign in answer)
        for answer, record in zip(answers, records, strict=True)
    ]
    loss = score_text(model, plain, WINDOW).loss_per_byte
    return {"plain_loss": loss, "answers_right": sum(right) / len(right)}
