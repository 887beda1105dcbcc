"""Packed documents have the numbers of each document alone, for any windows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.moe.batch import batch_of, batch_of_rows
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.documents import batch_of_documents, padded_lengths
from moeyard.moe.models.initialize import initialize
from moeyard.training.objectives.next_token import NextToken

EOS = 0
MODEL = {
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 11,
    "max_positions": 128,
    "moe": {"num_experts": 4, "d_expert": 8, "router": {"kind": "topk", "k": 2}},
}


@pytest.fixture(scope="module")
def decoder():
    decoder = Decoder(ModelConfig.model_validate(MODEL))
    initialize(decoder, 0)
    return decoder.double()


def documents_of(windows):
    """Cut windows the slow way: (inputs, targets) of every document, eos first."""
    found = []
    for window in windows.tolist():
        inputs, targets = window[:-1], window[1:]
        starts = [0, *(n for n, token in enumerate(inputs) if token == EOS and n)]
        for start, end in zip(starts, [*starts[1:], len(inputs)], strict=True):
            found.append((inputs[start:end], targets[start:end]))
    return found


def gradients(decoder, loss):
    return torch.autograd.grad(loss, list(decoder.parameters()))


@settings(deadline=None, max_examples=12)
@given(
    st.integers(1, 2),
    st.integers(1, 24),
    st.sampled_from([0.0, 0.03, 0.2, 0.7, 1.0]),
    st.integers(0, 999),
)
def test_loss_and_gradients_are_those_of_the_documents_run_separately(
    decoder, num_windows, length, share, seed
):
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(1, 11, (num_windows, length + 1), generator=generator)
    windows[torch.rand(windows.shape, generator=generator) < share] = EOS
    packed = NextToken(decoder, EOS)(windows).loss_sum
    alone = torch.zeros((), dtype=torch.float64)
    for inputs, targets in documents_of(windows):
        logits = decoder.logits(decoder(batch_of([torch.tensor(inputs)])).hidden_TD)
        alone = alone + F.cross_entropy(logits, torch.tensor(targets), reduction="sum")
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=0)
    expected = gradients(decoder, alone)
    scale = max(float(gradient.abs().max()) for gradient in expected)
    for found, gradient in zip(gradients(decoder, packed), expected, strict=True):
        assert float((found - gradient).abs().max()) <= 1e-12 * scale


def test_nothing_before_a_border_moves_anything_behind_it(decoder):
    torch.manual_seed(0)
    windows = torch.randint(1, 11, (2, 30))
    windows[:, 17] = EOS
    other = windows.clone()
    other[:, :17] = windows[:, :17] % 10 + 1
    before, after = (
        decoder(batch_of_documents(w, EOS)).hidden_TD.view(2, 30, -1) for w in (windows, other)
    )
    assert (before[:, :17] - after[:, :17]).abs().min(dim=-1).values.max() > 1e-6
    # From the row of eos on, which predicts the first token.
    torch.testing.assert_close(before[:, 17:], after[:, 17:], rtol=1e-12, atol=1e-13)
    reaching = [decoder(batch_of_rows(w)).hidden_TD.view(2, 30, -1) for w in (windows, other)]
    assert not torch.allclose(reaching[0][:, 17:], reaching[1][:, 17:])


def test_positions_begin_again_at_each_eos(decoder):
    windows = torch.tensor([[5, 6, EOS, 7, EOS, EOS, 8, 9], [1, 2, 3, 4, 5, 6, 7, EOS]])
    batch = batch_of_documents(windows, EOS)
    assert batch.lengths == (2, 2, 1, 3, 7, 1)
    assert batch.positions_T.tolist() == [0, 1, 0, 1, 0, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0]


def test_windows_without_a_border_keep_their_bits(decoder):
    windows = torch.randint(1, 11, (3, 33))
    whole = NextToken(decoder)(windows).loss_sum
    assert torch.equal(NextToken(decoder, EOS)(windows).loss_sum, whole)


def test_a_rank_without_windows_runs_all_the_same(decoder):
    empty = torch.empty(0, 9, dtype=torch.int64)
    assert float(NextToken(decoder, EOS)(empty).loss_sum.detach()) == 0


def test_padding_is_less_than_a_quarter_and_lengths_are_few():
    lengths = np.arange(1, 5000)
    padded = padded_lengths(lengths)
    assert (padded >= lengths).all() and (padded < 1.25 * lengths).all()
    assert len(np.unique(padded)) <= 4 * 13 and (padded[:8] == lengths[:8]).all()
