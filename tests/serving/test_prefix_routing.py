"""Requests that begin alike go to one replica, unless it is busier than others."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.request_router import ReplicaID

from moeyard.serving.proxy.beginnings import MOST, SHORTEST, Wish, name_beginnings
from moeyard.serving.proxy_guard import ProxyGuard
from moeyard.serving.replicas.prefix_router import LastSeen, PrefixRouter

TEXT = "".join(chr(97 + number * number % 23) for number in range(5000))


def names(prompt=TEXT, field="prompt", **more) -> list[str]:
    found = name_beginnings(json.dumps({"model": "small", field: prompt, **more}).encode())
    return found.split(",") if found else []


@pytest.mark.parametrize("shared", [0, 127, 128, 200, 256, 1000, 4999])
def test_two_prompts_share_the_hashes_of_what_they_share(shared):
    other = TEXT[:shared] + "#" + TEXT[shared + 1 :]
    agree = [a == b for a, b in zip(names(), names(other), strict=True)]
    lengths = [SHORTEST << depth for depth in range(len(agree))]
    assert agree == [length <= shared for length in lengths]


def test_short_prompts_and_what_is_no_request_have_no_beginnings():
    assert names(TEXT[: SHORTEST - 1]) == [] and len(names(TEXT[:SHORTEST])) == 1
    for body in (b"", b"{", b"[]", b"7", b"{}", b'{"prompt": 0}', b'{"prompt": null}', b"\xff"):
        assert name_beginnings(body) == ""
    assert len(names("a" * (SHORTEST << 14))) == MOST
    assert names("\ud800" * 200)  # text that UTF-8 has no bytes for


@pytest.mark.parametrize("other", [{"model": "adapter"}, {"cache_salt": "tenant"}])
def test_another_model_or_salt_shares_nothing(other):
    assert not set(names()) & set(names(**other))


def test_ids_and_messages_have_beginnings_too():
    chat = [{"role": "system", "content": TEXT}, {"role": "user", "content": "one"}]
    again = [*chat[:1], {"role": "user", "content": "two"}]
    assert names(chat, "messages")[-1] == names(again, "messages")[-1]
    assert names(list(range(500)))[:2] == names(list(range(400)))[:2]


@pytest.mark.parametrize("wish", [True, False])
def test_the_guard_hands_beginnings_to_the_router_where_it_wants_them(monkeypatch, wish):
    monkeypatch.setattr(Wish, "is_there", wish)
    came = {}

    async def app(scope, receive, send):
        came.update(scope["headers"])

    body = json.dumps({"model": "small", "prompt": TEXT}).encode()

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        pass

    scope = {"type": "http", "path": "/v1/completions", "headers": [(b"X-Session-Id", b"mine")]}
    asyncio.run(ProxyGuard(app)(scope, receive, send))
    own = {name: value for name, value in came.items() if name.lower() == b"x-session-id"}
    assert own == ({b"x-session-id": ",".join(names()).encode()} if wish else {})


def replica(name: str) -> ReplicaID:
    return ReplicaID(name, DeploymentID("moeyard", "app"))


A, B, C = map(replica, "abc")


def test_the_longest_beginning_decides_and_the_last_replica_that_saw_it():
    seen = LastSeen(most=4)
    seen.add(["short", "long"], A)
    seen.add(["short", "other"], B)
    assert seen.find(["short", "long"], {A, B}) == A
    assert seen.find(["short", "unknown"], {A, B}) == B
    assert seen.find(["short", "long"], {B}) == B, "a replica that has gone counts for nothing"
    assert seen.find(["unknown"], {A, B}) is None
    seen.add(["1", "2", "3"], A)  # four are known now, and "long" was not seen for longest
    assert seen.find(["long"], {A, B}) is None and seen.find(["other"], {B}) == B


@pytest.fixture
def router(monkeypatch):
    monkeypatch.setattr(Wish, "is_there", False)

    async def make():
        found = PrefixRouter(
            deployment_id=DeploymentID("moeyard", "app"),
            handle_source=DeploymentHandleSource.PROXY,
        )
        found.initialize_state(limit=4)
        for name in (A, B, C):
            found._replicas[name] = SimpleNamespace(replica_id=name)
            found._replica_id_set.add(name)
        return found

    return asyncio.run(make())


def choose(router, names="") -> tuple[list[ReplicaID], list[ReplicaID]]:
    """Return the first rank, and all of the last one."""
    request = SimpleNamespace(
        metadata=SimpleNamespace(session_id=names, multiplexed_model_id=""),
        routing_context=SimpleNamespace(tried_same_node=False, tried_same_az=False),
    )
    ranks = asyncio.run(router.choose_replicas([], request))
    return [r.replica_id for r in ranks[0]], [r.replica_id for r in ranks[-1]]


def routed(router, names, replica):
    request = SimpleNamespace(metadata=SimpleNamespace(session_id=names))
    router.on_request_routed(request, replica, None)


def test_a_router_tells_the_guard_that_it_wants_beginnings(router):
    assert Wish.is_there


def test_a_known_beginning_goes_where_it_went_and_others_to_two_of_all(router):
    routed(router, "x,y", B)
    for _ in range(20):
        first, last = choose(router, "x,z")
        assert first == [B] and len(set(last)) == 2
    assert {i for _ in range(100) for i in choose(router)[0]} == {A, B, C}


def test_a_replica_with_too_many_requests_more_than_the_emptiest_is_passed_over(router):
    routed(router, "x", B)
    for name, count in ((A, 3), (B, 7), (C, 30)):
        router.replica_queue_len_cache.update(name, count)
    assert choose(router, "x")[0] == [B], "4 more than another one is the limit"
    router.replica_queue_len_cache.update(B, 8)
    assert len(choose(router, "x")[0]) == 2


def test_a_replica_that_has_gone_is_not_chosen(router):
    routed(router, "x", B)
    del router._replicas[B]
    router._replica_id_set.discard(B)
    first, _ = choose(router, "x")
    assert set(first) == {A, C}
