"""A proxy takes places of replicas: as many as there are, at the emptiest one."""

import json
from collections import Counter

import pytest

from moeyard.errors import RequestError
from moeyard.serving.proxy.applications import MOST_PREFIXES, Applications
from moeyard.serving.proxy.places import (
    ENDED_FOR_S,
    NOWHERE,
    OTHERS_FOR_S,
    Places,
    Room,
)
from moeyard.serving.proxy.wanted import places_of, prefix_of

PATH = "/v1/completions"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def places(clock):
    """Two replicas of three places."""
    found = Places(clock=clock)
    found.set_replicas({"a": Room(3, is_near=True), "b": Room(3, is_near=True)})
    return found


def take_all(places, count=1):
    """Take as often as there is room; return the tickets."""
    found = []
    while True:
        try:
            found.append(places.take(count))
        except RequestError as error:
            assert error.status == 429 and error.retry_after_s >= 1
            return found


def test_as_many_go_through_as_there_are_places_and_each_replica_gets_its_own(places):
    tickets = take_all(places)
    assert Counter(ticket.replica for ticket in tickets) == {"a": 3, "b": 3}


def test_an_end_lets_one_request_through_and_to_the_replica_that_it_has_left(places):
    tickets = take_all(places)
    for ended in (tickets[4], tickets[1]):
        places.give_back(ended)
        (again,) = take_all(places)
        assert again.replica == ended.replica


def test_the_emptiest_replica_is_chosen_and_the_nearer_one_of_two(places):
    places.set_replicas({"a": Room(5, is_near=False), "b": Room(5, is_near=True)})
    assert [places.take(1).replica for _ in range(4)] == ["b", "a", "b", "a"]


def test_several_answers_need_their_places_at_one_replica(places):
    assert [places.take(2).replica for _ in range(2)] in (["a", "b"], ["b", "a"])
    assert take_all(places, 2) == [], "one place is left at each"
    assert len(take_all(places)) == 2


def test_what_takes_no_place_or_more_than_a_replica_has_always_goes_through(places):
    take_all(places)
    for count in (0, 4):
        ticket = places.take(count)
        assert ticket.replica in ("a", "b")
        places.give_back(ticket)
    assert take_all(places) == [], "nothing was taken, and so nothing given back"


def test_a_new_replica_has_its_places_at_once_and_a_lost_one_none(places):
    tickets = take_all(places)
    places.set_replicas({"a": Room(3, True), "c": Room(2, True)})
    assert [ticket.replica for ticket in take_all(places)] == ["c", "c"]
    for ticket in tickets:
        places.give_back(ticket)
    assert len(take_all(places)) == 3, "those of the lost one are nowhere"


def test_a_replica_that_is_lost_for_a_moment_keeps_what_it_has(places):
    tickets = take_all(places)
    places.set_replicas({})
    places.set_replicas({"a": Room(3, True), "b": Room(3, True)})
    assert take_all(places) == []
    places.give_back(tickets[0])
    assert len(take_all(places)) == 1


def test_without_a_replica_as_many_wait_as_one_has_places_for(places):
    places.set_replicas({})
    tickets = take_all(places)
    assert [ticket.replica for ticket in tickets] == [NOWHERE] * 3
    places.set_replicas({"c": Room(3, True)})
    assert [places.replica_of(ticket.number) for ticket in tickets] == ["c"] * 3
    assert take_all(places) == []


def test_a_ticket_moves_when_its_replica_has_gone(places):
    ticket = places.take(2)
    other = {"a": "b", "b": "a"}[ticket.replica]
    places.set_replicas({other: Room(3, True)})
    assert places.replica_of(ticket.number) == other
    assert len(take_all(places)) == 1
    places.give_back(ticket)
    assert places.replica_of(ticket.number) is None
    assert len(take_all(places)) == 2


def test_what_waited_for_a_replica_has_its_place_before_a_newcomer(places):
    places.set_replicas({})
    waiting = take_all(places)
    places.set_replicas({"c": Room(2, True)})
    assert [ticket.replica for ticket in waiting] == ["c", "c", NOWHERE]
    assert take_all(places) == []
    places.set_replicas({"c": Room(2, True), "d": Room(2, True)})
    assert [ticket.replica for ticket in waiting] == ["c", "c", "d"]
    assert [ticket.replica for ticket in take_all(places)] == ["d"]


def test_a_ticket_is_where_its_request_went(places):
    ticket = places.take(2)
    first, other = ticket.replica, {"a": "b", "b": "a"}[ticket.replica]
    places.hear(other, 1)  # Ray hears of it before it says which one it was
    places.move(ticket.number, other)
    assert ticket.replica == other
    places.hear(first, 1)
    places.move(0, first)  # one without a ticket is not another proxy's either
    assert Counter(one.replica for one in take_all(places)) == {first: 3, other: 1}


def test_who_asks_for_several_answers_hears_how_many_were_too_many(places):
    places.take(1), places.take(1)
    with pytest.raises(RequestError, match=r"no room for 3 answers .* ask for fewer \(n times"):
        places.take(3)


def test_requests_of_other_proxies_count_for_a_while(places, clock):
    own = places.take(1)
    places.hear(own.replica, 3)  # this one and two of others
    assert len(take_all(places)) == 3, "none of them at that replica but one"
    clock.now += OTHERS_FOR_S
    assert [ticket.replica for ticket in take_all(places)] == [own.replica] * 2


def test_what_a_replica_says_of_this_proxys_requests_counts_once(places):
    tickets = [places.take(1), places.take(0)]
    for ticket in tickets:
        places.hear(ticket.replica, 1)
    assert len(take_all(places)) == 5


def test_what_has_just_ended_is_not_another_proxys(places, clock):
    tickets = take_all(places)
    for ticket in tickets:
        places.give_back(ticket)
        places.give_back(ticket)  # twice is once
    own = places.take(1)
    places.hear(own.replica, 4)  # this one, and three of which it has not noticed the end
    others = take_all(places)
    assert len(others) == 5
    for ticket in others:
        places.give_back(ticket)
    clock.now += ENDED_FOR_S
    places.hear(own.replica, 4)  # by now, the three must be another proxy's
    assert len(take_all(places)) == 3


def test_nothing_is_kept_of_requests_that_have_ended(places):
    for _ in range(3):
        for ticket in take_all(places):
            places.give_back(ticket)
    assert not places._tickets and not places._taken and not places._requests


def test_what_is_refused_is_told_once(places):
    take_all(places)
    take_all(places)
    assert (places.take_refused(), places.take_refused()) == (2, 0)


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        (PATH, {"prompt": "a"}, 1),
        (PATH, {"prompt": "a", "n": 3}, 3),
        (PATH, {"prompt": ["a", "b"]}, 2),
        (PATH, {"prompt": [[1, 2], [3]], "n": 2}, 4),
        (PATH, {"prompt": [1, 2, 3]}, 1),
        (PATH, {"prompt": [], "n": 0}, 1),
        (PATH, {"prompt": "a", "n": "many"}, 1),
        (PATH, ["n"], 1),
        ("/one/v1/chat/completions", {"messages": [{}, {}], "n": 2}, 2),
        ("/v1/forecast", {"series": [[1], [2]]}, 1),
        ("/v1/models", {"n": 2}, 0),
    ],
)
def test_a_request_wants_a_place_for_each_answer(path, body, count):
    assert places_of(path, json.dumps(body).encode()) == count
    assert places_of(path, json.dumps(body).encode()[:-1]) == min(count, 1), "half a body"


def test_each_application_has_places_of_its_own():
    known, one, root = Applications(), Places(), Places()
    known.learn(prefix_of("/one/v1/models"), one)
    assert known.find(prefix_of("/v1/completions")) is None
    known.learn(prefix_of("/health"), root)
    for path, expected in (
        ("/one/v1/completions", one),
        ("/v1/completions", root),
        ("/other/v1/completions", None),  # perhaps of an application that is not known yet
        ("/docs", None),
        ("/-/routes", None),
    ):
        assert known.find(prefix_of(path)) is expected, path
        assert known.nearest(path) is (expected or root), path


def test_prefixes_that_clients_invent_push_none_out_that_is_in_use():
    known, root = Applications(), Places()
    for number in range(2 * MOST_PREFIXES):
        known.learn("", root)
        before = known._known
        known.learn(f"/{number}", root)
        assert known._known is not before, "another thread may be reading it"
        assert known.find("") is root
    assert len(known._known) == MOST_PREFIXES
