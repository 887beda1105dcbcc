"""The order of items in epochs, which checkpoints do not store: runs resume by it."""

import hashlib

import numpy as np

from moeyard.training.data.shuffled import ShuffledItems, SizedItems


def test_epochs_are_the_permutations_of_the_seed_and_the_epoch():
    items = ShuffledItems(10, batch=4, seed=7)
    found = [item for step in range(10) for item in items.at(step, range(4))]
    epochs = [np.random.Generator(np.random.PCG64([7, epoch])) for epoch in range(4)]
    assert found == [int(item) for draws in epochs for item in draws.permutation(10)]
    assert len(items) == 10 and items.token_counts() == []


def test_orders_stay_what_checkpoints_were_written_with():
    """A digest from the first version of the readers: a change would alter runs that resume."""
    items = ShuffledItems(1000, batch=64, seed=3)
    order = np.array([items.at(step, range(64)) for step in range(40)], dtype=np.int64)
    assert hashlib.sha256(order.tobytes()).hexdigest()[:16] == "208e70f8a854f043"


def test_ranks_and_resumed_runs_get_their_share_of_the_same_batch():
    items, again = ShuffledItems(13, batch=8, seed=1), ShuffledItems(13, batch=8, seed=1)
    whole = items.at(50, range(8))
    assert again.at(50, range(3)) + again.at(50, range(3, 8)) == whole
    assert again.at(50, range(0)) == []


def test_rows_of_steps_are_those_of_their_items():
    items = SizedItems([3, 1, 4, 1, 5, 9, 2], batch=3, seed=5)
    each = [sum(items.num_rows_of(items.at(step, range(3)))) for step in range(30)]
    for first, last in ((0, 1), (0, 7), (2, 3), (1, 29), (6, 6)):
        assert items.num_rows(range(first, last)) == sum(each[first:last])
    assert items.epoch_rows == 25 == sum(items.num_rows_of(range(7)))
