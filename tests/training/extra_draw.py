"""The training program with a deliberate defect: one extra random number after every resume."""

import sys

import torch

from moeyard.training.__main__ import main
from moeyard.training.trainer import Trainer

resume = Trainer._resume


def resume_and_draw(trainer: Trainer) -> int:
    step = resume(trainer)
    if step:
        torch.rand(1)
    return step


Trainer._resume = resume_and_draw

if __name__ == "__main__":
    sys.exit(main())
