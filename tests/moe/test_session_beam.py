"""Beam search for sessions against all sessions there are."""

import itertools

import pytest
import torch

from moeyard.moe.config.encoder_decoder import EncoderDecoderConfig
from moeyard.moe.items.beam import search
from moeyard.moe.items.table import ItemTable
from moeyard.moe.models.encoder_decoder import EncoderDecoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.sessions import generate_sessions, histories, session_log_probs

from clicks import MODEL

CODES = torch.tensor([[0, 1], [0, 1], [0, 2], [2, 0], [2, 2], [1, 1]])
TABLE = ItemTable(list("abcdef"), CODES, 3)
NUM_ITEMS, USERS = 2, 3


@pytest.fixture(scope="module")
def model():
    """A model with random weights in fp64, and the encoded histories of three users."""
    config = EncoderDecoderConfig(**MODEL | {"vocab_size": TABLE.vocabulary})
    model = EncoderDecoder(config)
    initialize(model, 5)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.2
    return model.double().eval()


@pytest.fixture(scope="module")
def source():
    return histories(TABLE.tokens(torch.tensor([0, 3, 5, 2, 4, 4])).flatten(), (6, 4, 2))


def all_sessions(model, source):
    """Return (log-probability, items) of every session of each user, best first.

    An id that items share counts once, with its first items.
    """
    sessions = [
        pair for pair in itertools.permutations(range(6), NUM_ITEMS) if pair not in ((1, 0),)
    ]
    sessions = [pair for pair in sessions if 1 not in pair or pair == (0, 1)]
    found = []
    hidden_SD = model.encode(source).hidden_TD.split(source.lengths)
    for user, length in enumerate(source.lengths):
        targets = TABLE.tokens(torch.tensor(sessions))
        repeated = hidden_SD[user].repeat(len(sessions), 1)
        lengths = (length,) * len(sessions)
        scores = session_log_probs(model, TABLE, targets, repeated, lengths).log_probs_B
        found.append(sorted(zip(scores.tolist(), sessions, strict=True), reverse=True))
    return found


def test_wide_beams_find_all_sessions_in_order(no_gradients, model, source):
    found = generate_sessions(model, TABLE, source, NUM_ITEMS, 30)
    for user, wanted in enumerate(all_sessions(model, source)):
        count = len(wanted)
        assert [tuple(items) for items in found.items_BWI[user, :count].tolist()] == [
            items for _, items in wanted
        ]
        scores = torch.tensor([score for score, _ in wanted], dtype=torch.float64)
        torch.testing.assert_close(found.log_probs_BW[user, :count], scores)
        assert found.log_probs_BW[user, count:].isinf().all()
        assert len(found.best_items(user, 99)) == 6


def test_only_ids_of_items_are_generated_and_no_item_twice(no_gradients, model, source):
    for num_items in (1, 4, 6):
        found = generate_sessions(model, TABLE, source, num_items, 7)
        for items in found.items_BWI.flatten(0, 1).tolist():
            assert len(set(items)) == num_items


def test_a_beam_of_one_is_greedy(no_gradients, model, source):
    found = generate_sessions(model, TABLE, source, NUM_ITEMS, 1)
    hidden_SD = model.encode(source).hidden_TD.split(source.lengths)
    for user, length in enumerate(source.lengths):
        open_sessions = {(0, 1), *itertools.permutations((0, 2, 3, 4, 5), 2)}
        chosen: list[int] = []
        for place in range(NUM_ITEMS * 2):
            ways = {}
            for pair in sorted(open_sessions):
                codes = TABLE.tokens(torch.tensor([pair])).flatten().tolist()
                if codes[:place] == chosen:
                    ways.setdefault(codes[place], pair)
            scores = {}
            for code, pair in ways.items():
                targets = TABLE.tokens(torch.tensor([pair]))
                hidden = torch.cat([hidden_SD[user]])
                scores[code] = prefix_score(model, targets, hidden, length, place)
            chosen.append(max(scores, key=scores.get))
        codes = TABLE.tokens(found.items_BWI[user, 0]).flatten().tolist()
        assert codes == chosen


def prefix_score(model, targets, hidden, length, place):
    """Return the log-probability of one code of a session."""
    from moeyard.moe.batch import batch_of_rows
    from moeyard.moe.models.sessions import decoder_inputs, predicting_rows

    inputs = decoder_inputs(targets, TABLE.begin)
    rows = predicting_rows(*targets.shape[1:])
    output = model.decode(batch_of_rows(inputs), hidden, (length,))
    scores = model.logits(output.hidden_TD)[rows].log_softmax(dim=1)
    return float(scores[place, targets.flatten()[place]])


def test_rows_without_users_decode_as_often(model):
    calls = []

    def decode(tokens_RT, parents_R):
        calls.append(tokens_RT.shape)
        return torch.empty(0, TABLE.vocabulary)

    found = search(decode, TABLE, 0, NUM_ITEMS, 4)
    assert len(calls) == 4 and found.items_BWI.shape == (0, 4, 2)
