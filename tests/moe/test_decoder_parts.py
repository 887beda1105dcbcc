"""A decoder computes the same bits layer by layer as all layers together."""

import pytest
import torch

from moeyard.moe.batch import batch_of_rows
from moeyard.moe.blocks.momentum import Momentum
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.hash import Hash
from moeyard.moe.routers.topk import TopK

from small_model import CONFIG

PARTS = {
    "experts after attention": {},
    "ids choose": {"router": Hash(k=2)},
    "the experts before choose": {"router": TopK(k=2, lookahead="previous_block")},
    "a block with a state": {"block": Momentum()},
}


@pytest.mark.parametrize("name", PARTS)
def test_layers_one_by_one_are_the_decoder(name):
    moe = CONFIG.moe.model_copy(update=PARTS[name])
    decoder = Decoder(CONFIG.model_copy(update={"moe": moe})).eval()
    initialize(decoder, 1)
    batch = batch_of_rows(
        torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    )
    with torch.no_grad():
        expected = decoder(batch).hidden_TD
        rows = None
        for layer in range(CONFIG.num_layers):
            output = decoder.part(range(layer, layer + 1))(batch, rows)
            rows = output.for_next_stage()
        assert torch.equal(output.hidden_TD, expected)
        assert torch.equal(decoder(batch).hidden_TD, expected), "the whole is as it was"
