"""The training program with a deliberate defect: one extra random number after every resume."""

import sys

import torch

from moeyard.training.__main__ import main
from moeyard.training.saves import Saves

resume = Saves.resume


def resume_and_draw(saves: Saves) -> int:
    step = resume(saves)
    if step:
        torch.rand(1)
    return step


Saves.resume = resume_and_draw

if __name__ == "__main__":
    sys.exit(main())
