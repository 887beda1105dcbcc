"""Layers in a model of a user's own, on two ranks: DDP, and experts split between them."""

from pathlib import Path

import pytest

from launch import torchrun

WORKER = Path(__file__).parent / "own_model_worker.py"


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_have_the_auxiliary_loss_and_all_gradients_of_one_process():
    """Over two micro-batches, with DDP and with expert parallelism."""
    assert torchrun(2, str(WORKER)).count("done") == 2
