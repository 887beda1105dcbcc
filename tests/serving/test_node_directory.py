"""Which copies a node holds, who still uses them, and which tier is asked: no Ray needed."""

from moeyard.serving.experts.tiers.directory import CLAIM_S, MAX_CLAIMS, Directory
from moeyard.serving.experts.tiers.leases import LEASE_S, LINGER_S, Leases
from moeyard.serving.experts.tiers.rates import ASK_AGAIN, Rates


def bring(directory, expert, num_bytes=10, now_s=0.0):
    key = (0, expert)
    return directory.claim(key, num_bytes, now_s) and directory.add(key, f"copy {expert}")


def held(directory, experts=range(20)):
    return [e for e in experts if (0, e) in directory._copies]


def test_the_copy_that_was_not_asked_for_the_longest_leaves_first():
    directory = Directory(30)
    assert [bring(directory, e) for e in (1, 2, 3)] == [True] * 3
    assert directory.find((0, 1)) == "copy 1"
    assert bring(directory, 4)
    assert held(directory) == [1, 3, 4]
    counts = directory.counts()
    assert (counts.num_bytes, counts.evictions, counts.hits) == (30, 1, 1)


def test_two_who_read_the_same_expert_leave_one_copy():
    directory = Directory(100)
    assert directory.claim((0, 1), 10, 0.0)
    assert not directory.claim((0, 1), 10, 0.0), "the other one is bringing it"
    assert directory.add((0, 1), "first")
    assert not directory.add((0, 1), "second"), "it was not claimed"
    assert not directory.claim((0, 1), 10, 0.0), "it is there"
    assert directory.find((0, 1)) == "first" and directory.counts().num_bytes == 10


def test_copies_on_their_way_count_against_the_budget():
    directory = Directory(30)
    assert all(bring(directory, e) for e in (1, 2, 3))
    assert directory.claim((0, 4), 10, 0.0) and directory.counts().num_bytes == 20
    assert directory.claim((0, 5), 10, 0.0) and directory.counts().num_bytes == 10
    assert directory.claim((0, 6), 10, 0.0) and directory.counts().num_bytes == 0
    assert not directory.claim((0, 7), 10, 0.0), "all of the budget is on its way"
    assert all(directory.add((0, e), "copy") for e in (4, 5, 6))
    assert directory.counts().num_bytes == 30


def test_no_more_than_a_few_copies_are_on_their_way():
    directory = Directory(1000)
    claims = [directory.claim((0, e), 10, 0.0) for e in range(MAX_CLAIMS + 1)]
    assert claims == [True] * MAX_CLAIMS + [False]
    directory.give_up((0, 0))
    assert directory.claim((0, MAX_CLAIMS), 10, 0.0)


def test_the_claim_of_one_who_died_ends():
    directory = Directory(10)
    assert directory.claim((0, 1), 10, 0.0)
    assert not directory.claim((0, 2), 10, CLAIM_S / 2)
    assert directory.claim((0, 2), 10, CLAIM_S)
    assert not directory.add((0, 1), "late") and directory.add((0, 2), "copy")


def test_an_expert_larger_than_the_budget_puts_no_other_out():
    directory = Directory(30)
    assert bring(directory, 1)
    assert not bring(directory, 2, num_bytes=31) and held(directory) == [1]


def test_a_smaller_budget_holds_at_once_and_a_dropped_copy_frees_its_bytes():
    directory = Directory(50)
    assert all(bring(directory, e) for e in range(5))
    directory.set_budget(20)
    assert held(directory) == [3, 4]
    directory.drop((0, 3))
    directory.drop((0, 17))
    assert directory.counts().num_bytes == 10 and directory.find((0, 3)) is None


def test_copies_are_used_while_a_replica_renews_and_a_little_longer():
    leases = Leases(0.0)
    assert leases.renew("a", 1.0) and leases.renew("b", 1.0) and not leases.renew("a", 20.0)
    leases.end("b", 25.0)
    assert not leases.are_over(25.0 + LINGER_S), "a lives"
    assert not leases.are_over(20.0 + LEASE_S + LINGER_S - 1)
    assert leases.are_over(20.0 + LEASE_S + LINGER_S), "a was killed and never renewed"


def test_copies_end_soon_after_the_last_replica_left_but_wait_for_the_first():
    leases = Leases(0.0)
    assert not leases.are_over(LEASE_S - 1) and leases.are_over(LEASE_S)
    leases.renew("a", 5.0)
    leases.end("a", 100.0)
    leases.end("a", 105.0)
    assert not leases.are_over(100.0 + LINGER_S - 1) and leases.are_over(100.0 + LINGER_S)


def test_a_tier_that_is_slower_than_the_disk_is_asked_now_and_then_only():
    rates = Rates()
    assert rates.is_worth_asking("host"), "nothing is known yet"
    rates.observe("disk", 0.010, 1)
    rates.observe("host", 0.002, 1)
    assert all(rates.is_worth_asking("host") for _ in range(2 * ASK_AGAIN))
    rates.observe("other_node", 0.050, 1)
    asked = [rates.is_worth_asking("other_node") for _ in range(2 * ASK_AGAIN)]
    assert sum(asked) == 2 and rates.reads == {"host": 1, "other_node": 1, "disk": 1}
    for _ in range(60):
        rates.observe("other_node", 0.001, 1)
    assert rates.is_worth_asking("other_node"), "it has become faster"
