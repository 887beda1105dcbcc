"""Requests that begin alike go to one replica, unless it is busier than others."""

import asyncio
import json

import pytest

from moeyard.serving import proxy_guard
from moeyard.serving.proxy.applications import Applications
from moeyard.serving.proxy.beginnings import MOST, SHORTEST, LastSeen, name_beginnings
from moeyard.serving.proxy.places import Places, Room
from moeyard.serving.proxy_guard import ProxyGuard

TEXT = "".join(chr(97 + number * number % 23) for number in range(5000))


def names(prompt=TEXT, field="prompt", **more) -> list[str]:
    return name_beginnings(json.dumps({"model": "small", field: prompt, **more}).encode())


@pytest.mark.parametrize("shared", [0, 127, 128, 200, 256, 1000, 4999])
def test_two_prompts_share_the_hashes_of_what_they_share(shared):
    other = TEXT[:shared] + "#" + TEXT[shared + 1 :]
    agree = [a == b for a, b in zip(names(), names(other), strict=True)]
    lengths = [SHORTEST << depth for depth in range(len(agree))]
    assert agree == [length <= shared for length in lengths]


def test_short_prompts_and_what_is_no_request_have_no_beginnings():
    assert names(TEXT[: SHORTEST - 1]) == [] and len(names(TEXT[:SHORTEST])) == 1
    for body in (b"", b"{", b"[]", b"7", b"{}", b'{"prompt": 0}', b'{"prompt": null}', b"\xff"):
        assert name_beginnings(body) == []
    assert len(names("a" * (SHORTEST << 14))) == MOST
    assert names("\ud800" * 200)  # text that UTF-8 has no bytes for


def test_a_request_of_any_depth_can_be_looked_at():
    for depth in range(900, 1000):  # somewhere here it can be read, but not written again
        deep = b"[" * depth + b"]" * depth
        name_beginnings(b'{"prompt": %s}' % deep)
        name_beginnings(b'{"prompt": "a", "model": %s}' % deep)


@pytest.mark.parametrize("other", [{"model": "adapter"}, {"cache_salt": "tenant"}])
def test_another_model_or_salt_shares_nothing(other):
    assert not set(names()) & set(names(**other))


def test_ids_and_messages_have_beginnings_too():
    chat = [{"role": "system", "content": TEXT}, {"role": "user", "content": "one"}]
    again = [*chat[:1], {"role": "user", "content": "two"}]
    assert names(chat, "messages")[-1] == names(again, "messages")[-1]
    assert names(list(range(500)))[:2] == names(list(range(400)))[:2]


@pytest.fixture
def places():
    """Three replicas; one with four requests more than another one is passed over."""
    found = Places(crowd=4)
    found.set_replicas({name: Room(100, is_near=True) for name in "abc"})
    return found


def fill(places, **counts):
    """Have so many more requests at replicas."""
    for name, count in counts.items():
        places.hear(name, count)


def test_the_longest_beginning_decides_and_the_last_replica_that_saw_it():
    seen = LastSeen(most=4)
    seen.add(["short", "long"], "a")
    seen.add(["short", "other"], "b")
    assert seen.find(["short", "long"], {"a", "b"}) == "a"
    assert seen.find(["short", "unknown"], {"a", "b"}) == "b"
    assert seen.find(["short", "long"], {"b"}) == "b", "a replica that has gone counts for nothing"
    assert seen.find(["unknown"], {"a", "b"}) is None
    seen.add(["1", "2", "3"], "a")  # four are known now, and "long" was not seen for longest
    assert seen.find(["long"], {"a", "b"}) is None and seen.find(["other"], {"b"}) == "b"


def test_a_known_beginning_goes_where_it_went_and_others_to_the_emptiest(places):
    first = places.take(1, ["x", "y"]).replica
    assert [places.take(1, ["x", "z"]).replica for _ in range(4)] == [first] * 4
    assert places.take(1, ["other"]).replica != first
    assert places.take(1).replica != first


def test_a_replica_with_too_many_requests_more_than_the_emptiest_is_passed_over(places):
    fill(places, a=9, b=3, c=9)
    places.give_back(places.take(1, ["x"]))  # at b
    fill(places, a=3, b=7 + 1, c=30)  # what has just ended at b does not count
    ticket = places.take(1, ["x"])
    assert ticket.replica == "b", "4 more than another one is the limit"
    places.give_back(ticket)
    fill(places, b=8 + 2)
    assert places.take(1, ["x"]).replica == "a"


def test_a_replica_that_is_full_or_has_gone_is_not_chosen(places):
    first = places.take(1, ["x"]).replica
    others = {name: Room(100, is_near=True) for name in "abc" if name != first}
    places.set_replicas({**others, first: Room(1, is_near=True)})
    assert places.take(1, ["x"]).replica != first
    places.set_replicas({name: others[name] for name in others})
    assert places.take(1, ["x"]).replica in others


@pytest.mark.parametrize("crowd", [None, 100])
def test_the_guard_names_beginnings_where_they_count(monkeypatch, crowd):
    places, known = Places(crowd), Applications()
    places.set_replicas({name: Room(100, is_near=True) for name in "ab"})
    known.learn("", places)
    monkeypatch.setattr(proxy_guard, "applications", known)
    taken = []

    async def app(scope, receive, send):
        (ticket,) = places._tickets.values()
        taken.append(ticket.replica)

    async def ask(prompt):
        body = json.dumps({"model": "small", "prompt": prompt}).encode()

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            pass

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await ProxyGuard(app)(scope, receive, send)

    async def go():
        await ask(TEXT)
        places.hear(taken[0], 50)  # so another one is chosen if beginnings do not count
        await ask(TEXT + "#")

    asyncio.run(go())
    assert (taken[0] == taken[1]) == (crowd is not None)
