"""Blocks: none is lost, none is in two states, and only full ones with equal texts are shared."""

import random

import pytest

from moeyard.serving.engine.block_hashes import extend_hashes
from moeyard.serving.engine.blocks import BlockPool


def check_states(pool, held):
    """Compare the pool's own books with those of the test: the lists that sequences hold."""
    users = [sum(block in blocks for blocks in held) for block in range(pool.num_blocks)]
    assert pool._num_users == users
    free, cached = set(pool._free), set(pool._cached)
    used = {block for block, count in enumerate(users) if count}
    assert len(free) == len(pool._free)
    assert free | cached | used == set(range(pool.num_blocks))
    assert len(free) + len(cached) + len(used) == pool.num_blocks
    assert (pool.num_free, pool.num_cached, pool.num_used) == (len(free), len(cached), len(used))
    assert {pool._hash_of[block]: block for block in pool._hash_of} == pool._block_of
    assert cached <= set(pool._hash_of) and not free & set(pool._hash_of)


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_lose_no_block_and_give_none_to_two_states(seed):
    chance = random.Random(seed)
    pool, held, named = BlockPool(chance.randint(1, 12)), [], {}
    for step in range(400):
        action = chance.choice(["take", "share", "give_back", "publish", "find"])
        if action == "take":
            count = chance.randint(0, pool.num_available)
            taken = pool.take(count)
            assert len(set(taken)) == count
            assert not any(block in blocks for blocks in held for block in taken)
            held.append(taken)
        elif action == "share" and held:
            blocks = list(chance.choice(held))
            pool.share(blocks)
            held.append(blocks)
        elif action == "give_back" and held:
            pool.give_back(held.pop(chance.randrange(len(held))))
        elif action == "publish" and any(held):
            block = chance.choice(chance.choice([blocks for blocks in held if blocks]))
            name = str(chance.randint(0, 9)).encode()
            known = pool.find([name])
            pool.publish(block, name)
            assert not known or pool.find([name]) == known, "a name moved to another block"
            named[name] = step
        elif action == "find":
            found = pool.find([str(n).encode() for n in chance.sample(range(10), 3)])
            before = pool.num_available
            gone = pool.count_cached(found)
            pool.share(found)
            assert pool.num_available == before - gone
            held.append(found)
        check_states(pool, held)
    assert named, "nothing was ever published"
    while held:
        pool.give_back(held.pop())
    assert pool.num_used == 0 and pool.num_available == pool.num_blocks


def test_the_block_given_back_longest_ago_is_given_up_first():
    pool = BlockPool(4)
    blocks = pool.take(4)
    for block in blocks[:3]:
        pool.publish(block, bytes([block]))
    pool.give_back([blocks[1]])
    pool.give_back([blocks[0]])
    pool.give_back([blocks[2], blocks[3]])
    assert pool.take(1) == [blocks[3]], "the free block comes before all cached ones"
    assert pool.take(1) == [blocks[1]] and pool.find([bytes([blocks[1]])]) == []
    pool.share(pool.find([bytes([blocks[0]])]))
    assert pool.take(1) == [blocks[2]]
    assert pool.num_available == 0


def test_the_end_of_a_text_is_given_up_before_its_beginning():
    pool = BlockPool(3)
    blocks = pool.take(3)
    for block in blocks:
        pool.publish(block, bytes([block]))
    pool.give_back(blocks)
    assert set(pool.take(2)) == {blocks[2], blocks[1]}
    assert pool.find([bytes([blocks[0]])]) == [blocks[0]]


def test_a_second_block_with_the_same_text_becomes_free_and_not_cached():
    pool = BlockPool(2)
    first, second = pool.take(2)
    pool.publish(first, b"same")
    pool.publish(second, b"same")
    pool.give_back([first])
    pool.give_back([second])
    assert (pool.num_cached, pool.num_free) == (1, 1) and pool.find([b"same"]) == [first]


def test_a_block_without_users_cannot_be_given_back_nor_one_that_is_not_there_taken():
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="no user"):
        pool.give_back([0])
    with pytest.raises(AssertionError, match="free"):
        pool.share([1])
    with pytest.raises(AssertionError, match="3 blocks asked for"):
        pool.take(3)


def hashes_of(ids, count, salt=b""):
    found = []
    extend_hashes(found, ids, count, 4, salt)
    return found


def test_a_hash_tells_all_tokens_up_to_its_blocks_end_and_the_salt():
    ids = list(range(12))
    whole = hashes_of(ids, 3)
    assert len(set(whole)) == 3 and whole == hashes_of([*ids, 99], 3)
    for changed in range(12):
        other = hashes_of([*ids[:changed], 500, *ids[changed + 1 :]], 3)
        same = [a == b for a, b in zip(whole, other, strict=True)]
        assert same == [changed >= 4 * (block + 1) for block in range(3)]
    assert not set(whole) & set(hashes_of(ids, 3, b"tenant"))
    assert len(set(hashes_of([7] * 12, 3))) == 3, "equal tokens at other places have other keys"


def test_hashes_grow_with_the_text():
    found = hashes_of(range(100, 112), 1)
    extend_hashes(found, range(100, 112), 3, 4, b"")
    assert found == hashes_of(range(100, 112), 3)
